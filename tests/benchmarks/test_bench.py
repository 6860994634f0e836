"""``avsep bench``: runs end to end at small sizes, and gives no speed for what does not compute the same."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from avsep import convolution
from avsep.benchmarks import cases, export_cases, measure, separating
from avsep.benchmarks.measure import COLUMNS, Case, CheckFailed, Timing, agree, interleaved, peak_memory_bytes
from avsep.benchmarks.reading import reading_memory
from avsep.benchmarks.run import run_cases
from avsep.data.store import Store
from avsep.errors import ConfigError, MissingExtraError
from avsep.spec import FrontEndSpec
from avsep.strategies import ContAVSep
from support.commands import csv_rows, run
from support.tones import TINY_FRONT_END

PRESET = {
    "separator": {
        "audio_encoder": {"name": "unet7", "params": {"base_channels": 4, "mask_channels": 4}},
        "object_encoder": {"name": "precomputed", "params": {"features": "o", "dim": 8}},
        "motion_encoder": {"name": "precomputed", "params": {"features": "m", "dim": 12}},
        "mask_decoder": {
            "name": "query_transformer",
            "params": {"dim": 16, "heads": 2, "feedforward": 16, "layers": 2},
        },
        "front_end": TINY_FRONT_END,
    },
    "train": {"decoder": {"name": "adamw"}},
}


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump(PRESET))
    return str(path)


def bench(*arguments):
    """Exit code of ``avsep bench ...``."""
    return run("bench", *arguments)


def simple_case(name="simple", ways=2, error=0.0, **kwargs):
    variants = {f"way {n}": (lambda: None) for n in range(ways)}
    return Case(name, "a title", variants, lambda: agree("results", error, 0.1), "thing", 3, **kwargs)


@pytest.mark.slow
def test_train_end_to_end(preset, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "results.csv", tmp_path / "results.png"
    options = ("--preset", preset, "--batch", 2, "--classes", 4, "--repeats", 2, "--out", out)
    assert bench("train", *options, "--plot", plot) == 0
    found = csv_rows(out, COLUMNS)
    assert [(r["case"], r["variant"]) for r in found] == [
        ("train step", "literal"),
        ("train step", "avsep"),
        ("unet", "literal"),
        ("unet", "avsep"),
        ("unet", "avsep, plain upsampling"),
    ]
    for row in found:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        reference = next(r for r in found if r["case"] == row["case"])
        assert float(row["ratio"]) == pytest.approx(float(reference["median_ms"]) / float(row["median_ms"]), rel=1e-2)
        assert row["repeats"] == "2"
        assert "tolerance" in row["check"]
        assert row["torch"] == torch.__version__
        assert row["threads"] == str(torch.get_num_threads())
        assert row["device"]
        assert row["commit"]
        assert row["date"].endswith("Z")
    assert "1 of 4 sources memory in 1 mixtures" in found[0]["settings"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "median ms" in shown
    assert f"results appended to {out}" in shown.replace("\n", "")


@pytest.mark.slow
def test_data_end_to_end(tmp_path):
    out = tmp_path / "results.csv"
    sizes = ("--mixtures", 4, "--batch", 2, "--clips", 4, "--clip-s", 7, "--workers", 1)
    assert bench("data", *sizes, "--repeats", 2, "--out", out) == 0
    found = csv_rows(out, COLUMNS)
    names = ["whole files", "store", "shards"]
    assert [r["variant"] for r in found] == [*names, *(f"{name}, 1 worker" for name in names)]
    for row in found:  # 4 mixtures of 2 sources a pass
        assert float(row["per_second"]) == pytest.approx(8e3 / float(row["median_ms"]), rel=1e-2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's own memory")
def test_memory_of_reading(tone_store):
    found = reading_memory(tone_store, batch=2, mixtures=4, passes=2)
    assert found["clips"] == 28
    assert 0 < found["before_mb"] <= found["peak_mb"] < found["before_mb"] + 60


def test_metrics_end_to_end(tmp_path):
    pytest.importorskip("mir_eval.separation")
    out = tmp_path / "results.csv"
    assert bench("metrics", "--batch", 1, "--length", 4096, "--repeats", 1, "--out", out) == 0
    assert [r["variant"] for r in csv_rows(out, COLUMNS)] == ["mir_eval", "avsep"]
    assert "mir_eval 0." in csv_rows(out, COLUMNS)[0]["settings"]


@pytest.mark.parametrize("crop", [5000, 40000])  # within the clips of 1.5 s, and longer than they are
def test_reading_a_given_store(tone_store, crop):
    front_end = FrontEndSpec(clip_samples=crop)
    (case,) = cases.data_cases(Store.open(tone_store), batch=2, mixtures=4, workers=[0], front_end=front_end)
    assert case.check() == "batches within 0 (tolerance 0)"
    assert [f() for f in case.variants.values()] == [4, 4]


@pytest.mark.slow
def test_all_runs_every_group(monkeypatch, tmp_path):
    made = []
    for name in ("data_cases", "metrics_cases", "train_cases"):
        monkeypatch.setattr(cases, name, lambda *_, name=name, **__: (made.append(name), iter([simple_case(name)]))[1])
    monkeypatch.setattr(cases, "temporary_store", lambda *_, **__: None)
    monkeypatch.setattr("avsep.data.store.sharding.shard_store", lambda *_, **__: None)
    out = tmp_path / "results.csv"
    assert bench("all", "--repeats", 1, "--out", out) == 0
    assert made == ["data_cases", "metrics_cases", "train_cases"]
    before = out.read_text()
    assert len(csv_rows(out, COLUMNS)) == 6
    assert bench("all", "--repeats", 1, "--out", out) == 0  # a second run is appended
    assert out.read_text().startswith(before)
    assert len(csv_rows(out, COLUMNS)) == 12


def test_a_step_under_bf16_is_held_against_the_literal_one_too(preset):
    case, _ = cases.train_cases(preset, batch=2, classes=4, forms=["bf16"])
    assert list(case.variants) == ["literal", "avsep", "literal, bf16", "avsep, bf16"]
    assert "bf16: gradients within" in case.check()
    with pytest.raises(ConfigError, match="unknown form 'fp8' of a training step: bf16 or compiled"):
        next(cases.train_cases(preset, forms=["fp8"]))


def step_rows(full, mixed):
    """The library's rows of a training step: medians, with a tenth more and less."""
    found = []
    for variant, median in (("literal", 9.0), ("avsep", full), ("avsep, bf16", mixed)):
        figures = {"median_ms": median, "p20_ms": 0.9 * median, "p80_ms": 1.1 * median}
        found.append({"case": "train step", "variant": variant, **figures})
    return found


def test_bf16_is_proposed_where_it_is_clearly_faster():
    proposed = cases.bf16_proposal(step_rows(300.0, 150.0), "amx_bf16")
    assert proposed.splitlines()[1] == "    'amx_bf16': 2.00,"
    assert "no clear gain" in cases.bf16_proposal(step_rows(300.0, 290.0), "avx512_bf16")
    assert "no clear gain" in cases.bf16_proposal(step_rows(300.0, 400.0), "avx512_bf16")
    refused = cases.bf16_proposal(step_rows(300.0, 150.0), "")
    assert refused == (
        "no line for BF16_GAINS: this processor has no instructions for bf16 (a training step took 150 ms in bf16 and "
        "300 in full precision)"
    )
    assert cases.bf16_proposal(step_rows(300.0, 150.0)[:2], "amx_bf16") == ""


def test_the_command_proposes_for_this_processor_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("avsep.environment.bf16_instructions", lambda: "")
    monkeypatch.setattr(cases, "train_cases", lambda *_, **__: iter(()))
    for device, rows in (("cpu", step_rows(3.0, 90.0)), ("cpu", [])):
        monkeypatch.setattr("avsep.benchmarks.run.run_cases", lambda *_, rows=rows, **__: rows)
        assert bench("train", "--form", "bf16", "--device", device, "--out", tmp_path / "results.csv") == 0
        assert ("no line for BF16_GAINS" in capsys.readouterr().out) == bool(rows)


def test_ways_to_cut_up_a_recording_agree_before_they_are_timed():
    whole, first = separating.separate_cases("aligned_small", minutes=0.12, batch=2)
    assert list(whole.variants) == ["as Demucs", "as MSST", "avsep"]
    assert "estimates within" in whole.check()
    assert "first samples within" in first.check()
    with pytest.raises(ConfigError, match="preset 'iquery_small' cannot separate without pictures"):
        next(separating.separate_cases("iquery_small"))
    with pytest.raises(ConfigError, match=r"0\.01 minutes are less than two chunks"):
        next(separating.separate_cases("aligned_small", minutes=0.01))


def test_without_the_exporter_pytorchs_forms_of_a_separator_remain(preset, monkeypatch, tmp_path):
    def missing(*_):
        raise MissingExtraError("onnx", "export", "exporting")

    monkeypatch.setattr(export_cases, "_exported", missing)
    threads, out = torch.get_num_threads(), tmp_path / "forms.csv"
    options = {"device": "cpu", "compiled": False, "threads": threads, "repeats": 1, "progress": False}
    export_cases.run(preset=preset, batch=2, out=out, **options)
    eager, compiled, runtime = csv_rows(out, export_cases.COLUMNS)
    assert (eager["case"], eager["variant"]) == ("export published (untrained)", "PyTorch eager")
    assert float(eager["median_ms"]) > 0
    assert eager["settings"].startswith("2 mixtures of 2 sources, 0.74 s")
    assert compiled["note"] == "skipped: left out (--no-compile)"
    assert runtime["note"].startswith("skipped: ")
    assert "onnx" in runtime["note"]
    with pytest.raises(ConfigError, match="unknown device 'tpu'"):
        export_cases.run(preset=preset, **{**options, "device": "tpu"})


def refusals(found, tmp_path, capsys):
    """Run cases of which some must be refused; returns the message and the rows that were kept."""
    with pytest.raises(CheckFailed) as caught:
        run_cases(found, repeats=1, out=tmp_path / "results.csv", progress=False)
    shown = capsys.readouterr().out
    kept = csv_rows(tmp_path / "results.csv", COLUMNS) if (tmp_path / "results.csv").exists() else []
    for case in {r["case"] for r in kept}:
        assert case in shown
    assert shown.count("median ms") == len({r["case"] for r in kept})
    return str(caught.value), kept


def test_another_loss_gets_no_speed(preset, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cases, "ContAVSep", lambda: ContAVSep(weight_class=0.301))
    message, kept = refusals(cases.train_cases(preset, batch=2, classes=4), tmp_path, capsys)
    assert "no speed is given for 'train step': loss terms differ by 0.0033, which is more than 0.0001" in message
    assert {r["case"] for r in kept} == {"unet"}  # the other case is measured all the same


def test_other_gradients_get_no_speed(preset, monkeypatch, tmp_path, capsys):
    """The forward pass is right, and one gradient is missing."""
    whole = convolution.folded_kernel
    monkeypatch.setattr(convolution, "folded_kernel", lambda w: whole(w.detach() if w.shape[0] == 4 else w))
    message, kept = refusals(cases.train_cases(preset, batch=2, classes=4), tmp_path, capsys)
    assert "'train step': gradients differ" in message
    assert "'unet': gradients differ" in message
    assert not kept


def test_other_scores_get_no_speed(monkeypatch, tmp_path, capsys):
    pytest.importorskip("mir_eval.separation")
    right = cases.bss_eval

    def wrong(references, estimates):
        result = right(references, estimates)
        result.sar[0, 1] += 0.002
        return result

    monkeypatch.setattr(cases, "bss_eval", wrong)
    message, kept = refusals(cases.metrics_cases(batch=1, length=4096), tmp_path, capsys)
    assert "differ by 0.002, which is more than 0.001" in message
    assert not kept


def test_other_batches_get_no_speed(tone_store, monkeypatch, tmp_path, capsys):
    store = Store.open(tone_store)
    right = cases._WholeFileStore.read_visual
    monkeypatch.setattr(
        cases._WholeFileStore, "read_visual", lambda *a, **k: right(*a, **{**k, "centre_s": k["centre_s"] + 0.25})
    )
    found = cases.data_cases(
        store, batch=2, mixtures=8, workers=[0], front_end=FrontEndSpec(clip_samples=TINY_FRONT_END["clip_samples"])
    )
    assert "batches differ" in refusals(found, tmp_path, capsys)[0]


def test_agree():
    assert agree("sums", 0.1, 0.1) == "sums within 0.1 (tolerance 0.1)"
    for error in (0.2, float("nan"), float("inf")):
        with pytest.raises(CheckFailed, match="sums differ by"):
            agree("sums", error, 0.1)


def test_a_missing_or_infinite_gradient_is_an_error():
    expected = {"a": torch.ones(3), "b": torch.ones(3)}
    assert cases._gradient_error({"a": torch.ones(3), "b": torch.ones(3)}, expected) == 0
    assert cases._gradient_error({"a": torch.ones(3), "b": None}, expected) > 0.9
    assert cases._gradient_error({"a": torch.full((3,), float("nan")), "b": torch.ones(3)}, expected) == np.inf


def test_variants_take_turns():
    called = []
    variants = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    timings = interleaved(variants, 3)
    assert called == ["a", "b"] * 3
    assert all(len(t.times_s) == 3 for t in timings.values())
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        interleaved(variants, 0)


def test_statistics(monkeypatch):
    timing = Timing(tuple(n / 1000 for n in (5, 1, 3, 2, 4, 6)))
    assert timing.median_ms == pytest.approx(3.5)
    assert (timing.percentile_ms(20), timing.percentile_ms(80)) == (pytest.approx(2), pytest.approx(5))
    clock = itertools.cycle([0.0, 2.0, 2.0, 2.5])  # way 0 takes 2 s, way 1 half a second
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    first, second = measure.measure_case(simple_case(), 3)
    assert (first["median_ms"], second["median_ms"]) == (2000, 500)
    assert (first["ratio"], second["ratio"]) == (1, 4)
    assert (first["per_second"], second["per_second"]) == (1.5, 6)  # three things a call


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory():
    held = np.ones(10_000_000)  # 80 MB that were there before
    found = peak_memory_bytes(lambda: np.ones(5_000_000).sum())
    del held
    assert found is not None
    assert 36e6 < found < 60e6


def test_memory_sources_are_as_many_as_on_average():
    found = cases.memory_sources(4, 2, 0.328)
    assert found.tolist() == [[True, True], [True, False], [False, False], [False, False]]
    assert cases.memory_sources(32, 2, 0.599).sum() == 38
    assert cases.memory_sources(32, 2, 0.599).any(dim=1).sum() == 27
    assert cases.memory_sources(1, 2, 0.01).sum() == 1  # never a step without the teacher
    assert cases.memory_sources(3, 2, 1.0).all()


def test_a_file_of_another_kind_is_left_alone(preset, tmp_path, capsys, monkeypatch):
    other = tmp_path / "notes.csv"
    other.write_text("name,age\n")
    monkeypatch.setattr(cases, "train_cases", lambda *_, **__: pytest.fail("measured"))
    assert bench("train", "--preset", preset, "--out", other) == 2
    assert "is not a file of benchmark results" in capsys.readouterr().err
    assert other.read_text() == "name,age\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--preset", "iquery_small"), "has the object_encoder frame_cnn, but the published network"),
        (("train", "--preset", "iqueri"), "did you mean 'iquery'"),
        (("train", "--memory-share", 0), "memory share 0.0 is not between 0 and 1"),
        (("train", "--device", "tpu"), "unknown device 'tpu'"),
        (("data", "--mixtures", 2, "--batch", 8), "2 mixtures cannot be read in batches of 8"),
        (("data", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "benchmarks-results.csv").exists()


def test_missing_extras_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mir_eval", None)
    with pytest.raises(MissingExtraError, match=r'mir_eval.*pip install "avsep\[dev\]"'):
        next(cases.metrics_cases())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = [simple_case()]
    out = tmp_path / "results.csv"
    with pytest.raises(MissingExtraError, match=r'matplotlib.*pip install "avsep\[report\]"'):
        run_cases(found, repeats=1, out=out, plot=tmp_path / "plot.png", progress=False)
    assert not out.exists()
    assert len(run_cases(found, repeats=1, out=out, progress=False)) == 2  # without a plot it is not needed
