"""Small causal separators, and their pass over a whole signal at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from avsep.separator import Separator, build_separator
from avsep.types import VisualFeatures

RATE_HZ = 8000
FRONT_END = {"sample_rate_hz": RATE_HZ, "clip_samples": 2047, "n_fft": 128, "hop": 32, "log_rows": 32}


STORED = ("precomputed", {"features": "clip", "dim": 8, "frames": 1})


def causal_separator(
    *, decoder: dict[str, Any] | None = None, object_encoder: tuple[str, dict[str, Any]] = STORED, **front_end: Any
) -> Separator:
    """Of three classes, with an object encoder and statistics that are not those of the start."""
    torch.manual_seed(0)
    separator = build_separator(
        audio_encoder=("causal_unet", {"base_channels": 4, "mask_channels": 4}),
        object_encoder=object_encoder,
        mask_decoder=("aligned_query", {"dim": 8, "bands": 4, "layers": 2, "causal": True, **(decoder or {})}),
        front_end={**FRONT_END, **front_end},
        classes=("flute", "piano", "violin"),
    ).eval()
    for name, buffer in separator.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.05, 0.2)
    separator.mask_decoder.presence_offsets.copy_(torch.tensor([0.3, -0.2, 0.1]))
    return separator.requires_grad_(False)


def features(sources: int = 2) -> VisualFeatures:
    """[1, N, 8], the last source unseen."""
    generator = torch.Generator().manual_seed(2)
    seen = torch.ones(1, sources, dtype=torch.bool)
    seen[0, -1] = sources < 2
    return VisualFeatures(object=torch.randn(1, sources, 8, generator=generator), seen=seen)


def noise(samples: int, *channels: int, seed: int = 3) -> np.ndarray:
    """[(C,) L], louder and softer in turn."""
    rng = np.random.default_rng(seed)
    swell = 0.3 + 0.25 * np.sin(2 * np.pi * np.arange(samples) / 900)
    return (swell * rng.standard_normal((*channels, samples))).clip(-1, 1).astype(np.float32)


def whole_pass(separator: Separator, mixture: np.ndarray, visual: VisualFeatures, ids: list[int]):
    """The separator on all of a mixture [(C,) L] at once: its sources [N, (C,) L] and presence [N]."""
    from avsep.export.build.graph import with_length

    longer = with_length(separator, mixture.shape[-1] / separator.spec.front_end.sample_rate_hz).eval()
    with torch.inference_mode():
        waveforms, output = longer.separate_and_tell(torch.from_numpy(mixture)[None], visual, torch.tensor([ids]))
    return waveforms[0].numpy(), torch.sigmoid(output.presence[0]).numpy()
