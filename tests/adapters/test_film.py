"""FiLM adapters: how many vectors, what a new task starts from, what is routed, and what is forgotten: nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from avsep import build_separator
from avsep.registry import ADAPTERS
from avsep.separator import load_separator
from support.components import random_batch
from support.continual_runs import SEPARATORS, differing, resume_killed, trained, weights

BASES = ["iquery", "coseparation", "sound_of_pixels"]


def _built(base, names="ab"):
    separator = build_separator(**SEPARATORS[base], adapter="film", classes=tuple(names), seed=3).eval()
    with torch.no_grad():  # not all scales 1 and shifts 0
        for name, parameter in separator.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter, generator=torch.Generator().manual_seed(len(name))))
    return separator


@torch.no_grad()
def _logits(separator, class_ids):
    return separator.predict(replace(random_batch(separator), class_ids=torch.tensor(class_ids))).output.logits


def test_the_number_of_parameters_at_the_published_size():
    with torch.device("meta"):
        separator = build_separator("iquery", num_classes=5)
        places = [p for p in separator.audio_encoder.adapter_places() if p.kind == "affine"]
        adapter = ADAPTERS.create("film", places=places)
        adapter.add_task(torch.empty(0))
        assert sum(p.numel() for p in adapter.newest()) == 7810  # 31,240 bytes a task


@pytest.mark.parametrize("base", BASES)
def test_a_new_task_starts_from_the_first_and_is_routed(base):
    separator = _built(base)
    before = _logits(separator, [[0, 1], [1, 0]])
    separator.grow(4, tuple("abcd"))
    assert len(separator.adapters()) == 2
    assert torch.equal(before, _logits(separator, [[0, 1], [1, 0]]))
    mixed = [[0, 2], [3, 1]]
    start = _logits(separator, mixed)
    if not separator.mask_decoder.query_parameter:
        assert torch.equal(before[[0, 1], [0, 1]], start[[0, 1], [0, 1]])
        assert torch.equal(start, _logits(separator, [[0, 0], [0, 0]]))  # class-agnostic, and still the first's
    with torch.no_grad():
        for adapter in separator.adapters():
            for parameter in adapter.newest():
                parameter.normal_(0, 0.3)
    after = _logits(separator, mixed)
    for old, new in (((0, 0), (0, 1)), ((1, 1), (1, 0))):
        assert torch.equal(after[old], start[old])
        assert not torch.equal(after[new], start[new])
    torch.testing.assert_close(_logits(separator.merged(), mixed), after, rtol=1e-5, atol=1e-5)


def test_it_is_the_first_tasks_vector_and_its_own():
    separator = _built("sound_of_pixels")
    separator.grow(3, tuple("abc"))
    adapter = separator.mask_decoder.adapter
    assert {p.parameter for p in adapter.places} == {"scale", "bias"}
    with torch.no_grad():
        adapter.tasks[0]["scale"].fill_(0.5)
    own = {name: separator.mask_decoder.decoder.get_parameter(name) for name in ("scale", "bias")}
    found = adapter.weights(adapter.tasks[0], own)
    assert torch.equal(found["scale"], own["scale"] + 0.5)
    assert torch.equal(found["bias"], own["bias"])


@pytest.mark.parametrize(
    "base",
    [
        pytest.param("iquery_film", marks=pytest.mark.slow),
        "sound_of_pixels_film",
        pytest.param("coseparation_film", marks=pytest.mark.slow),
    ],
)
def test_with_task_adapters_nothing_is_forgotten_and_a_kill_changes_nothing(base, tone_store):
    run = trained(tone_store, "task_adapters", separator=base)
    before, after = (load_separator(run, task=task) for task in (0, 1))
    batch = random_batch(after)
    old = replace(batch, class_ids=torch.tensor([[0, 1], [1, 0]]))
    with torch.no_grad():
        expected = before.predict(old).output.logits
        assert torch.equal(after.predict(old).output.logits, expected)
        mixed = after.predict(replace(batch, class_ids=torch.tensor([[0, 2], [1, 3]]))).output.logits
    assert torch.equal(mixed[:, 0], expected[:, 0])
    vectors = [name for name in weights(run) if ".adapter.tasks." in name]
    assert {name.partition(".")[0] for name in vectors} == {"audio_encoder", "mask_decoder"}
    assert all(weights(run)[name].any() for name in vectors)
    resumed = resume_killed(tone_store, run, "task_adapters", separator=base)
    assert differing(weights(run), weights(resumed)) == []
