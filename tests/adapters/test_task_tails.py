"""Task tails: which weights a task has of its own, and where they begin."""

from __future__ import annotations

import pytest
import torch

from avsep.errors import ConfigError
from avsep.separator import build_separator, load_separator, save_separator
from support.components import random_batch
from support.continual_runs import SEPARATORS


def tailed(base="iquery", **params):
    adapter = ("task_tails", params)
    return build_separator(**{**SEPARATORS[base], "adapter": adapter}, classes=("a", "b"), seed=3).eval()


def logits(separator, ids):
    with torch.no_grad():
        return separator.predict(random_batch(separator), class_ids=torch.tensor(ids)).output.logits


def test_the_number_of_parameters_at_the_published_size():
    """Convolutions to 128, 64 and 32 channels from 512, 256 and 128, and the head 256-256-256-32."""
    with torch.device("meta"):
        separator = build_separator("iquery", adapter="task_tails", num_classes=5)
        separator.grow(10)
    count = sum(p.numel() for adapter in separator.adapters() for p in adapter.parameters())
    assert count == 9 * (512 * 128 + 256 * 64 + 128 * 32) + 2 * 256 * 256 + 256 * 32 == 913_408
    names = [place.parameter for adapter in separator.adapters() for place in adapter.places]
    assert sorted(names) == [
        "head.0.weight",
        "head.2.weight",
        "head.4.weight",
        "up.4.weight",
        "up.5.weight",
        "up.6.weight",
    ]


PROJECTED = {"contrast_embedding": "projected"}


@pytest.mark.parametrize(
    ("decoder", "tail"),
    [
        (("query_transformer", PROJECTED), ["head.0", "head.2", "head.4"]),
        (("query_transformer", {"time_varying": True}), [f"time_varying.{n}" for n in ("layers.0", "layers.1", "out")]),
        (("aligned_query", PROJECTED), ["head.layers.0", "head.layers.1", "head.out"]),
        ("tpavi", ["motion_proj", "out", "head"]),
        ("conditioned_unet", ["up.5.shared", "up.6.own", "up.6.shared"]),
        ("channel_synthesizer", ["object_proj"]),
    ],
)
def test_the_tail_is_what_makes_the_masks(decoder, tail):
    how = {"audio_encoder": "conv7", "motion_encoder": None} if decoder == "conditioned_unet" else {}
    how |= {"motion_encoder": None} if decoder == "channel_synthesizer" else {}
    with torch.device("meta"):
        separator = build_separator("iquery", mask_decoder=decoder, adapter="task_tails", num_classes=5, **how)
    places = separator.mask_decoder.adapter.places
    assert [place.parameter.removesuffix(".weight") for place in places] == tail


@pytest.mark.parametrize("base", ["iquery", "coseparation", "sound_of_pixels"])
def test_a_task_begins_as_the_first_and_has_its_own_tail(base, tmp_path):
    separator = tailed(base, layers=2)
    separator.grow(4, tuple("abcd"))
    inner = separator.mask_decoder.decoder
    if inner.query_parameter:
        with torch.no_grad():
            inner.get_parameter(inner.query_parameter)[2:] = inner.get_parameter(inner.query_parameter)[:2]
        inner.slot_attention = "self"  # no query sees another
    before = logits(separator, [[0, 1], [1, 0]])
    torch.testing.assert_close(logits(separator, [[2, 3], [3, 2]]), before)
    for adapter in separator.adapters():
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
    assert torch.equal(logits(separator, [[0, 1], [1, 0]]), before)
    changed = logits(separator, [[2, 3], [3, 2]])
    assert (changed - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(separator.merged(), [[2, 3], [3, 2]]), changed)
    if not inner.query_parameter:
        save_separator(separator, tmp_path / "kept")
        assert torch.equal(logits(load_separator(tmp_path / "kept"), [[2, 3], [3, 2]]), changed)


def test_without_the_audio_encoder():
    separator = tailed(audio_encoder=False)
    separator.grow(3, tuple("abc"))
    assert len(separator.adapters()) == 1
    with pytest.raises(ConfigError, match="layers must be at least 1, got 0"):
        tailed(layers=0)
