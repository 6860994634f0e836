"""The Triton kernels compile for GPUs that are not here, and the committed counts are of the code as it is."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from avsep.benchmarks import aot
from avsep.benchmarks.aot import ARCHITECTURES, COLUMNS
from avsep.errors import ConfigError

RESULTS = Path(aot.__file__).resolve().parent / "results" / "aot.csv"
OPS = aot.operations_with_kernels()

# one configuration of each kernel for one early, one usual and one late architecture: the first that is chosen there
QUICK = """
import sys
from avsep.benchmarks.aot import cases_of, compile_case
op, architectures = sys.argv[1], [int(a) for a in sys.argv[2:]]
seen = set()
for case in cases_of(op):
    for architecture in architectures:
        if (case.name, architecture) in seen or architecture not in (case.architectures or architectures):
            continue
        seen.add((case.name, architecture))
        row = compile_case(op, case, architecture)
        assert row["registers"] > 0 and row["shared_bytes"] <= row["shared_limit_bytes"], row
print(len(seen))
"""


def without_interpreter(*arguments, timeout=280):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.parametrize("op", OPS)
def test_one_configuration_of_each_kernel_compiles(op):
    found = without_interpreter("-c", QUICK, op, "75", "80", "90")
    assert found.returncode == 0, found.stderr[-3000:]
    assert int(found.stdout) >= len({case.name for case in aot.cases_of(op)})


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
    hashes = {op: aot.source_hash(op) for op in OPS}
    stale = sorted({row["op"] for row in rows if row["source"] != hashes[row["op"]]})
    assert not stale, f"the kernels of {', '.join(stale)} changed: {again}"
    for row in rows:
        assert int(row["shared_bytes"]) <= int(row["shared_limit_bytes"]), row
        assert int(row["registers"]) > 0, row


def test_comments_do_not_change_the_hash_and_code_does(monkeypatch, tmp_path):
    class Spec:
        origin = str(tmp_path / "triton_kernel.py")

    def digest(code):
        Path(Spec.origin).write_text(code)
        return aot.source_hash("mask_head")

    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: Spec)
    first = digest("x = (1 +\n     2)  # why\n")
    assert digest("x = (1 + 2)\n# another\n") == first
    assert digest("x = (1 + 3)\n") != first
    assert digest("if x:\n    y()\nz()\n") != digest("if x:\n    y()\n    z()\n")


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


def test_summary_names_spills_from_sm_80_on():
    said = aot.summary(
        [row(sm=75, spill_stores_bytes=8), row(sm=80, spill_loads_bytes=4), row(shared_bytes=101) | {"sm": 90}]
    )
    assert said.startswith("3 kernels for 3 architectures; ")
    assert "spills on sm_80 and later: 1; before: 1; above the shared memory of a block: 1" in said
    assert "mask_head, k (s) on sm_80: spills 0 + 4 bytes" in said
    assert "sm_75:" not in said
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


@pytest.mark.skipif("mask_head" not in OPS, reason="needs a kernel")
def test_rows_of_this_source_are_kept_and_others_compiled(tmp_path):
    """With every row of one architecture there but one, that one alone is compiled; unknown cases are dropped."""
    import triton

    out = tmp_path / "aot.csv"
    cases = aot.cases_of("mask_head")
    digest = aot.source_hash("mask_head")
    rows = [
        row(op="mask_head", kernel=c.name, settings=c.settings, source=digest, triton=triton.__version__, registers=7)
        for c in cases[1:]
    ]
    rows[-1]["source"] = "old"
    rows.append(row(op="mask_head", kernel="gone", settings="s", source=digest, triton=triton.__version__))
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
    assert {r["source"] for r in kept} == {digest}
