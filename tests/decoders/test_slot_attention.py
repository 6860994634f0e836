"""Which queries of the query transformer see which: what growth changes, and what has no gradient."""

from __future__ import annotations

import pytest
import torch

from avsep.decoders import QueryTransformer
from avsep.errors import ConfigError
from avsep.separator import build_from_spec, build_separator, load_separator, save_separator
from avsep.spec import SeparatorSpec, validated
from avsep.types import AudioFeatures, VisualFeatures
from support.components import FRONT_END, random_batch

SIZES = {"mask_channels": 3, "latent_channels": 12, "object_dim": 7, "dim": 16, "heads": 2, "feedforward": 24}


def decoder_of(slot_attention, num_classes=4, motion_dim=5, **params):
    torch.manual_seed(0)
    made = QueryTransformer(
        num_classes=num_classes, motion_dim=motion_dim, slot_attention=slot_attention, **{**SIZES, **params}
    )
    return made.double()


def inputs(motion=True, classes=4):
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    audio = AudioFeatures(noise(2, 3, 8, 6), noise(2, 12, 2, 3))
    visual = VisualFeatures(noise(2, 2, 7), noise(2, 2, 5, 4) if motion else None)
    return audio, visual, torch.randint(0, classes, (2, 2), generator=generator)


def change_by_growth(slot_attention, dtype=torch.float64, **params):
    """The largest change of old logits, relative to their mean magnitude, from 4 to 6 and from 6 to 9 classes."""
    decoder = decoder_of(slot_attention, **params).to(dtype)
    audio, visual, class_ids = inputs(motion=params.get("motion_dim", 5) is not None)
    audio = AudioFeatures(audio.mask_features.to(dtype), audio.latent.to(dtype))
    visual = VisualFeatures(
        visual.object.to(dtype), None if visual.motion is None else visual.motion.to(dtype), visual.motion_mask
    )
    found = []
    with torch.no_grad():
        before = decoder(audio, visual, class_ids).logits
        for classes in (6, 9):
            decoder.grow(classes)
            after = decoder(audio, visual, class_ids).logits
            found.append(float((after - before).abs().max() / before.abs().mean()))
    return found


@pytest.mark.parametrize("motion_dim", [5, None])
def test_new_queries_change_old_masks_as_released_and_else_not(motion_dim):
    assert min(change_by_growth("released", motion_dim=motion_dim)) > 0.01
    assert max(change_by_growth("causal", motion_dim=motion_dim)) < 1e-13
    assert max(change_by_growth("causal", torch.float32, motion_dim=motion_dim)) < 1.5e-5
    assert change_by_growth("self", torch.float32, motion_dim=motion_dim) == [0, 0]


def test_causal_is_as_released_within_the_first_task():
    audio, visual, class_ids = inputs()
    released, causal = (decoder_of(kind) for kind in ("released", "causal"))
    assert released.state_dict().keys() == causal.state_dict().keys()
    assert torch.equal(released(audio, visual, class_ids).logits, causal(audio, visual, class_ids).logits)


def sees(decoder, class_id):
    """The query rows that the mask of a class depends on."""
    audio, visual, class_ids = inputs()
    logits = decoder(audio, visual, torch.full_like(class_ids, class_id)).logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), decoder.class_queries)
    return [row for row, value in enumerate(gradient) if value.abs().max() > 0]


@pytest.mark.parametrize("layers", [2, 3])
def test_which_queries_a_class_sees(layers):
    decoders = {kind: decoder_of(kind, num_classes=2, layers=layers) for kind in ("released", "causal", "self")}
    for decoder in decoders.values():
        decoder.grow(3)
        decoder.grow(3)  # nothing is added, and no task
        decoder.grow(5)
    assert [sees(decoders["released"], c) for c in range(5)] == [[0, 1, 2, 3, 4]] * 5
    assert [sees(decoders["causal"], c) for c in range(5)] == [
        [0, 1],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4],
    ]
    assert [sees(decoders["self"], c) for c in range(5)] == [[0], [1], [2], [3], [4]]


def test_self_is_a_query_alone_and_its_query_and_key_weights_have_no_gradient():
    audio, visual, _ = inputs()
    together, alone = decoder_of("self"), decoder_of("released")
    class_ids = torch.full((2, 2), 2)
    found = together(audio, visual, class_ids)
    alone.class_queries = torch.nn.Parameter(alone.class_queries[2:3])
    expected = alone(audio, visual, class_ids * 0)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.motion, expected.motion, rtol=1e-12, atol=1e-12)
    found.logits.square().sum().backward()
    for name, parameter in together.named_parameters():
        parts = (parameter,)
        if name.startswith("layers.") and ".self_attention.in_" in name:
            dead, live = parameter.grad[: 2 * 16], parameter.grad[2 * 16 :]
            assert (dead == 0).all(), name
            parts = (live,)
        else:
            parts = (parameter.grad,)
        assert all(part.abs().max() > 0 for part in parts), name


def test_self_also_gives_its_motion_attention():
    _, visual, class_ids = inputs()
    released, alone = (decoder_of(kind).motion_attention(visual, class_ids) for kind in ("released", "self"))
    assert torch.equal(released, alone)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="slot_attention must be one of released, causal, self, got 'none'"):
        decoder_of("none")


# --------------------------------------------------------------------------------------------------- as part of a whole


def separator_of(slot_attention="causal", classes=("a", "b"), **parts):
    decoder = {"dim": 16, "heads": 2, "feedforward": 16, "layers": 2, "slot_attention": slot_attention}
    return build_separator(
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 4}),
        object_encoder=("precomputed", {"features": "clip", "dim": 8}),
        mask_decoder=("query_transformer", decoder),
        classes=classes,
        front_end=FRONT_END,
        seed=0,
        **parts,
    ).eval()


def logits_of(separator, ids=((0, 1), (1, 0))):
    batch = random_batch(separator)
    with torch.no_grad():
        return separator.predict(batch, class_ids=torch.tensor(ids)).output.logits


@pytest.mark.parametrize("adapter", [None, ("low_rank", {"rank": 2})])
def test_the_tasks_of_classes_are_kept_in_the_spec(tmp_path, adapter):
    separator = separator_of(adapter=adapter)
    assert separator.spec.task_sizes == ()
    before = logits_of(separator)
    separator.grow(3, ("a", "b", "c"))
    separator.grow(5, tuple("abcde"))
    assert separator.spec.task_sizes == (2, 1, 2)
    separator = separator.eval()
    assert (logits_of(separator) - before).abs().max() < 1.5e-6
    save_separator(separator, tmp_path / "kept")
    loaded = load_separator(tmp_path / "kept")
    assert loaded.spec == separator.spec
    for each in (loaded, loaded.merged()):
        ids = ((0, 2), (4, 1))
        assert torch.equal(logits_of(each, ids), logits_of(separator, ids))
    loaded.grow(6, tuple("abcdef"))
    assert loaded.spec.task_sizes == (2, 1, 2, 1)
    inner = loaded.mask_decoder if adapter is None else loaded.mask_decoder.decoder
    assert inner.task_sizes == (2, 1, 2, 1)
    other = build_from_spec(loaded.spec.of_classes(("x", "y", "z")))
    assert (other.spec.task_sizes, other.mask_decoder.num_classes) == ((), 3)


def test_adapters_leave_dead_weights_alone():
    """At the published size 24,576 parameters of rank 8 fewer: (8 * (256 + 256)) for each of 2 maps in 3 layers."""
    counts = {}
    for kind in ("released", "self"):
        with torch.device("meta"):
            separator = build_separator(
                "iquery",
                mask_decoder=("query_transformer", {"slot_attention": kind}),
                adapter=("low_rank", {"rank": 8, "conv_rank": 0}),
                num_classes=5,
            )
            separator.grow(10)
        counts[kind] = sum(p.numel() for a in separator.adapters() for p in a.parameters())
    assert counts["released"] - counts["self"] == 3 * 2 * 8 * (256 + 256)
    assert counts["self"] == 233_728
    separator = separator_of("self", adapter=("low_rank", {"rank": 2}))
    separator.grow(3, ("a", "b", "c"))
    for adapter in separator.adapters():
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
    decoder, name = separator.mask_decoder, "layers.0.self_attention.in_weight"
    before, after = decoder.decoder.get_parameter(name), decoder._task_weights(1)[name]
    assert torch.equal(after[:32], before[:32])
    assert not torch.equal(after[32:], before[32:])


@pytest.mark.parametrize("kind", ["released", "self"])
def test_no_tasks_are_kept_where_they_make_no_difference(kind):
    separator = separator_of(kind)
    before = separator.state_dict().keys()
    separator.grow(3, ("a", "b", "c"))
    assert separator.spec.task_sizes == ()
    assert separator.state_dict().keys() == before == separator_of("causal").state_dict().keys()


def test_task_sizes_of_a_decoder_that_does_not_know_tasks_are_refused():
    data = {**separator_of("self").spec.model_dump(), "task_sizes": (1, 1)}
    with pytest.raises(ConfigError, match=r"task_sizes .* are of a separator with an adapter"):
        validated(SeparatorSpec, data, "test")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal", "self"])
def test_it_is_exported_with_several_tasks(kind, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from avsep.export import export

    separator = separator_of(kind)
    separator.grow(3, ("a", "b", "c"))
    bundle = export(separator.eval(), None, tmp_path / "bundle", made_from="a test")  # holds it against PyTorch
    assert {graph.kind for graph in bundle.graphs} == {"separator"}
