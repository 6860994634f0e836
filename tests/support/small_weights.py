"""Small random weights of the published models' own classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {
    "clip_vit_b32": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**VISION, image_size=32, patch_size=8, projection_dim=12)
    ),
    "siglip2_base": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**VISION, image_size=32, patch_size=8)
    ),
    "resnet18": lambda: transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
    "videomae_base": lambda: transformers.VideoMAEModel(
        transformers.VideoMAEConfig(**VISION, image_size=32, patch_size=8, num_frames=4)
    ),
}
FOLDERS = {"clip_vit_b32": "clip-vit-base-patch32", "videomae_base": "videomae-base"}


def write_small(root: Path, names: tuple[str, ...] = tuple(FOLDERS)) -> Path:
    """Folders below ``root`` as AVSEP_WEIGHTS finds them."""
    torch.manual_seed(0)
    for name in names:
        SMALL[name]().save_pretrained(root / FOLDERS[name])
    return root


def write_owlv2(path: Path) -> Path:
    """A detector whose tokenizer knows letters."""
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = ["!", *letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Owlv2Config(
        text_config={
            **small,
            "vocab_size": len(words),
            "max_position_embeddings": 16,
            "bos_token_id": len(words) - 2,
            "eos_token_id": len(words) - 1,
            "pad_token_id": 0,
        },
        vision_config={**small, "image_size": 64, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    transformers.Owlv2ForObjectDetection(config).save_pretrained(path)
    (path / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "pad_token": "!"}))
    return path
