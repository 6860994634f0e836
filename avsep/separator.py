"""Separators: a front end, an audio encoder, visual encoders and a mask decoder, composed by name from a spec.

A saved separator is a folder with ``separator.yaml`` (the spec) and ``model.safetensors`` (the weights, with the spec
once more in the file's header, so that the two cannot be mixed up unnoticed).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from avsep.dsp import FrontEnd
from avsep.encoders._pretrained import weights_come_later
from avsep.errors import CheckpointError, ConfigError, RunError, UnknownNameError, near_matches
from avsep.io import atomic_path, give_usual_rights, read_yaml, write_yaml
from avsep.registry import AUDIO_ENCODERS, MASK_DECODERS, REGISTRIES, VISUAL_ENCODERS, ComponentSpec
from avsep.seeding import seeded
from avsep.spec import FrontEndSpec, SeparatorSpec, load_preset, validated
from avsep.types import AudioFeatures, MaskOutput, Spectrograms, VisualFeatures, VisualSource

__all__ = [
    "Separator",
    "build_from_spec",
    "build_separator",
    "list_components",
    "load_separator",
    "save_separator",
]

SPEC_FILE = "separator.yaml"
WEIGHTS_FILE = "model.safetensors"
_FORMAT = "avsep-separator-1"


class Separator(nn.Module):
    """Waveforms and pictures in, waveforms out. Build one with :func:`build_separator` or :func:`build_from_spec`.

    Dimensions: B mixtures, N sources in each, L samples, F log-frequency rows, T frames.
    """

    object_encoder: nn.Module | None
    motion_encoder: nn.Module | None

    def __init__(
        self,
        spec: SeparatorSpec,
        audio_encoder: nn.Module,
        mask_decoder: nn.Module,
        object_encoder: nn.Module | None = None,
        motion_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.front_end = FrontEnd(spec.front_end)
        self.audio_encoder = audio_encoder
        self.object_encoder = object_encoder
        self.motion_encoder = motion_encoder
        self.mask_decoder = mask_decoder
        self._held = False
        self._freeze()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in slot order; empty when only their number is known."""
        return self.spec.classes

    @property
    def num_classes(self) -> int:
        return self.spec.num_classes

    def _frozen(self) -> Iterator[nn.Module]:
        for encoder in (self.audio_encoder, self.object_encoder, self.motion_encoder):
            if encoder is not None and getattr(encoder, "frozen", False):
                yield encoder

    def _freeze(self) -> None:
        for encoder in self._frozen():
            encoder.requires_grad_(False)
            encoder.eval()

    def freeze(self) -> None:
        """Learn nothing from here on, and stay in evaluation mode, so that running statistics do not change either.

        Parameters that get ``requires_grad_(True)`` afterwards do learn.
        """
        self._held = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Separator:
        """As ``nn.Module.train``, but frozen encoders, and a frozen separator, stay in evaluation mode."""
        super().train(mode and not self._held)
        for encoder in self._frozen():
            encoder.eval()
        return self

    def visual_sources(self) -> tuple[VisualSource, ...]:
        """What the visual encoders want to be fed with, object before motion."""
        encoders = (self.object_encoder, self.motion_encoder)
        return tuple(encoder.source() for encoder in encoders if encoder is not None)  # type: ignore[operator]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters as ``audio``, ``visual`` and ``decoder``; frozen encoders are left out."""
        parts: dict[str, tuple[nn.Module | None, ...]] = {
            "audio": (self.audio_encoder,),
            "visual": (self.object_encoder, self.motion_encoder),
            "decoder": (self.mask_decoder,),
        }
        return {
            name: [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
            for name, modules in parts.items()
        }

    def encode_visual(
        self, object_input: Tensor | None, motion_input: Tensor | None, motion_mask: Tensor | None = None
    ) -> VisualFeatures:
        """Encode the pictures or stored features of each source.

        Args:
            object_input: [B, N, K, ...], frames or feature vectors, or None.
            motion_input: [B, N, ...], frames in order of time or a feature sequence, or None.
            motion_mask: [B, N, M] bool, True = valid, over the input's time steps. Where the encoder gives fewer
                steps, one is valid when any of its input steps is.

        Raises:
            ConfigError: when an input that an encoder needs is missing.
        """
        return VisualFeatures(
            object=_encode(self.object_encoder, object_input, "object"),
            motion=(motion := _encode(self.motion_encoder, motion_input, "motion")),
            motion_mask=None if motion is None or motion_mask is None else _fit_mask(motion_mask, motion.shape[-1]),
        )

    def forward(self, network_input: Tensor, visual: VisualFeatures, class_ids: Tensor) -> MaskOutput:
        """Masks for the asked classes.

        Args:
            network_input: [B, 1, F, T], as :meth:`analyse` gives it.
            visual: encoded pictures of the N sources.
            class_ids: [B, N] int64, each below ``num_classes``.

        Raises:
            ConfigError: when a class id is out of range (looked at where it costs nothing: ids on the CPU).
        """
        self._check_class_ids(class_ids)
        return self.mask_decoder(self.audio_encoder(network_input), visual, class_ids.to(network_input.device))

    @property
    def has_taps(self) -> bool:
        """Whether :meth:`taps` gives maps."""
        return hasattr(self.audio_encoder, "taps")

    def taps(self, audio: AudioFeatures, output: MaskOutput | None = None) -> dict[str, Tensor]:
        """Feature maps by name, for methods that compare those of two separators of one spec.

        They come before their activations, from the finest of the way down to the mask features; in a U-Net of seven
        levels e3, e4, e5, d4, d2 and F (the mask features). Where the way up is the mask decoder's, there is no F: the
        logits take its place.

        Args:
            audio: of the audio encoder.
            output: of the mask decoder; without it the maps of sources are left out.

        Returns:
            [B, C, H, W] each, or [B*N, C, H, W] where each source has maps of its own.

        Raises:
            ConfigError: when the separator's parts give no maps.
        """
        if not self.has_taps:
            raise ConfigError(f"audio encoder '{self.spec.audio_encoder.name}' has no taps, which give feature maps")
        named: dict[str, Tensor] = self.audio_encoder.taps(audio)  # type: ignore[operator]
        of_sources = {} if output is None else output.maps
        return {**named, **{name: maps.flatten(0, 1) for name, maps in of_sources.items()}}

    def analyse(self, sources: Tensor) -> Spectrograms:
        """sources [B, N, L], already scaled so that their sum is the mixture -> the network's input and its targets."""
        return self.front_end.analyse(sources)

    def separate(self, mixture: Tensor, visual: VisualFeatures, class_ids: Tensor) -> Tensor:
        """mixture [B, L] with L = ``spec.front_end.clip_samples`` -> sources [B, N, L].

        Gradients flow unless the caller stops them; dropout and normalisation follow the module's mode.

        Raises:
            ConfigError: when L is another length (long audio: ``avsep.chunking``), or a class id is out of range.
        """
        length = self.spec.front_end.clip_samples
        if mixture.ndim != 2 or mixture.shape[1] != length:
            raise ConfigError(
                f"separate takes a mixture [B, {length}], got {list(mixture.shape)}: longer audio is cut into "
                "overlapping chunks by avsep.chunking.separate_long"
            )
        spectrograms = self.analyse(mixture[:, None, :])
        logits = self(spectrograms.network_input, visual, class_ids).logits
        return self.front_end.synthesise(logits, spectrograms.mixture, length=length)

    def grow(self, num_classes: int, classes: Sequence[str] | None = None) -> None:
        """Make room for more classes; what is known of the old ones stays.

        Args:
            num_classes: the new number of classes.
            classes: their names in slot order; the old names must come first.

        Raises:
            ConfigError: when there would be fewer classes, or the names do not continue the old ones.
        """
        names = self.classes if classes is None and num_classes == self.num_classes else tuple(classes or ())
        if num_classes < self.num_classes:
            raise ConfigError(f"cannot go from {self.num_classes} classes to {num_classes}: classes are only added")
        if self.classes and names[: len(self.classes)] != self.classes:
            raise ConfigError(
                f"the classes {', '.join(names) or '(none given)'} do not continue those already learned: name "
                f"{', '.join(self.classes)} first, in this order"
            )
        data = {**self.spec.model_dump(), "num_classes": num_classes, "classes": names}
        spec = validated(SeparatorSpec, data, "grow")
        self.mask_decoder.grow(num_classes)  # type: ignore[operator]
        self.spec = spec

    def _check_class_ids(self, class_ids: Tensor) -> None:
        if class_ids.device.type != "cpu" or torch.compiler.is_compiling() or class_ids.numel() == 0:
            return
        low, high = int(class_ids.min()), int(class_ids.max())
        if low < 0 or high >= self.num_classes:
            raise ConfigError(
                f"class id {low if low < 0 else high} is out of range: this separator knows {self.num_classes} classes "
                f"(0 to {self.num_classes - 1}); grow() adds more"
            )


def _encode(encoder: nn.Module | None, inputs: Tensor | None, role: str) -> Tensor | None:
    """[B, N, ...] -> [B, N, D] or [B, N, D, Tm]; None without an encoder."""
    if encoder is None:
        return None
    if inputs is None:
        article = "an" if role == "object" else "a"
        raise ConfigError(f"this separator has {article} {role} encoder: give encode_visual its {role} input")
    with torch.set_grad_enabled(torch.is_grad_enabled() and not getattr(encoder, "frozen", False)):
        return encoder(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])


def _fit_mask(mask: Tensor, steps: int) -> Tensor:
    """[B, N, M] -> [B, N, steps]: a step is valid when any input step it is pooled from is."""
    if mask.shape[-1] == steps:
        return mask
    return nn.functional.adaptive_max_pool1d(mask.float(), steps) > 0.5


def build_from_spec(spec: SeparatorSpec) -> Separator:
    """Build a separator with fresh weights.

    Raises:
        ConfigError: when a name, parameter or combination is wrong; nothing has been built then.
    """
    spec.check()
    _check_sizes(spec)
    audio_encoder = AUDIO_ENCODERS.create(spec.audio_encoder.name, spec.audio_encoder.params)
    visual = {
        role: None if ref is None else VISUAL_ENCODERS.create(ref.name, ref.params, role=role)
        for role, ref in (("object", spec.object_encoder), ("motion", spec.motion_encoder))
    }
    mask_decoder = MASK_DECODERS.create(
        spec.mask_decoder.name,
        spec.mask_decoder.params,
        num_classes=spec.num_classes,
        mask_channels=getattr(audio_encoder, "mask_channels", None),
        latent_channels=audio_encoder.latent_channels,
        skip_channels=getattr(audio_encoder, "skip_channels", ()),
        object_dim=None if visual["object"] is None else visual["object"].dim,
        motion_dim=None if visual["motion"] is None else visual["motion"].dim,
    )
    return Separator(spec, audio_encoder, mask_decoder, visual["object"], visual["motion"])


def _check_sizes(spec: SeparatorSpec) -> None:
    multiple = getattr(AUDIO_ENCODERS.get(spec.audio_encoder.name).factory, "size_multiple", 1)
    rows, frames = spec.front_end.log_rows, spec.front_end.frames
    if rows % multiple:
        raise ConfigError(
            f"audio encoder '{spec.audio_encoder.name}' needs log_rows in multiples of {multiple}, got {rows}: "
            f"try front_end.log_rows={max(1, round(rows / multiple)) * multiple}"
        )
    if frames % multiple:
        hop = spec.front_end.hop
        samples = max(1, round(frames / multiple)) * multiple * hop - 1
        raise ConfigError(
            f"audio encoder '{spec.audio_encoder.name}' needs time frames in multiples of {multiple}, and clip_samples="
            f"{spec.front_end.clip_samples} at hop {hop} gives {frames}: try front_end.clip_samples={samples}"
        )


class _Unset:
    """Stands for "not given" where None means "without"."""

    def __repr__(self) -> str:
        return "unset"


_UNSET = _Unset()


def build_separator(
    preset: str | None = None,
    *,
    num_classes: int | None = None,
    audio_encoder: Any = _UNSET,
    object_encoder: Any = _UNSET,
    motion_encoder: Any = _UNSET,
    mask_decoder: Any = _UNSET,
    classes: Sequence[str] = (),
    front_end: FrontEndSpec | dict[str, Any] | None = None,
    seed: int | None = None,
) -> Separator:
    """Build a separator from a preset, from named parts, or from a preset with some parts exchanged.

    Args:
        preset: a preset's name or the path of a YAML file like one; None to name the parts.
        num_classes: number of classes; may be left out when ``classes`` are given.
        audio_encoder: a component is a name, ``(name, {parameter: value})`` or ``{"name": ..., "params": {...}}``;
            without a preset the audio encoder is ``unet7`` and the mask decoder ``query_transformer``.
        object_encoder, motion_encoder: as above; None leaves the part out, also where a preset has it.
        mask_decoder: as above.
        classes: class names in slot order.
        front_end: settings of the front end (:class:`avsep.spec.FrontEndSpec`) that replace the preset's one by one.
        seed: of the first weights, which then do not depend on the global random state, nor change it.

    Raises:
        ConfigError: for a wrong name, parameter or combination, before anything is built.

    Examples:
        >>> separator = build_separator("iquery_small", num_classes=5)
        >>> separator = build_separator(object_encoder="frame_cnn", mask_decoder=("query_transformer", {"dim": 64}),
        ...                             num_classes=5)
    """
    if num_classes is None:
        if not classes:
            raise ConfigError("build_separator needs num_classes, or classes")
        num_classes = len(classes)
    data: dict[str, Any] = {"audio_encoder": "unet7", "mask_decoder": "query_transformer"}
    if preset is not None:
        data = dict(load_preset(preset)["separator"])
    given = {
        "audio_encoder": audio_encoder,
        "object_encoder": object_encoder,
        "motion_encoder": motion_encoder,
        "mask_decoder": mask_decoder,
    }
    data.update({name: value for name, value in given.items() if value is not _UNSET})
    if front_end is not None:
        settings = front_end.model_dump() if isinstance(front_end, FrontEndSpec) else dict(front_end)
        data["front_end"] = {**(data.get("front_end") or {}), **settings}
    data.update(num_classes=num_classes, classes=tuple(classes))
    where = "build_separator" if preset is None else f"preset '{preset}'"
    with seeded(seed):
        return build_from_spec(validated(SeparatorSpec, data, where))


def list_components(kind: str | None = None) -> list[ComponentSpec]:
    """Every registered component, or those of one kind (such as ``mask_decoders``).

    Raises:
        UnknownNameError: for a kind that does not exist.
    """
    if kind is None:
        return [spec for registry in REGISTRIES.values() for spec in registry]
    if kind not in REGISTRIES:
        raise UnknownNameError(f"no kind of component named '{kind}': {near_matches(kind, REGISTRIES)}")
    return list(REGISTRIES[kind])


def save_separator(separator: Separator, folder: str | os.PathLike[str]) -> None:
    """Write ``separator.yaml`` and ``model.safetensors``, each whole or not at all.

    A new folder appears complete, and saving again under the same spec replaces the weights in one step. Where both
    files change in a folder that is there already, a kill between the two leaves whole weights beside the older yaml,
    which :func:`load_separator` reports; nothing is lost, for the weights file holds its own spec.

    Raises:
        AvsepError: when the disk is full; what was there is unchanged.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise RunError(f"{target} is a file: a separator is saved as a folder, choose another name")
    spec = separator.spec.model_dump(mode="json")
    header = {"format": _FORMAT, "spec": json.dumps(spec, sort_keys=True)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in separator.state_dict().items()}
    if _saved_spec(target) == spec:
        with atomic_path(target / WEIGHTS_FILE) as temporary:
            temporary.write_bytes(safetensors_bytes(tensors, header))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # The pair changes together: write both beside the target before touching it.
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        give_usual_rights(staging)
        with atomic_path(staging / WEIGHTS_FILE) as temporary:
            temporary.write_bytes(safetensors_bytes(tensors, header))
        write_yaml(staging / SPEC_FILE, spec)
        if target.is_dir():
            for name in (WEIGHTS_FILE, SPEC_FILE):
                os.replace(staging / name, target / name)
        else:
            os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _saved_spec(folder: Path) -> Any:
    try:
        return read_yaml(folder / SPEC_FILE)
    except ConfigError:
        return None


def load_separator(folder_or_run: str | os.PathLike[str], task: int | None = None) -> Separator:
    """Load a saved separator, from its own folder or from a run (the last finished task, or ``task``), in eval mode.

    The global random state is left as it was.

    Raises:
        CheckpointError: when the folder is not a separator or a run, is damaged, or its two files do not belong
            together.
    """
    folder = _separator_folder(Path(folder_or_run), task)
    weights = folder / WEIGHTS_FILE
    inside = _spec_in_weights(weights)
    spec = validated(SeparatorSpec, inside, str(weights))
    if (folder / SPEC_FILE).exists():
        _check_same_spec(folder, spec)
    with torch.random.fork_rng(devices=[]), weights_come_later():
        separator = build_from_spec(spec)
    _load_weights(separator, weights)
    return separator.eval()


def _separator_folder(path: Path, task: int | None) -> Path:
    if not path.exists():
        raise CheckpointError(f"no such folder: {path}")
    if (path / SPEC_FILE).is_file() or (path / WEIGHTS_FILE).is_file():
        if task is not None:
            raise CheckpointError(f"{path} is one separator, not a run, so it has no task {task}: leave the task out")
        return path
    tasks = path / "tasks"
    if not tasks.is_dir() and not (path / "run.yaml").is_file():
        raise CheckpointError(
            f"{path} is neither a separator ({SPEC_FILE} and {WEIGHTS_FILE}) nor a run (tasks/00/separator)"
        )
    finished = {
        int(entry.name): entry / "separator"
        for entry in sorted(tasks.glob("*"))
        if entry.name.isdigit() and (entry / "task.json").is_file() and (entry / "separator" / WEIGHTS_FILE).is_file()
    }
    if not finished:
        raise CheckpointError(f"{path} has no finished task yet: train it further (avsep train --resume)")
    if task is None:
        return finished[max(finished)]
    if task not in finished:
        raise CheckpointError(f"{path} has no finished task {task}: it has {', '.join(str(t) for t in finished)}")
    return finished[task]


@contextlib.contextmanager
def _open_weights(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or truncated ({' '.join(str(error).split())}): restore it, or save it again"
        ) from None


def _spec_in_weights(path: Path) -> Any:
    with _open_weights(path) as file:
        header = file.metadata() or {}
    if header.get("format") != _FORMAT:
        raise CheckpointError(f"{path} was not written by save_separator: its header does not say '{_FORMAT}'")
    try:
        return json.loads(header["spec"])
    except (KeyError, ValueError):
        raise CheckpointError(f"{path} has no readable spec in its header: save it again") from None


def _check_same_spec(folder: Path, spec: SeparatorSpec) -> None:
    try:
        beside = validated(SeparatorSpec, read_yaml(folder / SPEC_FILE), str(folder / SPEC_FILE))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if beside != spec:
        one, other = spec.model_dump(), beside.model_dump()
        keys = [key for key in one if one[key] != other[key]]
        raise CheckpointError(
            f"{folder / SPEC_FILE} and the spec inside {WEIGHTS_FILE} differ in {', '.join(keys)}: copy both files of "
            f"one save, or delete {SPEC_FILE} to go by the weights"
        )


def _load_weights(separator: Separator, path: Path) -> None:
    """Copy the file's tensors into the separator, or raise one line and change nothing."""
    with _open_weights(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    own = separator.state_dict()
    if missing := sorted(own.keys() - state.keys()):
        raise CheckpointError(f"{path} lacks {len(missing)} tensors of its spec, among them '{missing[0]}'")
    if extra := sorted(state.keys() - own.keys()):
        raise CheckpointError(f"{path} has {len(extra)} tensors that its spec does not, among them '{extra[0]}'")
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise CheckpointError(
                f"{path}: '{name}' has the shape {list(state[name].shape)}, the spec gives {list(value.shape)}"
            )
    separator.load_state_dict(state)
