"""Checkpoints of the published code of iQuery and ContAV-Sep, and of Co-Separation, read into a separator.

The code of iQuery keeps two files, the U-Net (``net_sound``) and the transformer (``maskformer``). Every one of its
decoder layers owns three attentions and four norms but calls only some of them; the tensors that are never called are
dropped and named (at the published size with 5 classes 30 tensors, 1,318,400 parameters).

The code of Co-Separation keeps three: ``visual``, ``unet`` and ``classifier``. Sound of Pixels' own U-Net (bilinear
upsampling, a bias at its end) is not ``unet7``, so its checkpoints are not read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avsep.decoders import ConditionedUNet, QueryTransformer
from avsep.encoders import Conv7, ResNet18Map, UNet7
from avsep.errors import CheckpointError
from avsep.separator import Separator, build_separator

__all__ = [
    "PublishedCheckpoint",
    "convert_coseparation",
    "convert_published",
    "load_coseparation",
    "load_published",
    "read_published",
]


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A converted checkpoint.

    ``state`` has the names of :class:`avsep.separator.Separator`; ``dropped`` the published tensors that are never
    called or stand there twice; ``sizes`` what the tensors' shapes tell of the network.
    """

    state: dict[str, Tensor]
    dropped: tuple[str, ...]
    sizes: dict[str, int]


_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_AFFINE = ("weight", "bias")
# tensors of nn.MultiheadAttention -> ours
_ATTENTION = {
    "in_proj_weight": "in_weight",
    "in_proj_bias": "in_bias",
    "out_proj.weight": "out.weight",
    "out_proj.bias": "out.bias",
}


def _sound_names() -> dict[str, str]:
    modules = {"bn0": "input_norm"}
    modules |= {f"downnorm{k}": f"down_norm.{k - 2}" for k in range(2, 7)}
    modules |= {f"upnorm{k}": f"up_norm.{7 - k}" for k in range(2, 8)}
    names = {f"{old}.{t}": f"{new}.{t}" for old, new in modules.items() for t in _BATCH_NORM}
    for k in range(1, 8):
        names[f"downconv{k}.weight"] = f"down.{k - 1}.weight"
        names[f"upconv{k}.weight"] = f"up.{7 - k}.weight"
    return names


def _feedforward(old: str, new: str) -> dict[str, str]:
    return {f"{old}.linear{i}.{t}": f"{new}.feedforward.linear{i}.{t}" for i in (1, 2) for t in _AFFINE}


def _attention(old: str, new: str) -> dict[str, str]:
    return {f"{old}.{a}": f"{new}.{b}" for a, b in _ATTENTION.items()}


def _norm(old: str, new: str) -> dict[str, str]:
    return {f"{old}.{t}": f"{new}.{t}" for t in _AFFINE}


def _predictor_names(encoder_layers: int, layers: int) -> tuple[dict[str, str], list[str]]:
    """Published name -> ours, and the published names that are never called."""
    names = {"query_embed.weight": "class_queries"}
    names |= _norm("down", "motion_proj") | _norm("objproj", "object_proj")
    names |= _norm("transformer.decoder.norm", "norm")
    for i in range(3):
        names |= _norm(f"mask_embed.layers.{i}", f"head.{2 * i}")
    for i in range(encoder_layers):
        old, new = f"transformer.encoder.layers.{i}", f"encoder.{i}"
        names |= _attention(f"{old}.self_attn", f"{new}.self_attention")
        names |= _norm(f"{old}.norm1", f"{new}.self_norm") | _feedforward(old, new)
        names |= _norm(f"{old}.norm2", f"{new}.feedforward_norm")
    dead: list[str] = []
    for i in range(layers):
        old = f"transformer.decoder.layers.{i}"
        motion = (f"{old}.cross_attn_motion", f"{old}.norm4")
        queries, audio = (f"{old}.self_attn", f"{old}.norm1"), (f"{old}.multihead_attn", f"{old}.norm2")
        new = "motion_layer" if i == 0 else f"layers.{i - 1}"
        called = {"motion": motion} if i == 0 else {"self": queries, "audio": audio}
        idle = [queries, audio] if i == 0 else [motion]
        for name, (attention, norm) in called.items():
            names |= _attention(attention, f"{new}.{name}_attention") | _norm(norm, f"{new}.{name}_norm")
        names |= _feedforward(old, new) | _norm(f"{old}.norm3", f"{new}.feedforward_norm")
        for attention, norm in idle:
            dead += [*_attention(attention, ""), *_norm(norm, "")]
    return names, dead


def _plain(state: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    """Without the prefix that data-parallel training leaves; every value a tensor."""
    plain = {str(name).removeprefix("module."): value for name, value in state.items()}
    for name, value in plain.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{what} checkpoint: '{name}' is a {type(value).__name__}, not a tensor")
    return plain


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(m[1]) for m in (re.match(pattern, name) for name in state) if m), default=-1)


def _translate(
    state: dict[str, Tensor],
    names: dict[str, str],
    dead: Sequence[str],
    what: str,
    order: str = "two files in the order net_sound, maskformer",
) -> tuple[dict[str, Tensor], list[str]]:
    for name in names:
        # old PyTorch did not count batches; the counter is not used in the computation
        if name.endswith(".num_batches_tracked"):
            state.setdefault(name, torch.tensor(0))
    if unknown := sorted(state.keys() - names.keys() - set(dead)):
        raise CheckpointError(
            f"{what} checkpoint: {len(unknown)} tensors are not part of the published network, among them "
            f"'{unknown[0]}': give the {order}"
        )
    if missing := sorted(names.keys() - state.keys()):
        raise CheckpointError(f"{what} checkpoint: {len(missing)} tensors are missing, among them '{missing[0]}'")
    translated = {}
    for old, new in names.items():
        value = state[old]
        # a convolution with kernel 1 is our linear map
        translated[new] = value.squeeze(-1) if value.ndim == 3 and value.shape[-1] == 1 else value
    return translated, [name for name in dead if name in state]


def convert_published(sound_state: Mapping[str, Any], predictor_state: Mapping[str, Any]) -> PublishedCheckpoint:
    """Translate the published state dicts of the U-Net (net_sound) and the transformer (maskformer).

    A ``module.`` prefix is taken off.

    Raises:
        CheckpointError: naming the first tensor that is missing, unknown or of the wrong shape.
    """
    sound = _plain(sound_state, "net_sound")
    predictor = _plain(predictor_state, "maskformer")
    encoder_layers = _count(predictor, r"transformer\.encoder\.layers\.(\d+)\.")
    layers = _count(predictor, r"transformer\.decoder\.layers\.(\d+)\.")
    audio, _ = _translate(sound, _sound_names(), (), "net_sound")
    names, dead = _predictor_names(encoder_layers, layers)
    decoder, dropped = _translate(predictor, names, dead, "maskformer")
    try:
        sizes: dict[str, Any] = {
            "base_channels": audio["down.0.weight"].shape[0],
            "mask_channels": audio["up.6.weight"].shape[0],
            "num_classes": decoder["class_queries"].shape[0],
            "dim": decoder["class_queries"].shape[1],
            "object_dim": decoder["object_proj.weight"].shape[1],
            "motion_dim": decoder["motion_proj.weight"].shape[1],
            "feedforward": decoder["motion_layer.feedforward.linear1.weight"].shape[0],
            "encoder_layers": encoder_layers,
            "layers": layers,
        }
    except (KeyError, IndexError):
        raise CheckpointError("maskformer checkpoint: it has no decoder layers, or a tensor is a scalar") from None
    state: dict[str, Tensor] = {}
    try:
        with torch.device("meta"):  # shapes only
            encoder = UNet7(base_channels=sizes["base_channels"], mask_channels=sizes["mask_channels"])
            transformer = QueryTransformer(
                **{key: value for key, value in sizes.items() if key != "base_channels"},
                latent_channels=encoder.latent_channels,
                heads=1,
            )
    except ValueError as error:  # tensors of sizes that no network has
        raise CheckpointError(f"published checkpoint: {error}") from None
    for prefix, module, translated in (("audio_encoder", encoder, audio), ("mask_decoder", transformer, decoder)):
        expected = module.state_dict()
        if extra := sorted(expected.keys() - translated.keys()):
            raise CheckpointError(
                f"published checkpoint: the transformer's width {sizes['dim']} is not the latent's "
                f"{encoder.latent_channels}, which needs '{extra[0]}'"
            )
        state |= _fitted(prefix, expected, translated)
    return PublishedCheckpoint(state, tuple(dropped), sizes)


def _fitted(prefix: str, expected: Mapping[str, Tensor], translated: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The translated tensors under their prefix, once each has the shape that the network expects."""
    for name, value in translated.items():
        if value.shape != expected[name].shape:
            raise CheckpointError(
                f"published checkpoint: '{name}' has the shape {list(value.shape)}, the network's other tensors "
                f"ask for {list(expected[name].shape)}"
            )
    return {f"{prefix}.{name}": value for name, value in translated.items()}


def read_published(sound: str | os.PathLike[str], predictor: str | os.PathLike[str]) -> PublishedCheckpoint:
    """Read and convert the two published files; nothing in them is executed.

    Raises:
        CheckpointError: when a file is missing, damaged, holds anything but tensors, or does not fit.
    """
    return convert_published(_read(Path(sound)), _read(Path(predictor)))


def _read(path: Path) -> Mapping[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(
            f"{path} is not a file of PyTorch tensors, or is damaged ({type(error).__name__}: {reason})"
        ) from None
    # some training scripts wrap the tensors once
    if isinstance(state, Mapping):
        for key in ("state_dict", "model"):
            if isinstance(state.get(key), Mapping):
                state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path} holds no state dict, but a {type(state).__name__}")
    return state


def load_published(
    sound: str | os.PathLike[str],
    predictor: str | os.PathLike[str],
    *,
    classes: Sequence[str] = (),
    heads: int = 8,
    object_features: str = "clip_vit_b32",
    motion_features: str = "videomae_base",
) -> Separator:
    """A separator, in eval mode, with the weights of the two published files.

    Args:
        sound, predictor: the files of the U-Net and of the transformer.
        classes: class names in query order, if known.
        heads: attention heads, the one size that the tensors do not tell.
        object_features, motion_features: names under which a store keeps the features the network was trained on.
    """
    converted = read_published(sound, predictor)
    sizes = converted.sizes
    decoder = {key: sizes[key] for key in ("dim", "feedforward", "encoder_layers", "layers")}
    separator = build_separator(
        num_classes=sizes["num_classes"],
        classes=classes,
        audio_encoder=("unet7", {key: sizes[key] for key in ("base_channels", "mask_channels")}),
        object_encoder=("precomputed", {"features": object_features, "dim": sizes["object_dim"]}),
        motion_encoder=("precomputed", {"features": motion_features, "dim": sizes["motion_dim"]}),
        mask_decoder=("query_transformer", {**decoder, "heads": heads}),
    )
    return _loaded(separator, converted)


def _loaded(separator: Separator, converted: PublishedCheckpoint) -> Separator:
    # Strict but for the front end, which has no trained tensors.
    own = {name for name in separator.state_dict() if not name.startswith("front_end.")}
    if own != converted.state.keys():
        raise CheckpointError(f"published checkpoint: {sorted(own ^ converted.state.keys())[0]!r} does not fit")
    separator.load_state_dict(converted.state, strict=False)
    return separator.eval()


# --- Co-Separation ----------------------------------------------------------------------------------------------------

_COSEPARATION_ORDER = "three files in the order visual, unet, classifier"


def _coseparation_unet_names() -> dict[str, str]:
    """Published name -> ours, but for the kernels of the way up, which are cut in two."""
    names: dict[str, str] = {}
    for k in range(1, 8):
        down, up = f"audionet_convlayer{k}", f"audionet_upconvlayer{k}"
        names |= {f"{down}.0.{t}": f"down.{k - 1}.{t}" for t in _AFFINE}
        names |= {f"{down}.1.{t}": f"down_norm.{k - 1}.{t}" for t in _BATCH_NORM}
        names |= {f"{up}.0.bias": f"up.{k - 1}.own.bias", f"{up}.0.weight": f"up.{k - 1}.weight"}
        if k < 7:
            names |= {f"{up}.1.{t}": f"up.{k - 1}.norm.{t}" for t in _BATCH_NORM}
    return names


def _resnet_names() -> dict[str, str]:
    """The layers of ResNet-18 by number, as the published code keeps them -> by name."""
    names = {"feature_extraction.0.weight": "conv1.weight"} | _norm("fc", "fc")
    modules = {"feature_extraction.1": "bn1"}
    for layer in range(1, 5):
        for block in range(2):
            old, new = f"feature_extraction.{layer + 3}.{block}", f"layer{layer}.{block}"
            convolutions = ["conv1", "conv2"]
            modules |= {f"{old}.bn{i}": f"{new}.bn{i}" for i in (1, 2)}
            if layer > 1 and block == 0:
                convolutions.append("downsample.0")
                modules[f"{old}.downsample.1"] = f"{new}.downsample.1"
            names |= {f"{old}.{c}.weight": f"{new}.{c}.weight" for c in convolutions}
    return names | {f"{old}.{t}": f"{new}.{t}" for old, new in modules.items() for t in _BATCH_NORM}


def convert_coseparation(
    visual_state: Mapping[str, Any], unet_state: Mapping[str, Any], classifier_state: Mapping[str, Any]
) -> PublishedCheckpoint:
    """Translate the published state dicts of Co-Separation (seven levels, ``visual_pool conv1x1``).

    The kernels of the way up are cut into the part of the source's own maps and that of the mixture's. Networks that
    were trained with scene images have an output for them, after those of the classes.

    Raises:
        CheckpointError: naming the first tensor that is missing, unknown or of the wrong shape.
    """
    resnet = _resnet_names()
    reduction = _norm("conv1x1.0", "conv1x1.0") | {f"conv1x1.1.{t}": f"conv1x1.1.{t}" for t in _BATCH_NORM}
    twice = ("conv1.weight",)  # also feature_extraction.0.weight
    visual, _ = _translate(_plain(visual_state, "visual"), resnet | reduction, twice, "visual", _COSEPARATION_ORDER)
    unet, _ = _translate(_plain(unet_state, "unet"), _coseparation_unet_names(), (), "unet", _COSEPARATION_ORDER)
    classifier, _ = _translate(_plain(classifier_state, "classifier"), resnet, twice, "classifier", _COSEPARATION_ORDER)
    down = {name: value for name, value in unet.items() if name.startswith("down")}
    up = {name: value for name, value in unet.items() if name.startswith("up") and name[5:] != "weight"}
    try:
        sizes: dict[str, Any] = {
            "base_channels": down["down.0.weight"].shape[0],
            "dim": visual["fc.weight"].shape[0],
            "num_classes": classifier["fc.weight"].shape[0],
            "visual_width": visual["conv1.weight"].shape[0],
            "visual_channels": visual["conv1x1.0.weight"].shape[0],
        }
        places = visual["fc.weight"].shape[1] // max(1, sizes["visual_channels"])
        sizes["visual_size"] = 32 * math.isqrt(places)
        for k in range(7):
            shared = down[f"down.{6 - k}.weight"].shape[0]
            kernel = unet[f"up.{k}.weight"]
            up[f"up.{k}.own.weight"], up[f"up.{k}.shared.weight"] = kernel[:-shared], kernel[-shared:]
        with torch.random.fork_rng(devices=[]):  # for their shapes; not as meta tensors, whose normal_ imports inductor
            encoder = Conv7(base_channels=sizes["base_channels"])
            decoder = ConditionedUNet(
                num_classes=sizes["num_classes"],
                skip_channels=encoder.skip_channels,
                object_dim=sizes["dim"],
                dim=sizes["dim"],
                project=False,
            )
            network = ResNet18Map(**_visual_sizes(sizes))
    except (IndexError, ValueError) as error:  # tensors of sizes that no network has
        raise CheckpointError(f"published checkpoint: {error}") from None
    state = _fitted("audio_encoder", encoder.state_dict(), down)
    state |= _fitted("object_encoder", network.state_dict(), visual)
    state |= _fitted(
        "mask_decoder", decoder.state_dict(), up | {f"classifier.{name}": v for name, v in classifier.items()}
    )
    return PublishedCheckpoint(state, twice, sizes)


def _visual_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    named = {key: sizes[f"visual_{key}"] for key in ("width", "channels", "size")}
    return {"dim": sizes["dim"], **named}


def load_coseparation(
    visual: str | os.PathLike[str],
    unet: str | os.PathLike[str],
    classifier: str | os.PathLike[str],
    *,
    classes: Sequence[str] = (),
) -> Separator:
    """A separator, in eval mode, with the weights of the three published files of Co-Separation.

    Its object encoder takes the crop of one detected object. ``classes`` are the class names in the order of
    the classifier's outputs, if known.

    Raises:
        CheckpointError: when a file is missing, damaged, holds anything but tensors, or does not fit.
    """
    converted = convert_coseparation(*(_read(Path(path)) for path in (visual, unet, classifier)))
    sizes = converted.sizes
    separator = build_separator(
        num_classes=sizes["num_classes"],
        classes=classes,
        audio_encoder=("conv7", {"base_channels": sizes["base_channels"]}),
        object_encoder=("resnet18_map", _visual_sizes(sizes)),
        mask_decoder=("conditioned_unet", {"dim": sizes["dim"], "project": False}),
    )
    return _loaded(separator, converted)
