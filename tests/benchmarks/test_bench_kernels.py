"""``avsep bench kernels``: every operation in tiny sizes; no speed for what is wrong; bars, table and the GPU suite."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avsep.benchmarks import kernel_cases, measure
from avsep.benchmarks import kernels as bench_kernels
from avsep.benchmarks.kernel_cases import KernelCase, Variant
from avsep.benchmarks.kernels import COLUMNS, Ceilings, bars, measure_kernel_case, propose_table, run
from avsep.errors import ConfigError
from avsep.kernels._backend import _TRITON_FROM, OPERATIONS
from support import commands

SUITE = Path(kernel_cases.__file__).resolve().parent / "gpu_suite.sh"
CEILINGS = Ceilings(bytes_per_s=1e9, flop_per_s=1e9, launch_s=1e-6)


def bench(*arguments):
    return commands.run("bench", "kernels", *arguments)


def make_case(*variants, **changes):
    def inputs(seed):
        rng = torch.Generator().manual_seed(seed)
        return {"x": torch.randn(4, 3, generator=rng)}

    case = KernelCase(
        name="double",
        op="mask_head",
        title="twice",
        size=12,
        settings="4 x 3",
        inputs=inputs,
        reference=lambda x: (2 * x["x"],),
        variants=variants,
        leaves=("x",),
        forward_bytes=96,
        total_bytes=200,
    )
    return replace(case, **changes)


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "kernels.csv", tmp_path / "kernels.png"
    names = ("--op", "similarity_distillation", "--op", "stft_masking", "--op", "mask_head")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # the interpreter's minutes belong to the kernels' own tests
        assert bench(*names, "--sizes", "tiny", "--repeats", 2, "--out", out, "--plot", plot) == 0
    found = commands.csv_rows(out, COLUMNS)
    assert {r["op"] for r in found} == set(OPERATIONS)
    shown = capsys.readouterr().out
    for row in found:
        assert row["case"] in shown
        assert row["torch"] == torch.__version__
        assert row["commit"]
        assert row["device"]
        if row["variant"].startswith(("eager", "torch")) and row["variant"] != "torch.compile":
            assert float(row["forward_ms"]) > 0
            assert "tolerance" in row["check"]
            assert float(row["floor_share"]) > 0
            assert (row["total_ms"] != "") == (row["case"] != "stft analysis batch=2")
        else:
            assert row["note"].startswith("not run: ")
            assert row["forward_ms"] == row["total_ms"] == row["gb_per_s"] == ""
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"results appended to {out}" in shown.replace("\n", "")
    assert bench_kernels.main(["--from-csv", str(out)]) == 0  # rows read back are as good as fresh ones


@pytest.mark.slow
def test_rows_of_a_variant_come_from_its_own_times(monkeypatch):
    """Backward is total less forward, sample by sample; rates and shares follow from the whole."""
    monkeypatch.setattr(
        bench_kernels,
        "interleaved",
        lambda functions, repeats, **_: {
            name: measure.Timing((0.002, 0.003, 0.004) if name.endswith("forward") else (0.006, 0.008, 0.010))
            for name in functions
        },
    )
    ((row,), wrong) = measure_kernel_case(
        make_case(Variant("a", lambda x: (2 * x["x"],), ours=True)), CEILINGS, repeats=3
    )
    assert not wrong
    assert (row["forward_ms"], row["backward_ms"], row["total_ms"]) == (3.0, 5.0, 8.0)
    assert (row["backward_p20_ms"], row["backward_p80_ms"]) == (4.4, 5.6)
    assert row["gb_per_s"] == pytest.approx(200 / 8e-3 / 1e9, rel=1e-3)
    assert row["floor_ms"] == 0.002  # two launches take longer than 200 bytes
    assert row["floor_share"] == pytest.approx(0.002 / 8, rel=1e-3)
    assert row["ratio"] == 1


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def partly_unwritten(x):
    out = 2 * x["x"]
    out[-1, -1] = float("nan")
    return (out,)


@pytest.mark.parametrize(
    ("wrong_run", "message"),
    [
        (lambda x: (2.001 * x["x"],), "outputs differ from float64 by 0.0005"),
        (lambda x: (_HalfGradient.apply(x["x"]),), "gradients differ from float64 by 0.5"),
        pytest.param(partly_unwritten, "outputs differ from float64 by inf", marks=pytest.mark.slow),
        pytest.param(lambda x: (2 * x["x"][:3],), "outputs differ from float64 by inf", marks=pytest.mark.slow),
        pytest.param(lambda x: (2 * x["x"], x["x"]), "2 outputs instead of 1", marks=pytest.mark.slow),
        pytest.param(lambda x: x["y"], "KeyError: 'y'", marks=pytest.mark.slow),
    ],
)
def test_what_is_wrong_gets_no_speed(wrong_run, message):
    case = make_case(
        Variant("right", lambda x: (2 * x["x"],)),
        Variant("ours", wrong_run, ours=True),
        Variant("peer", wrong_run),
    )
    found, wrong = measure_kernel_case(case, CEILINGS, repeats=1)
    by_name = {row["variant"]: row for row in found}
    assert by_name["right"]["total_ms"] > 0  # the others go on
    for name in ("ours", "peer"):
        assert message in by_name[name]["note"]
        assert by_name[name]["note"].startswith("refused: ")
        assert "forward_ms" not in by_name[name]
        assert "total_ms" not in by_name[name]
    assert len(wrong) == 1  # a peer's failing is its own
    assert f"no speed is given for 'double', ours: {message}" in wrong[0]


def test_rows_beyond_the_checked_ones_must_be_finite():
    case = make_case(Variant("ours", partly_unwritten, ours=True), checked_rows=(0,))
    assert "differ from float64 by inf" in measure_kernel_case(case, None, repeats=1)[1][0]
    case = make_case(Variant("ours", lambda x: (2 * x["x"],), ours=True), checked_rows=(0, 3))
    assert measure_kernel_case(case, None, repeats=1)[1] == []


def test_a_wrong_backend_fails_the_command(monkeypatch, tmp_path, capsys):
    whole = kernel_cases.kernels.similarity_distillation
    monkeypatch.setattr(
        kernel_cases.kernels,
        "similarity_distillation",
        lambda *a, **k: whole(*a, **{**k, "temperature": 1.001 * k["temperature"]}),
    )
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    out = tmp_path / "kernels.csv"
    assert bench("--op", "similarity_distillation", "--sizes", "tiny", "--repeats", 1, "--out", out) == 2
    assert "no speed is given for 'similarity_distillation n=24', torch" in capsys.readouterr().err
    torch_row = next(r for r in commands.csv_rows(out, COLUMNS) if r["variant"] == "torch")
    assert torch_row["total_ms"] == ""
    assert torch_row["note"].startswith("refused")


def test_too_little_memory_is_said():
    case = make_case(Variant("large", lambda x: (2 * x["x"],), needs_bytes=1e15))
    ((row,), wrong) = measure_kernel_case(case, CEILINGS, repeats=1)
    assert row["note"].startswith("not run: needs about 1000000 GB")
    assert "total_ms" not in row
    assert not wrong


def test_what_is_only_checked_has_no_figures():
    case = make_case(
        Variant("a", lambda x: (2 * x["x"],)), Variant("b", lambda x: (2 * x["x"],), timed=False, note="why")
    )
    first, second = measure_kernel_case(case, CEILINGS, repeats=1)[0]
    assert first["total_ms"] > 0
    assert "tolerance" in second["check"]
    assert second["note"] == "why"
    assert "total_ms" not in second


@pytest.mark.slow
def test_failing_only_when_repeated_is_said():
    calls = []

    def once(x):
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError("no more")
        return (2 * x["x"],)

    case = make_case(Variant("right", lambda x: (2 * x["x"],)), Variant("ours", once, ours=True))
    found, wrong = measure_kernel_case(case, CEILINGS, repeats=1)
    assert found[0]["total_ms"] > 0
    assert found[1]["note"] == "failed: MemoryError: no more"
    assert "total_ms" not in found[1]
    assert wrong == ["no speed is given for 'double', ours: MemoryError: no more"]


@pytest.mark.slow
def test_inputs_take_turns():
    seen = []

    def remember(x):
        seen.append(x["x"].data_ptr())
        return (2 * x["x"],)

    measure_kernel_case(make_case(Variant("a", remember)), CEILINGS, repeats=2)
    assert len(set(seen)) >= 3


def measured(case, variant, op="similarity_distillation", size="", **figures):
    base = dict.fromkeys(COLUMNS, "") | {"case": case, "variant": variant, "op": op, "size": str(size)}
    return base | {"cuda": "13.0", "device": "a GPU"} | {k: str(v) for k, v in figures.items()}


def test_bars():
    small, large = "similarity_distillation n=128", "similarity_distillation n=32768"
    found = bars(
        [
            measured(small, "eager", total_ms=2.0),
            measured(small, "torch.compile", total_ms=0.3),
            measured(small, "triton", total_ms=0.1),
            measured("similarity_distillation n=8192", "eager", size=8192, peak_memory_mb=1000),
            measured(large, "triton", total_ms=30, peak_memory_mb=330),
            measured(large, "inf_cl, log-sum-exps only", total_ms=29.9),
            measured("stft analysis batch=32", "eager", forward_ms=3),
            measured("stft analysis batch=32", "triton", forward_ms=1),
            measured("stft pass frame batch=32", "copy", gb_per_s=4000, copy_gb_per_s=4000),
            measured("stft pass frame batch=32", "triton", gb_per_s=2799, copy_gb_per_s=4000),
            measured("mask_head with loss batch=32", "eager", total_ms=3, peak_memory_mb=900),
            measured("mask_head with loss batch=32", "triton", total_ms=1, peak_memory_mb=300),
        ]
    )
    said = [(b.what, b.measured, b.met) for b in found]
    assert said == [
        (f"{small}, forward + backward", "20.00x", True),
        (f"{small}, forward + backward", "3.00x", True),
        (f"{large}, peak memory", "330 MB, 2.06% of 16,000 MB (extrapolated from 1,000 MB at n=8192)", False),
        (f"{large}, forward + backward", "30.0 ms against 29.9 ms", False),
        ("stft analysis batch=32, forward", "3.00x", True),
        ("stft pass frame batch=32", "70%", False),
        ("mask_head with loss batch=32, forward + backward", "3.00x", True),
        (
            "mask_head with loss batch=32, peak memory",
            "300 of 900 MB, 0.33 (without the 268 MB gradient that both return 32 and 632)",
            True,
        ),
    ]
    assert bars([]) == []
    silent = bars([measured(small, "eager", total_ms=2.0), measured(small, "triton", note="refused: it is wrong")])
    assert [(b.measured, b.met) for b in silent] == [("nothing: refused: it is wrong", None)] * 2
    (bar,) = bars([measured("stft pass frame batch=32", "triton", note="failed: no memory")])
    assert (bar.measured, bar.met) == ("nothing: failed: no memory", None)


def test_the_cpu_bar_is_of_the_unet_alone():
    cpu = {"cuda": "", "device": "a processor, 2 cores"}
    rows = [measured("unet", "literal", total_ms=18) | cpu, measured("unet", "avsep", total_ms=10) | cpu]
    rows += [measured("stft analysis batch=32", v, forward_ms=1) | cpu for v in ("eager", "triton")]
    (bar,) = bars(rows)
    assert bar.measured == "1.80x"
    assert bar.met


def test_the_backend_table_is_proposed_from_measurements():
    def pair(op, case, size, torch_ms, triton_ms, key="total_ms"):
        return [measured(case, v, op, size, **{key: t}) for v, t in (("torch", torch_ms), ("triton", triton_ms))]

    found = [
        *pair("similarity_distillation", "n=64", 64, 1.0, 1.1),
        *pair("similarity_distillation", "n=128", 128, 1.0, 0.9),
        *pair("similarity_distillation", "n=192", 192, 1.0, 0.5),
        *pair("stft_masking", "analysis", 100, 1.0, 0.5, "forward_ms"),
        *pair("stft_masking", "synthesis", 100, 1.0, 2.0),  # at the same size the other part lost
        measured("n=32768", "triton", "similarity_distillation", 32768, total_ms=1),  # PyTorch did not run
    ]
    assert propose_table(found) == {"similarity_distillation": 128, "stft_masking": None}
    small = pair("mask_head", "loss", 10, 1.0, 0.5)
    assert propose_table(small) == {"mask_head": 0}
    wrong = [measured("loss", "torch", "mask_head", 99, total_ms=1.0)]
    wrong += [measured("loss", "triton", "mask_head", 99, note="refused: outputs differ")]
    assert propose_table(small + wrong) == {"mask_head": None}
    assert propose_table([]) == {}
    assert set(_TRITON_FROM) == set(OPERATIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ops": ["mask_heads"]}, "no operation named 'mask_heads'"),
        ({"sizes": "hug"}, "no sizes named 'hug'"),
        ({"ops": ["unet"], "sizes": "tiny"}, "the U-Net's case runs on the CPU with the sizes paper or all"),
    ],
)
def test_mistakes(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(**options, out=tmp_path / "kernels.csv", write=lambda _: None)
    assert not (tmp_path / "kernels.csv").exists()


@pytest.mark.slow
def test_the_unet_has_rows_of_this_table(monkeypatch):
    from avsep.benchmarks import cases

    def small(**_):
        variants = {name: (lambda: None) for name in ("literal", "avsep")}
        return measure.Case("unet", "the U-Net", variants, lambda: "ok (tolerance 1)", "spectrogram", 4)

    monkeypatch.setattr(cases, "unet_case", small)
    monkeypatch.setattr(measure, "PAUSE_S", 0.0)
    found = bench_kernels.unet_rows(2)
    assert [r["variant"] for r in found] == ["literal", "avsep"]
    assert all(set(r) <= set(COLUMNS) and r["total_ms"] >= 0 and r["op"] == "unet" for r in found)


def test_kernel_benchmarks_need_little():
    """Neither the command line's packages nor the file formats' are loaded."""
    code = (
        "import avsep.benchmarks.kernels, sys\n"
        "heavy = ('typer', 'rich', 'pydantic', 'yaml', 'soundfile', 'soxr', 'lightning_fabric', 'safetensors', "
        "'matplotlib', 'pytest', 'scipy')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"


# --- the suite for a machine with a GPU ---

needs_bash = pytest.mark.skipif(
    not SUITE.exists() or shutil.which("bash") is None, reason="needs the source tree and bash"
)


def suite(*arguments, **variables):
    return subprocess.run(
        ["bash", str(SUITE), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHON": sys.executable, **variables},
    )


@needs_bash
def test_the_suite_parses_and_names_mistakes(tmp_path):
    assert subprocess.run(["bash", "-n", str(SUITE)], capture_output=True).returncode == 0
    assert "--dry-run OUT" in suite("--help").stdout
    for arguments, message in (
        ((), "give a folder"),
        (("--wheels",), "--wheels needs a value"),
        (("--fast",), "unknown option --fast"),
        ((tmp_path, "--wheels", tmp_path / "none"), "no folder"),
        ((tmp_path, tmp_path), "one folder for the results"),
    ):
        found = suite(*arguments)
        assert found.returncode == 2
        assert message in found.stderr
    (tmp_path / "summary.txt").write_text("")
    assert "has results already" in suite(tmp_path).stderr


@pytest.mark.slow
@needs_bash
def test_the_suite_goes_on_without_time_and_says_so(tmp_path):
    """With no time at all every part is left out, which is no success: preparing, installing and summing up remain."""
    found = suite("--dry-run", tmp_path / "out", AVSEP_SUITE_SECONDS="0")
    assert found.returncode == 1, found.stdout + found.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "install " in summary
    assert "bench-similarity_distillation" in summary
    assert summary.count("failed (no time was left)") >= 4
    assert "parts failed" in summary
    environment = (tmp_path / "out" / "environment.txt").read_text()
    assert f"torch: {torch.__version__}" in environment
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names <= {"summary.txt", "environment.txt", "tests.log", "tests.xml", "bench.log", "kernels.csv"}


@needs_bash
@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_suite_that_is_cut_off_keeps_what_was_measured(tmp_path):
    """Whole rows of the part that was done, those of the running part's cases that were, and a summary of both."""
    out = tmp_path / "out"
    table, summary = out / "kernels.csv", out / "summary.txt"
    process = subprocess.Popen(
        ["bash", str(SUITE), "--dry-run", str(out)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHON": sys.executable},
    )
    try:
        deadline = time.monotonic() + 600
        while not table.exists() or "stft analysis" not in table.read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        so_far = summary.read_text()
        process.terminate()
        assert process.wait(30) == 143
    finally:
        if process.poll() is None:
            process.kill()
    assert re.search(r"bench-similarity_distillation +ok", so_far)
    assert re.search(r"bench-stft_masking +not finished", so_far)
    rows = commands.csv_rows(table, COLUMNS)
    assert all(row["date"] for row in rows)
    done = {op: {row["case"] for row in rows if row["op"] == op} for op in OPERATIONS}
    assert done == {
        "similarity_distillation": {"similarity_distillation n=24"},
        "stft_masking": {"stft analysis batch=2"},
        "mask_head": set(),
    }
    assert {row["variant"] for row in rows if row["op"] == "stft_masking"} >= {"eager", "torch"}
    told = summary.read_text()
    assert re.search(r"bench-similarity_distillation +ok", told)
    assert re.search(r"bench-stft_masking +failed \(stopped while it was running\)", told)
    assert "cut off; 1 parts failed" in told
    assert "=== bench-stft_masking: stopped" in (out / "bench.log").read_text()


@needs_bash
@pytest.mark.slow
@pytest.mark.timeout(950)  # the suite ends itself before
def test_the_suite_runs_dry(tmp_path):
    from avsep.benchmarks import continual, export_cases

    out = tmp_path / "out"
    found = suite("--dry-run", out)
    assert found.returncode == 0, found.stdout + found.stderr
    assert {r["op"] for r in commands.csv_rows(out / "kernels.csv", COLUMNS)} == set(OPERATIONS)
    assert "<testsuite" in (out / "tests.xml").read_text()
    steps = {r["variant"] for r in commands.csv_rows(out / "train.csv", measure.COLUMNS) if r["case"] == "train step"}
    assert steps == {"literal", "avsep"}
    tasks = [(r["strategy"], r["task"]) for r in commands.csv_rows(out / "continual.csv", continual.COLUMNS)]
    assert sorted(tasks) == [(strategy, task) for strategy in ("contavsep", "finetune") for task in "01"]
    forms = {r["variant"]: r for r in commands.csv_rows(out / "forms.csv", export_cases.COLUMNS)}
    assert float(forms["PyTorch eager"]["median_ms"]) > 0
    assert any(name.startswith("ONNX Runtime") for name in forms)
    assert {r["case"] for r in commands.csv_rows(out / "separate.csv", measure.COLUMNS)} == {"separate", "first sound"}
    summary = (out / "summary.txt").read_text()
    assert "done; nothing failed" in summary
    parts = [line.split()[0] for line in summary.splitlines() if line.startswith(("bench-", "checks", "results"))]
    assert parts.index("bench-mask_head") < parts.index("bench-continual") < parts.index("checks")
    assert parts.index("checks") < parts.index("bench-forms") < parts.index("bench-huge") < parts.index("results")
