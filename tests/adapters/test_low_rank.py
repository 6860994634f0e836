"""Adapters: which weights they change, by how many parameters, for which sources, and what stays as it was."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from avsep.encoders.base import weight_places
from avsep.errors import ConfigError
from avsep.registry import ADAPTERS
from avsep.separator import build_from_spec, build_separator, load_separator, save_separator
from avsep.separator.module import Separator
from avsep.spec import SeparatorSpec, validated
from avsep.types import AdapterPlace
from support.components import random_batch
from support.continual_runs import SEPARATORS

SMALL = {"rank": 2, "conv_rank": 1}
BASES = [
    ("iquery", False),
    ("iquery", True),
    ("coseparation", False),
    ("coseparation", True),
    ("sound_of_pixels", False),
    ("sound_of_pixels", True),
]


def adapted(base="iquery", audio_encoder=False, classes=("a", "b"), **params) -> Separator:
    torch.manual_seed(0)
    adapter = ("low_rank", {**SMALL, "audio_encoder": audio_encoder, **params})
    return build_separator(**SEPARATORS[base], adapter=adapter, classes=classes, seed=3).eval()


def grown(*sizes: int, **how) -> Separator:
    """A separator whose every factor is something, after tasks of so many classes."""
    separator = adapted(classes=tuple("abcdefgh"[: sizes[0]]), **how)
    for k in range(1, len(sizes)):
        separator.grow(sum(sizes[: k + 1]), tuple("abcdefgh"[: sum(sizes[: k + 1])]))
    for adapter in separator.adapters():
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
    return separator


@torch.no_grad()
def logits(separator, class_ids) -> torch.Tensor:
    """Of always the same mixtures and frames."""
    return separator.predict(replace(random_batch(separator), class_ids=torch.tensor(class_ids))).output.logits


# ------------------------------------------------------------------------------------------------------- the arithmetic


def test_the_number_of_parameters_at_the_published_size():
    """rank (rows + columns) for each linear map: of iQuery's transformer 233,728, and 24,576 of the queries and keys of
    the three attentions among queries; with conv_rank=4 the U-Net's convolutions have 306,368."""

    def count(component, **params):
        adapter = ADAPTERS.create("low_rank", params, places=component.adapter_places())
        adapter.add_task(torch.empty(0))
        assert sum(1 for _ in adapter.newest()) == 2 * len(adapter.places)
        return sum(p.numel() for p in adapter.newest())

    with torch.device("meta"):
        separator = build_separator("iquery", num_classes=5)
        assert count(separator.mask_decoder) == 233_728 + 3 * 2 * 8 * (256 + 256)
        assert count(separator.audio_encoder, conv_rank=4) == 306_368
        assert count(separator.mask_decoder, rank=3) * 8 == count(separator.mask_decoder) * 3


LAYERS = {
    "linear": lambda: torch.nn.Linear(6, 5),
    "convolution": lambda: torch.nn.Conv2d(6, 5, 4, stride=2, padding=1),
    "transposed": lambda: torch.nn.ConvTranspose2d(6, 5, 4, stride=2, padding=1),
}


def through_factors(kind, x, down, up):
    """B (A x), the factors one after the other."""
    rank = len(down)
    if kind == "linear":
        return F.linear(F.linear(x, down), up)
    if kind == "convolution":
        x = F.conv2d(x, down.reshape(rank, 6, 4, 4), stride=2, padding=1)
    else:
        x = F.conv_transpose2d(x, down.reshape(rank, 6, 4, 4).transpose(0, 1), stride=2, padding=1)
    return F.conv2d(x, up[:, :, None, None])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_changed_weight_is_the_weight_and_the_factors_side_by_side(kind, dtype, tolerance):
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    (place,) = weight_places(layer, "layer")
    assert (place.kind, place.parameter, place.rows) == (kind, "layer.weight", 5)
    adapter = ADAPTERS.create("low_rank", {"rank": 3, "conv_rank": 3}, places=(place,))
    adapter.add_task(layer.weight)
    own = {"layer.weight": layer.weight}
    assert torch.equal(adapter.weights(adapter.tasks[0], own)["layer.weight"], layer.weight)
    down, up = (factors["layer/weight"] for factors in (adapter.tasks[0].down, adapter.tasks[0].up))
    assert down.shape == (1, 3, place.columns)
    assert down.abs().max() <= place.columns**-0.5
    torch.nn.init.normal_(up)
    x = torch.randn(4, 6, dtype=dtype) if kind == "linear" else torch.randn(2, 6, 8, 8, dtype=dtype)
    expected = layer(x) + through_factors(kind, x, down[0], up[0])
    with torch.no_grad():
        layer.weight.copy_(adapter.weights(adapter.tasks[0], own)["layer.weight"])
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(layer(x), expected, atol=tolerance * scale, rtol=0)


def test_packed_maps_have_factors_each():
    place = AdapterPlace("packed", (15, 4), maps=3)
    adapter = ADAPTERS.create("low_rank", {"rank": 2}, places=(place,))
    adapter.add_task(torch.zeros((), dtype=torch.float64))
    factors = adapter.tasks[0]
    torch.nn.init.normal_(factors.up["packed"])
    change = adapter.weights(factors, {"packed": torch.zeros(15, 4)})["packed"]
    for k in range(3):
        one = factors.up["packed"][k] @ factors.down["packed"][k]
        torch.testing.assert_close(change[5 * k : 5 * k + 5], one, rtol=1e-12, atol=1e-12)
        assert torch.linalg.matrix_rank(one) == 2
    assert torch.linalg.matrix_rank(change) > 2


# ---------------------------------------------------------------------------------------------------------- the routing


@pytest.mark.parametrize(("base", "audio_encoder"), BASES)
def test_the_first_task_and_a_new_one_are_the_components_own(base, audio_encoder):
    separator = adapted(base, audio_encoder)
    plain = build_separator(**SEPARATORS[base], classes=("a", "b"), seed=3).eval()
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in separator.parameters())
    before = logits(separator, [[0, 1], [1, 0]])
    assert torch.equal(before, logits(plain, [[0, 1], [1, 0]]))
    separator.grow(4, ("a", "b", "c", "d"))
    assert separator.spec.task_sizes == (2, 2)
    assert len(separator.adapters()) == 1 + audio_encoder
    assert torch.equal(before, logits(separator, [[0, 1], [1, 0]]))  # the new queries are hidden
    if not separator.mask_decoder.query_parameter:  # the up factors are 0: new classes start from the first task
        assert torch.equal(before, logits(separator, [[2, 3], [3, 2]]))


@pytest.mark.parametrize(("base", "audio_encoder"), BASES)
def test_only_sources_of_the_newest_task_learn_from_it(base, audio_encoder):
    """In one batch with new sources, to the last bit, and in batches of old ones alone."""
    separator = grown(2, 2, 2, base=base, audio_encoder=audio_encoder)
    mixed = [[0, 4], [5, 3]]
    before, old = logits(separator, mixed), logits(separator, [[0, 1], [2, 3]])
    separator.freeze()
    trained = [p for adapter in separator.adapters() for p in adapter.newest()]
    optimizer = torch.optim.SGD([p.requires_grad_(True) for p in trained], lr=1.0)
    batch = replace(random_batch(separator), class_ids=torch.tensor(mixed))
    separator.predict(batch).output.logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    optimizer.step()
    after = logits(separator, mixed)
    assert torch.equal(before[0, 0], after[0, 0])
    assert torch.equal(before[1, 1], after[1, 1])
    for new in ((0, 1), (1, 0)):
        assert not torch.equal(before[new], after[new])
    assert torch.equal(old, logits(separator, [[0, 1], [2, 3]]))


def test_what_was_learned_is_the_separator_that_a_task_left():
    """All that a source gets, after further tasks: equal, to the last bit, to the separator as its task left it."""
    separator = grown(2, 1)
    left = [logits(separator, [[0, 1], [1, 0]]), logits(separator, [[2, 0], [1, 2]])]
    for k, names in enumerate((tuple("abcd"), tuple("abcdefg"))):
        separator.grow(len(names), names)
        for parameter in (*separator.adapters()[0].newest(), separator.mask_decoder.decoder.class_queries):
            with torch.no_grad():
                old = 3 + k if parameter.shape[0] > 2 else 0
                parameter[old:] = torch.randn_like(parameter[old:])
        assert torch.equal(left[0], logits(separator, [[0, 1], [1, 0]]))
        assert torch.equal(left[1], logits(separator, [[2, 0], [1, 2]]))


def test_gradients_reach_both_factors_of_the_newest_task_alone():
    separator = adapted().train()
    separator.grow(3, ("a", "b", "c"))
    separator.grow(4, ("a", "b", "c", "d"))
    older, newest = separator.adapters()[0].tasks
    assert not any(p.requires_grad for p in older.parameters())
    batch = replace(random_batch(separator), class_ids=torch.tensor([[3, 3], [0, 3]]))
    optimizer = torch.optim.SGD(newest.parameters(), lr=0.1)
    for up_only in (True, False):
        optimizer.zero_grad()
        separator.predict(batch).output.logits.square().mean().backward()
        for name, parameter in newest.named_parameters():
            assert bool(parameter.grad.any()) == (not up_only or name.startswith("up.")), name
        optimizer.step()


def test_everything_that_a_decoder_gives_is_of_the_sources_own_task():
    separator = grown(2, 2)
    mixed = [[0, 2], [3, 1]]
    batch = replace(random_batch(separator), class_ids=torch.tensor(mixed))
    alone = [replace(batch, class_ids=torch.tensor(ids)) for ids in ([[0, 0], [1, 1]], [[2, 2], [3, 3]])]
    is_new = batch.class_ids >= 2
    with torch.no_grad():
        whole, old, new = (separator.predict(b) for b in (batch, *alone))
        attention = [
            separator.mask_decoder.motion_attention(prediction.visual, b.class_ids)
            for prediction, b in ((whole, batch), (old, alone[0]), (new, alone[1]))
        ]
    for name in ("logits", "audio", "object", "motion", "embedding"):
        found = getattr(whole.output, name)
        assert torch.equal(found[is_new], getattr(new.output, name)[is_new]), name
        assert torch.equal(found[~is_new], getattr(old.output, name)[~is_new]), name
        assert not torch.equal(found, getattr(old.output, name)), name
    assert torch.equal(attention[0][is_new], attention[2][is_new])
    assert torch.equal(attention[0][~is_new], attention[1][~is_new])
    assert not torch.equal(attention[0], attention[1])


@pytest.mark.parametrize(("base", "audio_encoder"), BASES)
def test_merged_weights_separate_alike(base, audio_encoder):
    separator = grown(2, 1, 1, base=base, audio_encoder=audio_encoder)
    merged = separator.merged()
    assert merged.adapters() == []
    for class_ids in ([[0, 3], [2, 1]], [[1, 0], [0, 0]], [[3, 2], [2, 2]]):
        torch.testing.assert_close(logits(separator, class_ids), logits(merged, class_ids), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("base", "audio_encoder"), [("iquery", False), ("coseparation", True)])
def test_the_exported_computation_separates_alike(base, audio_encoder):
    """Folded upsampling and normalisation are those of every task's weights."""
    from avsep.export.build.graph import WaveformSeparator

    separator = grown(2, 1, base=base, audio_encoder=audio_encoder)
    batch = replace(random_batch(separator), class_ids=torch.tensor([[0, 2], [2, 1]]))
    with torch.no_grad():
        visual = separator.encode_visual(batch.visual)
        expected = separator.separate(batch.mixture, visual, batch.class_ids)
        features = [part for part in (visual.object, visual.motion) if part is not None]
        found = WaveformSeparator(separator)(batch.mixture, *features, batch.class_ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------ specs and files


@pytest.mark.parametrize("audio_encoder", [False, True])
def test_save_and_load(tmp_path, audio_encoder):
    separator = grown(2, 1, audio_encoder=audio_encoder)
    save_separator(separator, tmp_path / "one")
    loaded = load_separator(tmp_path / "one")
    assert loaded.spec == separator.spec
    assert loaded.spec.task_sizes == (2, 1)
    assert torch.equal(logits(loaded, [[0, 2], [2, 1]]), logits(separator, [[0, 2], [2, 1]]))
    loaded.grow(5, tuple("abcde"))
    assert loaded.spec.task_sizes == (2, 1, 2)


def test_specs_without_adapter_are_the_text_that_they_were():
    spec = adapted().spec.model_copy(update={"adapter": None})
    data = json.loads(spec.model_dump_json())
    assert list(data) == [
        "audio_encoder",
        "mask_decoder",
        "object_encoder",
        "motion_encoder",
        "front_end",
        "num_classes",
        "classes",
    ]
    assert validated(SeparatorSpec, data, "saved") == spec
    assert spec.grown(3, ("a", "b", "c")).task_sizes == ()
    assert "task_sizes" not in adapted().spec.model_dump()


def test_a_task_is_a_growth_of_named_classes_or_of_bare_numbers():
    start = adapted().spec
    assert start.task_sizes == ()
    unnamed = start.model_copy(update={"classes": (), "num_classes": 1})
    named = unnamed.grown(3, ("a", "b", "c"))  # as a run begins: the first names are the first task's
    assert (named.task_sizes, named.num_classes) == ((), 3)
    assert named.grown(3, ("a", "b", "c")) == named
    assert named.grown(5, tuple("abcde")).task_sizes == (3, 2)
    assert unnamed.grown(3).grown(4).task_sizes == (1, 2, 1)
    assert named.grown(5, tuple("abcde")).of_classes(("x", "y")).task_sizes == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": None, "task_sizes": (1, 1)}, "task_sizes .* are of a separator with an adapter: add one"),
        ({"task_sizes": (2, 1)}, r"task_sizes \[2, 1\] do not sum up to num_classes = 2"),
        ({"task_sizes": (2, 0)}, "do not sum up"),
        ({"adapter": "low_rang"}, "no adapter named 'low_rang': did you mean 'low_rank'"),
        ({"adapter": ("low_rank", {"rank": -1})}, "adapter 'low_rank': rank and conv_rank must be 0 or more, got -1"),
        ({"adapter": ("low_rank", {"rank": 0, "conv_rank": 0})}, "leave nothing to adapt among .* weights: raise one"),
        ({"adapter": ("low_rank", {"places": 3})}, "adapter 'low_rank' has no parameter 'places'"),
    ],
)
def test_wrong_adapters_are_refused(change, message):
    data = {**adapted().spec.model_dump(), **change}
    with pytest.raises(ConfigError, match=message):
        build_from_spec(validated(SeparatorSpec, data, "test"))


def test_a_component_that_declares_no_place_is_named(monkeypatch):
    monkeypatch.setattr("avsep.decoders.QueryTransformer.adapter_places", lambda self: ())
    with pytest.raises(ConfigError, match="mask decoder 'query_transformer' declares no place for an adapter"):
        adapted()
