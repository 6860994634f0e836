"""Forward transfer: queries for classes that are not learned yet, and what a run knows of a task beforehand."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from avsep.data.class_means import mean_pictures
from avsep.data.protocol import Protocol
from avsep.data.store import Store
from avsep.errors import ConfigError
from avsep.evaluation import evaluate as module
from avsep.evaluation.comparison import Cell, compact_evaluation, compare
from avsep.evaluation.evaluate import evaluate_run, evaluate_separator
from avsep.evaluation.forward_transfer import forward_transfer, nearest_weights, with_unlearned
from avsep.files import read_json
from avsep.separator import build_separator, load_separator
from support.evaluations import FEW, cells
from support.tones import TINY_FRONT_END, TINY_TASKS


@pytest.fixture(scope="module")
def store(tone_store):
    return Store.open(tone_store)


def small(decoder, **params):
    return build_separator(
        classes=TINY_TASKS[0],
        seed=0,
        audio_encoder=("conv7" if decoder == "conditioned_unet" else "unet7", {"base_channels": 4}),
        object_encoder=("frame_cnn", {"dim": 8, "size": 16, "channels": 4}),
        mask_decoder=(decoder, params),
        front_end=TINY_FRONT_END,
    ).eval()


def test_weights_are_a_softmax_over_cosines():
    weights = nearest_weights(torch.tensor([[0.6, 0.8, 0.0]]), torch.eye(3))
    assert weights[0].tolist() == pytest.approx([0.0392, 0.9608, 2.7e-6], rel=0.02)
    scaled = nearest_weights(
        torch.tensor([[6.0, 8.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64), 3 * torch.eye(3).double()
    )
    exact = np.exp(16 * np.array([0.6, 0.8, 0.0]))
    torch.testing.assert_close(scaled[0], torch.from_numpy(exact / exact.sum()))
    assert scaled[1, 2] > 0.999


def test_queries_of_unlearned_classes_are_those_of_classes_that_look_alike(store):
    separator = small("query_transformer", dim=16, heads=2, feedforward=16, layers=1)
    before = torch.get_rng_state()
    made = with_unlearned(separator, store, TINY_TASKS[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert made.classes == (*TINY_TASKS[0], *TINY_TASKS[1])
    assert separator.num_classes == 2
    queries = made.mask_decoder.class_queries
    torch.testing.assert_close(queries[:2], separator.mask_decoder.class_queries)
    clips = {name: [(c, None) for c in store.select(classes=[name], split="train")] for name in made.classes}
    means = mean_pictures(made, store, clips)["object"].double()
    cosines = torch.nn.functional.cosine_similarity(means[2:, None], means[None, :2], dim=-1)
    shares = (16 * cosines).exp() / (16 * cosines).exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(queries[2:].double(), shares @ queries[:2].double(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(queries[2], queries[3])


@pytest.mark.parametrize("decoder", ["conditioned_unet", "channel_synthesizer"])
def test_a_decoder_that_goes_by_pictures_is_asked_as_it_is(store, tone_run, decoder):
    separator = small(decoder, **({"dim": 8} if decoder == "conditioned_unet" else {}))
    protocol = Protocol.load(tone_run / "protocol.json")
    rows = forward_transfer(separator, store, protocol, 1, task_of={"peep": 1, "whirr": 1})
    mixtures = protocol.within(1)
    assert [r["mixture"] for r in rows[::2]] == [protocol.at(1).index(m) for m in mixtures]
    assert {r["task"] for r in rows} == {1}
    separator.mask_decoder.num_classes = 4  # masks do not depend on it
    separator.spec = separator.spec.grown(4, (*TINY_TASKS[0], *TINY_TASKS[1]))
    expected = [s.sdri for m in evaluate_separator(separator, store, mixtures) for s in m.sources]
    assert [r["sdri"] for r in rows] == pytest.approx(expected, abs=1e-3)


def test_what_cannot_be_asked_is_refused(store):
    separator = small("query_transformer", dim=16, heads=2, feedforward=16, layers=1)
    separator.mask_decoder.query_parameter = ""
    with pytest.raises(ConfigError, match="'query_transformer' has weights of each class that are no queries"):
        with_unlearned(separator, store, TINY_TASKS[1])


def test_a_run_keeps_what_was_known_before(tone_run, tmp_path, monkeypatch):
    run = shutil.copytree(tone_run, tmp_path / "run")
    assert "forward_transfer" not in evaluate_run(run, yardsticks=False)
    result = evaluate_run(run, yardsticks=False, forward_transfer=True)
    assert read_json(run / "evaluation.json") == result
    assert list(result["forward_transfer"]) == ["1"]
    found = result["forward_transfer"]["1"]
    assert found["sdri"] == result["fwt"] == pytest.approx(np.mean([r["sdri"] for r in found["rows"]]))
    of_last = [r for r in result["after"][1]["rows"] if r["list"] == "task-1"]
    for before, after in zip(found["rows"], of_last, strict=True):
        assert [before[k] for k in ("mixture", "clip", "task")] == [after[k] for k in ("mixture", "clip", "task")]
        assert before["sdr_mixture"] == pytest.approx(after["sdr_mixture"], abs=1e-4)
    protocol = Protocol.load(run / "protocol.json")
    again = forward_transfer(load_separator(run, task=0), Store.open(_store(run)), protocol, 1)
    assert [r["sdri"] for r in again] == pytest.approx([r["sdri"] for r in found["rows"]], abs=1e-4)

    monkeypatch.setattr(module, "forward_transfer_rows", lambda *a, **k: pytest.fail("scored again"))
    assert evaluate_run(run, yardsticks=False, forward_transfer=True) == result
    assert evaluate_run(run, yardsticks=False) == result  # does not take it away
    runs = [Cell("m", 0, of) for of in (result, compact_evaluation(result))]
    values = [compare([one], resamples=FEW)["m"].values["fwt"] for one in runs]
    assert values[0].mean == pytest.approx(result["fwt"])
    assert (values[1].mean, values[1].per_seed) == (values[0].mean, values[0].per_seed)
    assert values[0].low < values[0].mean < values[0].high
    assert "fwt" not in compare(cells("m", [0]), resamples=FEW)["m"].values

    weights = run / "tasks" / "00" / "separator" / "class_means.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")  # another separator
    monkeypatch.setattr(module, "evaluate_separator", lambda *a, **k: [])
    monkeypatch.setattr(module, "_summaries", lambda rows: {"rows": []})
    assert "fwt" not in evaluate_run(run, yardsticks=False, tasks=[1])


def _store(run):
    from avsep.runs.folder import RunFolder

    return RunFolder(run).spec().store
