"""Every registered component, of every kind: it builds, learns, and is exported or refused with a reason.

A component that registers is covered without a line here, by the parameters that its registration names as an example
(:meth:`avsep.registry.Registry.register`). As in pytorch-image-models, a gradient is demanded of every parameter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from avsep.data.tasks import task_stream
from avsep.encoders.visual._pretrained import weights_come_later
from avsep.errors import AvsepError, ConfigError, MissingExtraError
from avsep.losses import separation_loss
from avsep.memory import NoMemory
from avsep.registry import AUDIO_ENCODERS, MASK_DECODERS, MEMORIES, MIXERS, REGISTRIES, STRATEGIES, VISUAL_ENCODERS
from avsep.separator import Separator, build_from_spec, build_separator, load_separator
from avsep.spec import RunSpec, validated
from avsep.training.learner import ContinualLearner
from avsep.types import Batch, MaskOutput, Prediction
from support.components import FRONT_END, fitting_spec, random_batch, small_ref
from support.continual_runs import SEPARATORS
from support.tones import COUNTS, TINY_FRONT_END, TINY_TASKS, TINY_TRAIN

# kind -> the parts of a separator that its components can be; of others, what tests them below
PARTS = {"audio_encoders": ("audio_encoder",), "mask_decoders": ("mask_decoder",), "adapters": ("adapter",)}
ROLES = {"visual_encoders": ("object", "motion")}
IN_RUNS = {"strategies", "memories", "mixers"}


def _parts() -> Iterator[tuple[str, str, str]]:
    """(kind, name, part of the separator)"""
    for kind, registry in REGISTRIES.items():
        for spec in registry:
            for part in PARTS.get(kind, ()):
                yield kind, spec.name, part
            for role in ROLES.get(kind, ()):
                if role in spec.provides:
                    yield kind, spec.name, f"{role}_encoder"


CASES = list(_parts())
# (kind, name, part) -> settings that make another network of a component, beside those of its example
VARIANTS = {
    ("audio_encoders", "causal_unet", "audio_encoder"): [{"causal": False, "kernel": 1}],
    ("mask_decoders", "aligned_query", "mask_decoder"): [{"causal": True}],
    ("mask_decoders", "query_transformer", "mask_decoder"): [
        {"slot_attention": "causal"},
        {"slot_attention": "self"},  # its dead query and key weights are rows of a parameter that has live ones
    ],
}


def variants() -> list[Any]:
    """(kind, name, part, settings): each component as its example has it, and its variants."""
    return [(*case, settings) for case in CASES for settings in ({}, *VARIANTS.get(case, []))]


def test_every_kind_is_covered():
    assert set(REGISTRIES) == {*PARTS, *ROLES, *IN_RUNS}, "say above how components of a new kind are built and tested"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The folder of small random weights of encoders with published ones."""
    return tmp_path_factory.mktemp("weights")


def build(kind, name, part, weights, **settings) -> Separator:
    torch.manual_seed(0)
    ref = small_ref(REGISTRIES[kind].get(name), weights)
    try:
        with weights_come_later():  # those that are not written below ``weights``
            return build_from_spec(fitting_spec(part, ref.model_copy(update={"params": {**ref.params, **settings}})))
    except MissingExtraError as error:
        pytest.skip(str(error))


def training_loss(separator: Separator, predicted: Prediction, class_ids: torch.Tensor) -> torch.Tensor:
    """As in training: masks, terms of the decoder's own, and a term that compares embeddings."""
    output = predicted.output
    terms = separator.mask_decoder.auxiliary_losses(output, predicted.spectrograms, class_ids)
    return separation_loss(output, predicted.spectrograms) + sum(terms.values()) + compared(output)


def partly_seen(separator: Separator, batch: Batch) -> Batch:
    """The batch with a source of which there is no picture, for decoders that have parameters for it."""
    if not separator.mask_decoder.takes_unseen:
        return batch
    seen = torch.ones_like(batch.is_memory)
    seen[0, 1] = False
    return replace(batch, visual=replace(batch.visual, seen=seen))


def compared(output: MaskOutput) -> torch.Tensor:
    others = [e for e in (output.object, output.motion) if e is not None] or [output.audio]
    return sum((output.audio * other).mean() for other in others)


def check_gradients(separator: Separator, predictions: int, learn: Any) -> None:
    """Every parameter gets a gradient that is finite and not 0 within a few steps, or belongs to a frozen encoder."""
    groups = separator.parameter_groups()
    trainable = {id(p) for group in groups.values() for p in group}
    largest = dict.fromkeys((name for name, _ in separator.named_parameters()), 0.0)
    for _ in range(predictions):
        learn()
        for name, parameter in separator.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all(), name
                largest[name] = max(largest[name], float(parameter.grad.abs().max()))
        if all(largest[name] > 0 for name, parameter in separator.named_parameters() if parameter.requires_grad):
            break
    encoders = (separator.audio_encoder, separator.object_encoder, separator.motion_encoder)
    frozen = {id(p) for encoder in encoders if encoder is not None and encoder.frozen for p in encoder.parameters()}
    for name, parameter in separator.named_parameters():
        assert (id(parameter) in trainable) == parameter.requires_grad == (id(parameter) not in frozen), name
        assert (largest[name] > 0) == parameter.requires_grad, name


@pytest.mark.parametrize(("kind", "name", "part", "settings"), variants())
def test_it_learns_in_every_parameter(kind, name, part, settings, weights):
    separator = build(kind, name, part, weights, **settings).train()
    batch = partly_seen(separator, random_batch(separator))
    before = {n: p.detach().clone() for n, p in separator.named_parameters()}
    optimizer = torch.optim.Adam([p for p in separator.parameters() if p.requires_grad], lr=1e-3)

    def learn() -> None:
        optimizer.zero_grad()
        predicted = separator.predict(batch)
        assert predicted.output.logits.shape == (2, 2, 128, 128)
        training_loss(separator, predicted, batch.class_ids).backward()
        optimizer.step()

    check_gradients(separator, 2, learn)
    for n, parameter in separator.named_parameters():
        assert parameter.isfinite().all(), n
        assert torch.equal(parameter, before[n]) != parameter.requires_grad, n
    assert separator.predict(batch).output.logits.isfinite().all()


@pytest.mark.slow  # a graph takes seconds; those of the small separators are made in the ordinary suite too
@pytest.mark.parametrize(("kind", "name", "part", "settings"), variants())
def test_it_is_exported_or_refused_with_a_reason(kind, name, part, settings, weights, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from avsep.export import export

    separator, reason, bundle = build(kind, name, part, weights, **settings).eval(), "", None
    try:
        bundle = export(separator, None, tmp_path / "bundle", made_from="a test")  # holds it against PyTorch
    except AvsepError as error:
        reason = str(error)
    if bundle is None:
        assert len(reason) > 20
        assert "\n" not in reason, reason
        assert not (tmp_path / "bundle").exists()
    else:
        computing = {s.role for s in separator.visual_sources() if s.kind == "frames"}
        main = "stream" if separator.causal else "separator"
        assert {main, *(f"{role}_encoder" for role in computing)} == {g.kind for g in bundle.graphs}


# ------------------------------------------------------------------------------------------------------ combinations


def combinations() -> list[tuple[str, tuple[str, str | None], str]]:
    """All but those with encoders whose weights come from a hub."""
    objects, motions = (
        [spec.name for spec in VISUAL_ENCODERS if role in spec.provides and spec.factory.hub is None]
        for role in ("object", "motion")
    )
    visual = itertools.product(objects, [*motions, None])
    return list(itertools.product(AUDIO_ENCODERS.names(), visual, MASK_DECODERS.names()))


def refusal(audio: str, motion_encoder: str | None, decoder_name: str) -> str | None:
    """What the composer should say of a combination that has an object encoder."""
    decoder = MASK_DECODERS.get(decoder_name)
    taken = {p.name for p in decoder.parameters}
    if motion_encoder is not None and "motion_dim" not in taken:
        return "makes no use of motion features: leave the motion_encoder out"
    if "object_dim" not in taken:
        return "makes no use of object features: leave the object_encoder out"
    missing = decoder.needs - {"object"} - AUDIO_ENCODERS.get(audio).provides
    return f"'{decoder_name}' needs .*: choose an audio encoder that gives" if missing else None


@pytest.mark.parametrize(("audio", "visual", "decoder"), combinations())
def test_every_combination_learns_in_every_trainable_parameter_or_is_refused(audio, visual, decoder):
    object_encoder, motion_encoder = visual
    names = {
        "audio_encoder": (AUDIO_ENCODERS, audio),
        "object_encoder": (VISUAL_ENCODERS, object_encoder),
        "motion_encoder": (VISUAL_ENCODERS, motion_encoder),
        "mask_decoder": (MASK_DECODERS, decoder),
    }
    refs = {part: None if name is None else small_ref(registry.get(name)) for part, (registry, name) in names.items()}
    if (reason := refusal(audio, motion_encoder, decoder)) is not None:
        with pytest.raises(ConfigError, match=reason):
            build_separator(num_classes=3, **refs, front_end=FRONT_END)
        return
    torch.manual_seed(0)
    try:
        separator = build_separator(num_classes=3, **refs, front_end=FRONT_END).train()
    except MissingExtraError as error:
        pytest.skip(str(error))
    batch = partly_seen(separator, random_batch(separator))

    optimizer = torch.optim.SGD([p for p in separator.parameters() if p.requires_grad], lr=1e-3)

    def learn() -> None:
        optimizer.zero_grad()
        output = (predicted := separator.predict(batch)).output
        assert output.logits.shape == (2, 2, 128, 128)
        assert output.audio.shape == output.object.shape  # CrossSDC compares them
        training_loss(separator, predicted, batch.class_ids).backward()
        optimizer.step()

    check_gradients(separator, 2, learn)  # what begins at zero lets gradients through from the second step on


# -------------------------------------------------------------------------------------- strategies, memories, mixers


def two_tasks(store, out, strategy, memory, **train) -> ContinualLearner:
    """Learn both tiny tasks, two steps each, with the first separator that the strategy takes."""
    reasons = {}
    for name, separator in SEPARATORS.items():
        data = {
            "separator": separator,
            "strategy": strategy,
            "memory": memory,
            "train": {**TINY_TRAIN, "epochs": 1, "steps_per_epoch": 2, "validation_pairs": 1, **train},
            "tasks": TINY_TASKS,
        }
        learner = ContinualLearner.from_spec(validated(RunSpec, data, "test"), accelerator="cpu", loggers=())
        try:
            learner.strategy.check(learner.separator)
        except ConfigError as error:
            reasons[name] = str(error)
            continue
        learner.fit(task_stream(store, TINY_TASKS, clip_samples=TINY_FRONT_END["clip_samples"]), out, progress=False)
        return learner
    raise AssertionError(f"no separator can be trained by {strategy}: {reasons}")


@pytest.mark.parametrize("name", STRATEGIES.names())
def test_a_strategy_learns_two_tasks(name, tone_store, tmp_path):
    spec = STRATEGIES.get(name)
    memory = "random_per_class" if spec.factory.needs_memory else "none"
    learner = two_tasks(tone_store, tmp_path / "run", small_ref(spec), memory)
    old, new = (load_separator(tmp_path / "run", task=task) for task in (0, 1))
    assert new.classes == tuple(itertools.chain(*TINY_TASKS))
    before = dict(old.named_parameters())
    learned = {name for name, p in learner.separator.named_parameters() if p.requires_grad}
    assert learned
    for parameter, value in new.named_parameters():
        assert value.isfinite().all(), parameter
        if parameter in before and value.shape == before[parameter].shape:
            assert torch.equal(value, before[parameter]) == (parameter not in learned), parameter


@pytest.mark.parametrize("name", MEMORIES.names())
def test_a_memory_policy_keeps_clips_of_the_old_classes(name, tone_store, tmp_path):
    learner = two_tasks(tone_store, tmp_path / "run", "finetune", small_ref(MEMORIES.get(name)))
    assert set(learner.exemplars) <= set(itertools.chain(*TINY_TASKS))
    for class_name, kept in learner.exemplars.items():
        assert kept
        assert len(kept) <= COUNTS["train"]
        assert all(exemplar.id.startswith(f"{class_name}-train-") for exemplar in kept)
    assert bool(learner.exemplars) != isinstance(learner.memory, NoMemory)


@pytest.mark.parametrize("name", MIXERS.names())
def test_a_mixer_makes_mixtures_of_two_tasks(name, tone_store, tmp_path):
    learner = two_tasks(tone_store, tmp_path / "run", "finetune", "random_per_class", mixer=small_ref(MIXERS.get(name)))
    old, new = (load_separator(tmp_path / "run", task=task).state_dict() for task in (0, 1))
    assert not torch.equal(old["audio_encoder.down.0.weight"], new["audio_encoder.down.0.weight"])
    assert all(value.isfinite().all() for value in learner.separator.state_dict().values())
