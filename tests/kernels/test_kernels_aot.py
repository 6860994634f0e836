"""The Triton kernels compile for GPUs that are not here, and the committed counts are of the code as it is."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from avsep.benchmarks import aot
from avsep.benchmarks.aot import ARCHITECTURES, COLUMNS
from avsep.errors import ConfigError
from avsep.kernels._triton import AotCase

RESULTS = Path(aot.__file__).resolve().parent / "results" / "aot.csv"
OPS = aot.operations_with_kernels()
KEY = ("op", "kernel", "settings")

# One configuration of each kernel for one early, one usual and one late architecture: the one of the smallest sizes.
QUICK = """
from avsep.benchmarks.aot import cases_of, compile_case, operations_with_kernels

def size(case):
    return sum(value for value in case.constants.values() if type(value) is int)

for op in operations_with_kernels():
    for name in {case.name for case in cases_of(op)}:
        for sm in (75, 80, 90):
            fitting = [c for c in cases_of(op) if c.name == name and sm in (c.architectures or (sm,))]
            row = compile_case(op, min(fitting, key=size), sm)
            assert row["registers"] > 0 and row["shared_bytes"] <= row["shared_limit_bytes"], row
            print(op, name, sm)
"""


def without_interpreter(*arguments, timeout=280):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.slow  # the usual suite runs every kernel in the interpreter, and holds the counts against the source
def test_one_configuration_of_each_kernel_compiles():
    found = without_interpreter("-c", QUICK)
    assert found.returncode == 0, found.stderr[-3000:]
    expected = {f"{op} {case.name} {sm}" for op in OPS for case in aot.cases_of(op) for sm in (75, 80, 90)}
    assert set(found.stdout.splitlines()) == expected


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_configuration_compiles(tmp_path):
    out = tmp_path / "aot.csv"
    found = without_interpreter("-m", "avsep.benchmarks.aot", "--out", str(out), timeout=3500)
    assert found.returncode == 0, found.stderr[-3000:]
    cases = [case for op in OPS for case in aot.cases_of(op)]
    assert len(aot.read_results(out)) == sum(len(case.architectures or ARCHITECTURES) for case in cases)


@pytest.mark.skipif(not RESULTS.parent.is_dir(), reason="needs the source tree")
def test_the_committed_counts_are_of_every_case_and_of_this_source():
    rows = aot.read_results(RESULTS)
    keys = [tuple(row[k] for k in ("op", "kernel", "settings", "sm")) for row in rows]
    expected = {
        (op, case.name, case.settings, str(sm))
        for op in OPS
        for case in aot.cases_of(op)
        for sm in case.architectures or ARCHITECTURES
    }
    assert len(keys) == len(set(keys))
    again = "run `avsep bench aot`, and commit benchmarks/results/aot.csv"
    assert set(keys) == expected, again
    hashes = {}
    for op in OPS:
        pieces = aot._pieces(op)
        hashes |= {(op, c.name, c.settings): aot.source_hash(op, c, pieces) for c in aot.cases_of(op)}
    stale = {(row["op"], row["kernel"]) for row in rows if row["source"] != hashes[tuple(row[k] for k in KEY)]}
    assert not stale, f"these kernels changed: {sorted(stale)}: {again}"
    for row in rows:
        assert int(row["shared_bytes"]) <= int(row["shared_limit_bytes"]), row
        assert int(row["registers"]) > 0, row
        assert int(row["spill_stores_bytes"]) + int(row["spill_loads_bytes"]) == 0, row


KERNEL = """
SIZE = 4

def _helper(x):
    return x + SIZE

@jit(
    do_not_specialize=["n"]
)
def _kernel(x, n):
    if n:
        return _helper(x)

def _other(x):
    return x
"""


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("return x + SIZE", "return (x  # why\n  + SIZE\n  )", False),
        ("(x, n):", "(\n    x, n  # why\n):", True),
        ("(x, n):\n", '(x, n):\n    """What it does."""\n\n    # why\n', True),
        ("SIZE = 4", "SIZE = 5", False),
        ("x + SIZE", "x - SIZE", False),
        ("def _other(x):\n    return x", "def _other(x):\n    return 2", True),
        ("        return _helper(x)", "        n\n    return _helper(x)", False),
    ],
)
def test_what_changes_the_hash(before, after, same, monkeypatch, tmp_path):
    """Code that the kernel runs, at whatever depth; no comment, docstring or other kernel."""

    class Spec:
        origin = str(tmp_path / "triton_kernel.py")

    def _kernel():
        return None

    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: Spec)
    case = AotCase("k", SimpleNamespace(fn=_kernel), {"x": "*fp32", "n": "i32"})
    digests = []
    for code in (KERNEL, KERNEL.replace(before, after)):
        Path(Spec.origin).write_text(code)
        digests.append(aot.source_hash("mask_head", case))
    assert before in KERNEL
    assert (digests[0] == digests[1]) == same


@pytest.mark.parametrize(
    "change",
    [{"constants": {"C": 5}}, {"signature": {"x": "*fp16"}}, {"aligned": ("x",)}, {"num_warps": 8}, {"num_stages": 3}],
)
def test_what_a_case_is_compiled_with_changes_the_hash(change):
    case = aot.cases_of("mask_head")[0]
    assert aot.source_hash("mask_head", replace(case, **change)) != aot.source_hash("mask_head", case)


def test_what_ptxas_says_is_read():
    log = (
        "ptxas info    : Compiling entry function '_k' for 'sm_90a'\n"
        "    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    assert aot._resources(log) == {
        "registers": 255,
        "spill_stores_bytes": 12,
        "spill_loads_bytes": 8,
        "stack_bytes": 16,
    }
    with pytest.raises(Exception, match="ptxas said nothing"):
        aot._resources("")


def row(**values):
    base = dict.fromkeys(COLUMNS, "0") | {"op": "mask_head", "kernel": "k", "settings": "s", "sm": "90"}
    return base | {"shared_limit_bytes": "100"} | {k: str(v) for k, v in values.items()}


def test_summary_names_spills_and_what_needs_too_much_memory():
    said = aot.summary(
        [row(sm=75, spill_stores_bytes=8), row(sm=80, spill_loads_bytes=4), row(shared_bytes=101) | {"sm": 90}]
    )
    assert said.startswith("3 kernels for 3 architectures; ")
    assert "spills: 2; above the shared memory of a block: 1" in said
    assert "mask_head, k (s) on sm_75: spills 8 + 0 bytes" in said
    assert "mask_head, k (s) on sm_80: spills 0 + 4 bytes" in said
    assert "on sm_90: shared 101 of 100 bytes" in said
    assert "none" in aot.summary([row()])


@pytest.mark.parametrize(
    ("options", "variable", "message"),
    [
        ({}, "1", "TRITON_INTERPRET=1 is set"),
        ({"ops": ["mask_heads"]}, "0", "no operation named 'mask_heads'"),
        ({"architectures": [70]}, "0", "unknown architecture sm_70"),
    ],
)
def test_mistakes(options, variable, message, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", variable)
    with pytest.raises(ConfigError, match=message):
        aot.compile_all(tmp_path / "aot.csv", **options)
    assert not (tmp_path / "aot.csv").exists()


def test_a_file_of_another_kind_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    other = tmp_path / "notes.csv"
    other.write_text("name,age\n")
    with pytest.raises(ConfigError, match="is not a file of compiled kernels"):
        aot.compile_all(other)
    assert other.read_text() == "name,age\n"


@pytest.mark.slow
@pytest.mark.skipif("mask_head" not in OPS, reason="needs a kernel")
def test_rows_of_this_source_are_kept_and_others_compiled(tmp_path):
    """With every row of one architecture there but one, that one alone is compiled; unknown cases are dropped."""
    import triton

    out = tmp_path / "aot.csv"
    cases = aot.cases_of("mask_head")
    digests = [aot.source_hash("mask_head", case) for case in cases]
    same = {"op": "mask_head", "triton": triton.__version__, "registers": 7}
    rows = [
        row(**same, kernel=c.name, settings=c.settings, source=digest)
        for c, digest in zip(cases[1:], digests[1:], strict=True)
    ]
    rows[-1]["source"] = "old"
    rows.append(row(**same, kernel="gone", source=digests[0]))
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    arguments = ("--out", str(out), "--op", "mask_head", "--sm", "90", "--jobs", "1")
    found = without_interpreter("-m", "avsep.benchmarks.aot", *arguments)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "... 2 of 2" in found.stderr
    kept = aot.read_results(out)
    assert [r["kernel"] for r in kept] == [c.name for c in cases]
    assert sum(r["registers"] == "7" for r in kept) == len(cases) - 2
    assert [r["source"] for r in kept] == digests
