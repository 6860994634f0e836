"""What is compared: the library against the way it is usually done. Each function gives one :class:`Case` or several.

Cases are made one at a time (the functions are generators where they give several), so that the large ones do not hold
each other's memory.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from avsep.benchmarks.measure import Case, agree
from avsep.benchmarks.reference import (
    LiteralBatch,
    PublishedPredictor,
    PublishedSeparator,
    PublishedUNet,
    literal_training_step,
)
from avsep.data.mixing import Source, collate
from avsep.data.store import Clip, Store, StoreWriter
from avsep.encoders import UNet7
from avsep.environment import seeded, version_of
from avsep.errors import ConfigError, DataError, MissingExtraError
from avsep.evaluation.bss import BssResult, bss_eval
from avsep.media.timeline import VisualTimeline
from avsep.mixers.mixtures import TrainingMixtures
from avsep.registry import REGISTRIES
from avsep.separator import Separator, build_from_spec
from avsep.separator.convert import convert_published
from avsep.spec import ComponentRef, FrontEndSpec, OptimizerSpec, SeparatorSpec, TrainSpec, load_preset, validated
from avsep.strategies import ContAVSep, Step
from avsep.training.optim import make_optimizer
from avsep.types import Batch, Spectrograms, VisualInputs, VisualSource

__all__ = [
    "bf16_proposal",
    "data_cases",
    "memory_sources",
    "metrics_cases",
    "temporary_store",
    "train_cases",
    "unet_case",
]

LOSS_TOLERANCE = 1e-4
"""Relative, of every loss term."""

GRADIENT_TOLERANCE = 1e-2
"""Relative, of the gradient of every parameter; see :func:`_gradient_error`.

At the paper's size float32's rounding alone makes 3e-3 in the U-Net's first layers, through ReLUs that fall to the
other side of zero; in float64, at a small size, a test of the converter holds the two steps together to 1e-4.
"""

BF16_TOLERANCE = 0.2
"""Relative, under bf16, of every loss term, and in the L2 norm of all gradients together. Its 8 bits send many values
to the other side of a ReLU: an untrained small network's gradients differ by 0.1 from those in fp32."""

FORMS = ("bf16", "compiled")
"""Further ways to compute a training step: under autocast to bf16, and by torch.compile (the library's alone)."""

OUTPUT_TOLERANCE = 1e-3
"""Relative in the L2 norm, of the U-Net's outputs."""

SCORE_TOLERANCE_DB = 1e-3

MEMORY_SHARES = {10: 0.328, 15: 0.450, 20: 0.599}
"""Probability that a training source is an exemplar, by the number of classes seen: the published sampler with one
exemplar a class on MUSIC-21 (each current clip 40 times in the list, each exemplar 800 times)."""

_NEW_CLASSES = 5  # of a task, as published
_MOTION_STEPS = 8  # of the published motion features


# --- training ---------------------------------------------------------------------------------------------------------


def train_cases(
    preset: str = "iquery",
    *,
    batch: int = 4,
    classes: int = 10,
    memory_share: float | None = None,
    device: str = "cpu",
    forms: Sequence[str] = (),
) -> Iterator[Case]:
    """The training step of ContAV-Sep from its second task on, and the U-Net alone, against their published forms.

    Args:
        preset: a preset (name or YAML file) of the published kind: ``unet7``, two ``precomputed`` encoders,
            ``query_transformer``.
        batch: mixtures, of two sources each.
        classes: seen so far, the last five (half of them, if that is less) being new.
        memory_share: of the sources, exemplars of old classes; by default :data:`MEMORY_SHARES`.
        device: cpu or cuda.
        forms: of :data:`FORMS`; slow where a processor has no instructions for bf16, or nothing was compiled before.
    """
    yield _step_case(preset, batch, classes, memory_share, device, forms)
    yield unet_case(preset, batch, device)


def bf16_proposal(rows: Sequence[Mapping[str, Any]], instructions: str) -> str:
    """What a CPU's rows of a training step say of ``BF16_GAINS``, by which ``train.precision: auto`` chooses.

    Args:
        rows: of :func:`avsep.benchmarks.measure.measure_case`, this run's.
        instructions: the processor's (:func:`avsep.environment.bf16_instructions`).

    Returns:
        The line to add, or why there is none; empty where bf16 was not measured. A step that is faster in some repeats
        alone is no gain: 80 % of them with bf16 must be faster than 80 % without.
    """
    steps = {str(row["variant"]): row for row in rows if row["case"] == "train step"}
    if not {"avsep", "avsep, bf16"} <= steps.keys():
        return ""
    full, mixed = steps["avsep"], steps["avsep, bf16"]
    gain = float(full["median_ms"]) / float(mixed["median_ms"])
    said = f"a training step took {mixed['median_ms']:,.0f} ms in bf16 and {full['median_ms']:,.0f} in full precision"
    if not instructions:
        return f"no line for BF16_GAINS: this processor has no instructions for bf16 ({said})"
    if float(mixed["p80_ms"]) >= float(full["p20_ms"]):
        return f"no line for BF16_GAINS: with {instructions} {said}, which is no clear gain"
    return f"BF16_GAINS (avsep/training/setup.py) proposed by these rows:\n    {instructions!r}: {gain:.2f},"


@dataclass
class _Pair:
    """The published network and the library's, of equal sizes and weights."""

    literal: PublishedSeparator
    ours: Separator


def _published_sizes(preset: str) -> tuple[SeparatorSpec, dict[str, int]]:
    """The preset's spec, and the sizes that the published network takes. Raises ConfigError for another network."""
    spec = validated(SeparatorSpec, load_preset(preset)["separator"], preset)
    spec.check()
    kinds = {
        "audio_encoder": ("audio_encoders", "unet7"),
        "object_encoder": ("visual_encoders", "precomputed"),
        "motion_encoder": ("visual_encoders", "precomputed"),
        "mask_decoder": ("mask_decoders", "query_transformer"),
    }
    sizes: dict[str, dict[str, Any]] = {}
    for role, (registry, name) in kinds.items():
        ref: ComponentRef | None = getattr(spec, role)
        if ref is None or ref.name != name:
            raise ConfigError(
                f"preset '{preset}' has the {role} {ref.name if ref else 'none'}, but the published network, which "
                f"this compares with, has {name}: take the preset iquery, or one of its kind"
            )
        defaults = {p.name: p.default for p in REGISTRIES[registry].get(name).settings}
        sizes[role] = {**defaults, **ref.params}
    decoder, audio = sizes["mask_decoder"], sizes["audio_encoder"]
    if decoder["encoder_layers"] != 1 or decoder["dim"] != 4 * audio["base_channels"]:
        raise ConfigError(
            f"preset '{preset}' has {decoder['encoder_layers']} encoder layers of width {decoder['dim']}; the "
            f"published network has one, as wide as the latent ({4 * audio['base_channels']})"
        )
    return spec, {
        "base_channels": audio["base_channels"],
        "mask_channels": audio["mask_channels"],
        "object_dim": sizes["object_encoder"]["dim"],
        "motion_dim": sizes["motion_encoder"]["dim"],
        **{key: decoder[key] for key in ("dim", "heads", "feedforward", "layers")},
    }


def _published(sizes: dict[str, int], classes: int) -> PublishedSeparator:
    rest = {key: value for key, value in sizes.items() if key != "base_channels"}
    sound = PublishedUNet(sizes["base_channels"], sizes["mask_channels"])
    return PublishedSeparator(sound, PublishedPredictor(num_classes=classes, **rest))


def _pair(literal: PublishedSeparator, spec: SeparatorSpec, device: str) -> _Pair:
    classes = literal.predictor.query_embed.num_embeddings
    ours = build_from_spec(spec.model_copy(update={"num_classes": classes, "classes": ()}))
    state = _translated(literal)
    own = {name for name in ours.state_dict() if not name.startswith("front_end.")}
    assert own == state.keys(), sorted(own ^ state.keys())
    ours.load_state_dict(state, strict=False)
    return _Pair(literal.to(device), ours.to(device))


def _translated(literal: PublishedSeparator, *, gradients: bool = False) -> dict[str, Tensor]:
    """The published network's state, or its parameters' gradients, under the library's names (copies)."""

    def state(module: nn.Module) -> dict[str, Tensor]:
        found = {name: value.detach() for name, value in module.state_dict().items()}
        if gradients:
            for name, parameter in module.named_parameters():
                found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return found

    return {
        name: value.clone()
        for name, value in convert_published(state(literal.sound), state(literal.predictor)).state.items()
    }


def memory_sources(batch: int, sources: int, share: float) -> Tensor:
    """[B, N] bool: which sources are exemplars, when each is with probability ``share``.

    As many exemplars, in as many mixtures, as there are on average (rounded): the teacher's work depends on both.
    """
    exemplars = min(batch * sources, max(1, round(share * batch * sources)))
    mixtures = min(exemplars, max(math.ceil(exemplars / sources), round((1 - (1 - share) ** sources) * batch)))
    found = torch.zeros(batch, sources, dtype=torch.bool)
    for number in range(exemplars):  # one in each of the mixtures, then a second one, ...
        found[number % mixtures, number // mixtures] = True
    return found


def _step_case(
    preset: str, batch: int, classes: int, memory_share: float | None, device: str, forms: Sequence[str] = ()
) -> Case:
    if unknown := sorted(set(forms) - set(FORMS)):
        raise ConfigError(f"unknown form '{unknown[0]}' of a training step: {' or '.join(FORMS)}")
    if batch < 1 or classes < 2:
        raise ConfigError(f"a step after the first task needs a batch and two classes or more, got {batch}, {classes}")
    share = memory_share if memory_share is not None else MEMORY_SHARES.get(classes, MEMORY_SHARES[10])
    if not 0 < share <= 1:
        raise ConfigError(f"memory share {share} is not between 0 and 1")
    spec, sizes = _published_sizes(preset)
    old = classes - min(_NEW_CLASSES, classes // 2)
    sources = 2
    with seeded(0):
        literal_teacher = _published(sizes, old)
        student = _pair(literal_teacher.grown(classes), spec, device)
        teacher = _pair(literal_teacher, spec, device)
        literal, mixtures, spectrograms = _step_inputs(student.ours, batch, sources, old, classes, share, device)
    for module in (student.literal, student.ours):
        module.train()
    # As the library's default, so that both teachers say the same; the published one kept batch statistics.
    for module in (teacher.literal, teacher.ours):
        module.eval()
    teacher.ours.requires_grad_(False)  # the published teacher is not frozen: its gradients are thrown away afterwards

    train = validated(TrainSpec, load_preset(preset).get("train", {}), preset)
    literal_optimizers = [
        _literal_optimizer(train.audio, student.literal.sound.parameters()),
        _literal_optimizer(train.decoder, student.literal.predictor.parameters()),
    ]
    strategy = ContAVSep()
    compiled = student.ours
    if "compiled" in forms:
        compiled = copy.deepcopy(student.ours)  # before its sibling is trained
        compiled.audio_encoder.compile()
        compiled.mask_decoder.compile()

    def optimizers_of(separator: Separator) -> list[torch.optim.Optimizer]:
        groups = separator.parameter_groups()
        return [make_optimizer(groups["audio"], train.audio), make_optimizer(groups["decoder"], train.decoder)]

    def cast(bf16: bool) -> torch.autocast:
        return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)

    def run_literal(optimizers: Sequence[torch.optim.Optimizer], bf16: bool = False) -> dict[str, float]:
        with cast(bf16):
            terms = literal_training_step(student.literal, teacher.literal, literal, optimizers)
        return {
            "separation": terms["separation"],
            "instance": 0.1 * terms["instance"],
            "class": 0.3 * terms["class"],
            "mask": 0.3 * terms["distillation"],
        }

    def run_ours(
        separator: Separator, optimizers: Sequence[torch.optim.Optimizer], bf16: bool = False
    ) -> dict[str, float]:
        with cast(bf16):
            return _library_step(separator, teacher.ours, strategy, mixtures, spectrograms, old, optimizers)

    def check() -> str:
        theirs = run_literal(())  # gradients only
        expected = _translated(student.literal, gradients=True)
        said = []
        for separator, form in ((student.ours, ""), (student.ours, "bf16"), (compiled, "compiled")):
            if form and form not in forms:
                continue
            separator.zero_grad()
            mine = run_ours(separator, (), form == "bf16")
            if theirs.keys() != mine.keys():
                raise AssertionError(f"terms {sorted(theirs)} and {sorted(mine)}")
            found = {n: p.grad for n, p in separator.named_parameters()}
            losses = max(abs(mine[k] - theirs[k]) / max(abs(theirs[k]), 1e-6) for k in theirs)
            prefix = f"{form}: " if form else ""
            if form == "bf16":
                said.append(agree(f"{prefix}loss terms", losses, BF16_TOLERANCE))
                said.append(agree(f"{prefix}gradients", _whole_error(found, expected), BF16_TOLERANCE))
            else:
                said.append(agree(f"{prefix}loss terms", losses, LOSS_TOLERANCE))
                said.append(agree(f"{prefix}gradients", _gradient_error(found, expected), GRADIENT_TOLERANCE))
        for module in (student.literal, student.ours, compiled):
            module.zero_grad()
        return "; ".join(said)

    ours = optimizers_of(student.ours)
    variants = {"literal": lambda: run_literal(literal_optimizers), "avsep": lambda: run_ours(student.ours, ours)}
    if "bf16" in forms:
        variants["literal, bf16"] = lambda: run_literal(literal_optimizers, True)
        variants["avsep, bf16"] = lambda: run_ours(student.ours, ours, True)
    if "compiled" in forms:
        of_compiled = optimizers_of(compiled)
        variants["avsep, compiled"] = lambda: run_ours(compiled, of_compiled)

    return Case(
        name="train step",
        title="one ContAV-Sep training step from analysed mixtures on: forward, losses with the teacher, backward, "
        "optimisers",
        variants=variants,
        check=check,
        item="step",
        items=1,
        settings=f"{Path(preset).stem}, batch {batch}, {classes} classes, "
        f"{int(mixtures.is_memory.sum())} of {batch * sources} sources memory in "
        f"{int(mixtures.is_memory.any(dim=1).sum())} mixtures",
        device=device,
    )


def _step_inputs(
    ours: Separator, batch: int, sources: int, old: int, classes: int, share: float, device: str
) -> tuple[LiteralBatch, Batch, Spectrograms]:
    """The same mixtures of noise for both; new sources are of new classes, memory sources of old ones."""
    spec = ours.spec.front_end
    is_memory = memory_sources(batch, sources, share)
    class_ids = torch.where(
        is_memory, torch.randint(0, old, (batch, sources)), torch.randint(old, classes, (batch, sources))
    )
    # an exemplar is the one video of its class, other sources are of as many videos as there are sources
    video_ids = torch.where(is_memory, class_ids, classes + torch.arange(batch * sources).view(batch, sources))
    envelope = torch.rand(batch, sources, 1) * torch.linspace(0.2, 1, spec.clip_samples)
    audio = (0.1 * envelope * torch.randn(batch, sources, spec.clip_samples)).to(device)
    objects_width, motion_width = (s.dim for s in ours.visual_sources())
    objects = torch.randn(batch, sources, 3, objects_width, device=device)  # K = 3 frames
    motion = torch.randn(batch, sources, motion_width, _MOTION_STEPS, device=device)
    mixtures = Batch(
        sources=audio,
        class_ids=class_ids.to(device),
        video_ids=video_ids.to(device),
        is_memory=is_memory.to(device),
        visual=VisualInputs(objects, motion),
    )
    with torch.no_grad():
        analysed = ours.analyse(audio)
    literal = LiteralBatch(
        network_input=analysed.network_input,
        weight=analysed.weight,
        ratio=analysed.ratio,
        objects=objects.amax(dim=2),
        motion=motion,
        class_ids=mixtures.class_ids,
        video_ids=mixtures.video_ids,
        is_memory=mixtures.is_memory,
    )
    return literal, mixtures, analysed


def _library_step(
    student: Separator,
    teacher: Separator,
    strategy: ContAVSep,
    batch: Batch,
    spectrograms: Spectrograms,
    num_old: int,
    optimizers: Sequence[torch.optim.Optimizer],
) -> dict[str, float]:
    """What the learner does in a step once the mixtures are analysed; without optimisers the gradients stay."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    visual = student.encode_visual(batch.visual)
    audio = student.audio_encoder(spectrograms.network_input)
    output = student.mask_decoder(audio, visual, batch.class_ids)
    terms = strategy.loss(Step(batch, spectrograms, audio, visual, output, num_old, student, teacher))
    torch.stack(list(terms.values())).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return {name: term.item() for name, term in terms.items()}


def _literal_optimizer(spec: OptimizerSpec, parameters: Any) -> torch.optim.Optimizer:
    kind = torch.optim.Adam if spec.name == "adam" else torch.optim.AdamW
    return kind(parameters, lr=spec.lr, weight_decay=spec.weight_decay)


def _gradient_error(found: dict[str, Tensor | None], expected: dict[str, Tensor]) -> float:
    """The largest |g - g'| / (|g'| + |G'| / 1000) over parameters (L2 norms; G' all expected gradients together).

    The second part of the denominator is for gradients that are zero but for rounding, such as those of the keys'
    biases, which a softmax does not feel.
    """
    names = [name for name in found if name in expected]
    whole = torch.stack([torch.linalg.vector_norm(expected[n].double()) for n in names]).norm()
    worst = 0.0
    for name in names:
        gradient = found[name]
        if gradient is None:
            gradient = torch.zeros_like(expected[name])
        distance = torch.linalg.vector_norm(gradient.double() - expected[name].double())
        error = (distance / (torch.linalg.vector_norm(expected[name].double()) + whole / 1000)).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def _whole_error(found: dict[str, Tensor | None], expected: dict[str, Tensor]) -> float:
    """|G - G'| / |G'| of all gradients together."""
    pairs = [(g, expected[name]) for name, g in found.items() if g is not None and name in expected]
    error = torch.stack([torch.linalg.vector_norm(g.double() - e.double()) for g, e in pairs]).norm()
    size = torch.stack([torch.linalg.vector_norm(e.double()) for _, e in pairs]).norm()
    return float(error / size)


def unet_case(preset: str = "iquery", batch: int = 4, device: str = "cpu") -> Case:
    """The U-Net with and without identity 1, against its published form: forward and backward."""
    spec, sizes = _published_sizes(preset)
    with seeded(0):
        published = _published(sizes, 2)
        rows, frames = spec.front_end.log_rows, spec.front_end.frames
        x = torch.rand(batch, 1, rows, frames, device=device) * 2
        upstream = [
            torch.randn(batch, sizes["mask_channels"], rows, frames, device=device),
            torch.randn(batch, 4 * sizes["base_channels"], rows // 8, frames // 8, device=device),
        ]
    weights = {
        name.removeprefix("audio_encoder."): value
        for name, value in _translated(published).items()
        if name.startswith("audio_encoder.")
    }
    modules: dict[str, nn.Module] = {"literal": published.sound.to(device)}
    for name, fold in (("avsep", True), ("avsep, plain upsampling", False)):
        modules[name] = UNet7(
            base_channels=sizes["base_channels"], mask_channels=sizes["mask_channels"], fold_upsampling=fold
        )
        modules[name].load_state_dict(weights)
        modules[name].to(device)

    def step(module: nn.Module) -> list[Tensor]:
        module.zero_grad()
        found = module(x)
        outputs = list(found) if isinstance(found, tuple) else [found.mask_features, found.latent]
        torch.autograd.backward(outputs, upstream)
        return [o.detach() for o in outputs]

    def check() -> str:
        theirs = step(modules["literal"])
        expected = {
            name.removeprefix("audio_encoder."): value for name, value in _translated(published, gradients=True).items()
        }
        outputs, gradients = 0.0, 0.0
        for name in ("avsep", "avsep, plain upsampling"):
            mine = step(modules[name])
            outputs = max(outputs, *[_relative(m, t) for m, t in zip(mine, theirs, strict=True)])
            gradients = max(
                gradients, _gradient_error({n: p.grad for n, p in modules[name].named_parameters()}, expected)
            )
        for module in modules.values():
            module.zero_grad()
        return "; ".join(
            (agree("outputs", outputs, OUTPUT_TOLERANCE), agree("gradients", gradients, GRADIENT_TOLERANCE))
        )

    def timed(name: str) -> Callable[[], object]:
        return lambda: step(modules[name])

    return Case(
        name="unet",
        title="the U-Net alone, forward and backward",
        variants={name: timed(name) for name in modules},
        check=check,
        item="spectrogram",
        items=batch,
        settings=f"{Path(preset).stem}, batch {batch}",
        device=device,
    )


def _relative(found: Tensor, expected: Tensor) -> float:
    error = (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).item()
    return error if math.isfinite(error) else math.inf


# --- metrics ----------------------------------------------------------------------------------------------------------


def metrics_cases(*, batch: int = 4, sources: int = 2, length: int = 65280) -> Iterator[Case]:
    """SDR, SIR and SAR of a batch of mixtures, against mir_eval's and, where it is installed, fast_bss_eval's.

    Raises:
        MissingExtraError: mir_eval is not installed, or is a version without ``mir_eval.separation``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            from mir_eval import separation
    except ImportError:
        raise MissingExtraError("mir_eval below 0.9", "dev", "comparing the metrics") from None
    rng = np.random.default_rng(0)
    references = np.stack([_chords(rng, sources, length) for _ in range(batch)])
    estimates = references + 0.3 * np.roll(references, 1, axis=1) + 1e-3 * rng.standard_normal(references.shape)
    both = torch.from_numpy(references), torch.from_numpy(estimates)

    def baseline() -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # announces that version 0.9 removes it
            return np.stack(
                [
                    np.stack(separation.bss_eval_sources(r, e, compute_permutation=False)[:3])
                    for r, e in zip(references, estimates, strict=True)
                ]
            )  # [B, 3, N]

    def ours() -> BssResult:
        return bss_eval(*both)

    variants: dict[str, Callable[[], object]] = {"mir_eval": baseline}
    versions = {"mir_eval": version_of("mir_eval")}
    if importlib.util.find_spec("fast_bss_eval") is not None:
        import fast_bss_eval

        def fast() -> Tensor:
            """Its direct solution in float64 PyTorch; its few steps of conjugate gradients are less exact."""
            return torch.stack(fast_bss_eval.bss_eval_sources(*both, compute_permutation=False), dim=1)

        variants["fast_bss_eval"] = fast
        versions["fast_bss_eval"] = version_of("fast_bss_eval")

    def check() -> str:
        result = ours()
        found = torch.stack([result.sdr, result.sir, result.sar], dim=1)
        expected = [torch.from_numpy(baseline())]
        if "fast_bss_eval" in variants:
            expected.append(fast())
        error = max(float((found - others).abs().max()) for others in expected)
        return agree("SDR, SIR and SAR in dB", error, SCORE_TOLERANCE_DB)

    yield Case(
        name="metrics",
        title="SDR, SIR and SAR by BSS-eval with 512 taps",
        variants={**variants, "avsep": ours},
        check=check,
        item="mixture",
        items=batch,
        settings=f"batch {batch}, {sources} sources, {length} samples",
        versions=versions,
    )


def _chords(rng: np.random.Generator, sources: int, length: int, rate_hz: int = 11025) -> np.ndarray:
    """[N, L]: plucked tones with five harmonics over a floor of noise."""
    time_s = np.arange(length) / rate_hz
    notes = [
        sum(np.sin(2 * np.pi * pitch * h * time_s + rng.uniform(0, 6)) / h for h in range(1, 6))
        for pitch in rng.uniform(110, 880, sources)
    ]
    return np.stack(notes) * 0.1 * np.exp(-((time_s * 2) % 1) * 3) + 1e-4 * rng.standard_normal((sources, length))


# --- data -------------------------------------------------------------------------------------------------------------


def data_cases(
    store: Store,
    *,
    shards: Store | None = None,
    batch: int = 8,
    mixtures: int = 256,
    workers: Sequence[int] = (0, 2),
    front_end: FrontEndSpec | None = None,
) -> Iterator[Case]:
    """Training mixtures read from a store, and from the same in ``shards``, against reading every file of a clip whole
    in the training process and cutting it afterwards.

    All draw the same crops and make the same batches, in as many reader processes as ``workers`` say in turn (the
    first is the baseline's). ``front_end`` gives the crop's length (its rate is the store's).
    """
    front_end = front_end or FrontEndSpec(sample_rate_hz=store.sample_rate_hz)
    readers = {"whole files": _WholeFileStore(store.path, store.manifest), "store": store}
    if shards is not None:
        readers["shards"] = shards
    sets = {name: _mixtures_of(of, batch, mixtures, front_end) for name, of in readers.items()}
    data = sets["store"]
    kinds = " and ".join(f"{s.role} {s.kind}" for s in data.visual_sources)
    seconds = sum(c.samples for c in data.pool.clips) / len(data.pool.clips) / store.sample_rate_hz
    loaders = {
        name + (f", {count} worker{'s' * (count != 1)}" if count else ""): _loader(of, batch, count)
        for count in workers
        for name, of in sets.items()
    }
    yield Case(
        name="data",
        title="training mixtures read and collated; every file was read before, so it is in the system's cache",
        variants={name: _passer(loader) for name, loader in loaders.items()},
        check=_batches_check(loaders),
        item="source",
        items=len(data) * data.train.sources,
        in_process=max(workers) == 0,
        settings=f"batch {batch}, {len(data)} mixtures, audio, {kinds}, {len(data.pool.clips)} clips of {seconds:.1f} "
        f"s on average, crops of {front_end.clip_s:.1f} s",
    )


def _mixtures_of(store: Store, batch: int, mixtures: int, front_end: FrontEndSpec) -> TrainingMixtures:
    store.require_rate(front_end.sample_rate_hz)
    clips = store.select(split="train")
    if not clips:
        raise DataError(f"{store.path} has no training clips: give another store")
    if not 1 <= batch <= mixtures:
        raise ConfigError(f"{mixtures} mixtures cannot be read in batches of {batch}")
    steps = mixtures // batch
    train = TrainSpec(batch_size=batch, current_repeats=math.ceil(mixtures / len(clips)), steps_per_epoch=steps)
    numbers = {name: number for number, name in enumerate(store.classes)}
    return TrainingMixtures(store, clips, [], train, front_end, _visual_sources(store), numbers, task=0, epoch=0)


def _visual_sources(store: Store) -> list[VisualSource]:
    """Frames where the store has them, else its first features."""
    sources = []
    for role, frames in (("object", 3), ("motion", 0)):
        if store.manifest.get(f"{role}_shape"):
            sources.append(VisualSource(role=role, kind="frames", frames=frames))
            continue
        for name, record in store.features.items():
            if record["role"] == role:
                sources.append(VisualSource(role, "features", name=name, dim=record["dim"], frames=frames))
                break
    return sources


def _loader(data: TrainingMixtures, batch: int, workers: int) -> DataLoader[Any]:
    # the worker stays between passes, so that a pass does not count its start
    return DataLoader(data, batch_size=batch, collate_fn=_collate, num_workers=workers, persistent_workers=workers > 0)


def _collate(mixtures: Sequence[Sequence[Source]]) -> Batch:
    return collate(mixtures)


def _passer(loader: DataLoader[Any]) -> Callable[[], object]:
    def one_pass() -> int:
        return sum(len(batch.sources) for batch in loader)

    return one_pass


def _tensors(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.sources, batch.visual.object, batch.visual.motion, batch.class_ids, batch.video_ids


def _batches_check(loaders: dict[str, DataLoader[Any]]) -> Callable[[], str]:
    def check() -> str:
        worst = 0.0
        first, *others = loaders.values()
        for other in others:
            for one, another in zip(first, other, strict=True):
                for a, b in zip(_tensors(one), _tensors(another), strict=True):
                    if a is None and b is None:
                        continue
                    if a is None or b is None or a.shape != b.shape:
                        worst = math.inf
                    else:
                        worst = max(worst, (a.double() - b.double()).abs().max().item())
        return agree("batches", worst, 0.0)

    return check


class _WholeFileStore(Store):
    """Reads as people do at first: the whole WAV by soundfile, whole arrays by np.load, cut afterwards."""

    def read_audio(self, clip: Clip, start: int = 0, samples: int | None = None, *, tile: bool = False) -> np.ndarray:
        import soundfile

        whole, _ = soundfile.read(str(self.file(clip, "audio")), dtype="float32")
        samples = clip.samples - start if samples is None else samples
        if tile:
            return np.take(whole, np.arange(start, start + samples), mode="wrap")
        out = np.zeros(samples, np.float32)
        cut = whole[max(start, 0) : max(start + samples, 0)]
        out[max(-start, 0) : max(-start, 0) + len(cut)] = cut
        return out

    def read_crop(self, clip: Clip, start: int, samples: int, gain: float = 1.0) -> np.ndarray:
        crop = self.read_audio(clip, start, samples - 1, tile=clip.samples < samples)
        return np.append(np.clip(crop * np.float32(gain), -1.0, 1.0), np.float32(0.0))

    def read_visual(
        self,
        clip: Clip,
        source: VisualSource,
        *,
        centre_s: float,
        duration_s: float,
        copy: bool = True,
        unseen: bool = False,
    ) -> np.ndarray:
        kind = source.role if source.kind == "frames" else f"features/{source.name}"
        file = self.file(clip, kind)
        assert file is not None
        whole = np.load(file, allow_pickle=False)
        timeline = VisualTimeline(
            object=whole if kind == "object" else None,
            motion=whole if kind == "motion" else None,
            object_rate_hz=self.object_rate_hz,
            motion_rate_hz=self.motion_rate_hz,
            features={source.name: whole},
        )
        return timeline.read(source, centre_s, duration_s, copy=copy)


def temporary_store(
    folder: str | Path,
    *,
    clips: int = 12,
    clip_s: float = 20.0,
    object_size: int = 112,
    motion_size: int = 48,
    sample_rate_hz: int = 11025,
) -> Store:
    """A store of noise with clips and frames as large as those of the offline benchmark (its full size)."""
    rng = np.random.default_rng(0)
    ids = [f"noise-{number:03d}" for number in range(clips)]
    origin = {"generator": "avsep bench data", "clips": clips, "clip_s": clip_s}
    with StoreWriter(folder, classes=["a", "b"], sample_rate_hz=sample_rate_hz, origin=origin) as writer:
        for number, clip_id in enumerate(ids):
            writer.write_clip(
                clip_id,
                "ab"[number % 2],
                "train",
                rng.integers(-8000, 8000, max(1, int(clip_s * sample_rate_hz)), dtype=np.int16),
                object_frames=rng.integers(0, 256, (max(1, int(clip_s)), 3, object_size, object_size), dtype=np.uint8),
                motion_frames=rng.integers(
                    0, 256, (max(1, int(clip_s * 8)), 1, motion_size, motion_size), dtype=np.uint8
                ),
            )
        return writer.finish(ids)
