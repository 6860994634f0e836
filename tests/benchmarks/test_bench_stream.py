"""``avsep bench stream``: a row a stream, with its delay, what a block takes, and where it was measured."""

from __future__ import annotations

import csv

import pytest
import yaml

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from avsep.benchmarks.streams import COLUMNS, run, table
from avsep.cli import main
from avsep.errors import ConfigError
from avsep.export import export
from support.causal import causal_separator
from support.tones import bundle_separator


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """One that goes frame by frame, and one of chunks."""
    folder = tmp_path_factory.mktemp("streams")
    export(causal_separator(), None, folder / "causal")
    export(causal_separator(decoder={"causal": False}), None, folder / "chunks")
    export(bundle_separator().eval(), None, folder / "seeing")
    return folder


@pytest.mark.slow
def test_a_row_a_stream(bundles, tmp_path, capsys):
    out = tmp_path / "streams.csv"
    with pytest.raises(SystemExit) as stop:
        main(["bench", "stream", str(bundles / "causal"), str(bundles / "chunks"), "--seconds", "1", "--out", str(out)])
    assert not stop.value.code
    with open(out, encoding="utf-8", newline="") as file:
        causal, chunks = csv.DictReader(file)
    assert list(causal) == list(COLUMNS)
    assert (causal["way"], chunks["way"]) == ("frame by frame", "chunks")
    assert float(causal["delay_ms"]) == 16.0  # 128 samples at 8 kHz
    assert float(chunks["delay_ms"]) == 255.9  # a clip of 2,047
    assert (causal["block_samples"], chunks["block_samples"]) == ("32", "80")
    assert 240 <= int(causal["computed_blocks"]) <= 250
    assert 3 <= int(chunks["computed_blocks"]) <= 6
    for row in (causal, chunks):
        assert 0 < float(row["computing_ms"]) <= float(row["computing_p99_ms"])
        assert 0 < float(row["processor_ms"]) <= float(row["processor_p99_ms"])
        assert float(row["real_time_factor"]) > 0
        assert row["device"]
        assert row["check"].startswith("stream and whole within")
        assert ("shared" in row["note"]) == (float(row["load"] or 0) > 0.5 * _cores())
    text = out.with_suffix(".md").read_text()
    assert "| `causal`, 8000 Hz, 2 sources, frame by frame, fp32, 0.59 MB | 16 ms |" in text
    assert causal["device"] in text


def _cores():
    import os

    return os.cpu_count() or 1


def test_presets_are_exported_first(tmp_path):
    separator = causal_separator().spec.model_dump(mode="json")
    for name in ("num_classes", "classes"):
        separator.pop(name)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"summary": "x", "source": "tests", "separator": separator}))
    (row,) = run(presets=[str(tmp_path / "mine.yaml")], seconds=0.6, progress=False)
    assert row["stream"] == "mine (untrained)"
    assert "1 thread" in table([row])


def test_what_cannot_be_measured(bundles, tmp_path):
    with pytest.raises(ConfigError, match=r"0\.1 s are less than two chunks of chunks"):
        run([bundles / "chunks"], seconds=0.1, progress=False)
    with pytest.raises(ConfigError, match="seeing needs pictures of every source"):
        run([bundles / "seeing"], seconds=2, progress=False)
    with pytest.raises(ConfigError, match="seconds must be positive"):
        run([bundles / "causal"], seconds=0, progress=False)
    (tmp_path / "other.csv").write_text("a,b\n")
    with pytest.raises(ConfigError, match="not a file of benchmark results"):
        run([bundles / "causal"], out=tmp_path / "other.csv", progress=False)


def test_bench_export_points_here(bundles):
    from avsep.benchmarks.export_cases import run as run_export

    with pytest.raises(ConfigError, match="goes frame by frame: avsep bench stream measures it"):
        run_export(bundles / "causal", progress=False)
    with pytest.raises(ConfigError, match="goes frame by frame: avsep bench stream measures it"):
        run_export(None, preset="causal_small", progress=False)
