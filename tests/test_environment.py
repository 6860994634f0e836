"""What a process is told about the machine that it runs on."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from avsep.environment import python_command

_STEPS = """
import resource, sys, torch
from avsep.environment import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def step():
    parts = [torch.zeros(10_000_000) for _ in range(3)]  # 40 MB each
for _ in range(8):  # until the heap is as large as it gets
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_step_finds_the_memory_of_the_last_one():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", _STEPS, how], capture_output=True, check=True, text=True).stdout)
        for how in ("keep", "plain")
    }
    assert faults["plain"] > 5 * 100  # pages, huge ones on some machines
    assert faults["keep"] < 0.01 * faults["plain"]


def test_a_child_does_not_take_a_file_of_the_current_folder_for_a_library(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong queue')\n")
    here = tmp_path / "a 'quoted' folder"
    here.mkdir()
    (here / "of_mine.py").write_text("what = 'mine'\n")
    monkeypatch.syspath_prepend(here)  # what this process finds, the child finds
    command = python_command("import queue, sys, of_mine; print(of_mine.what, *sys.argv[1:])", "one", "two words")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "mine one two words", "")
