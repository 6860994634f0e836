"""iQuery and its ContAV-Sep training step in their literal published form: slow on purpose.

The benchmarks' baseline, and the oracle of the checkpoint converter: modules carry the published names, so that their
state dicts have the published layout. Everything the library saves is spent here, as in the released code:

- nearest upsampling makes an enlarged copy, which a 3x3 convolution then reads;
- every decoder layer owns all three attentions, whether or not it calls them;
- the transformer's encoder runs once for every source of a mixture;
- masks are made for all decoder layers and all queries, and one is picked sample by sample in a Python loop;
- the teacher's U-Net sees the whole batch, with gradients on, and its result is detached afterwards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LiteralBatch", "PublishedPredictor", "PublishedSeparator", "PublishedUNet", "literal_training_step"]


class PublishedUNet(nn.Module):
    """The seven-level U-Net, level by level, with plain upsampling."""

    def __init__(self, base_channels: int = 64, mask_channels: int = 32) -> None:
        super().__init__()
        c = base_channels
        channels = [1, c, 2 * c, 4 * c, 8 * c, 8 * c, 8 * c, 8 * c]
        self.bn0 = nn.BatchNorm2d(1)
        for level in range(1, 8):
            convolution = nn.Conv2d(channels[level - 1], channels[level], 4, stride=2, padding=1, bias=False)
            self.add_module(f"downconv{level}", convolution)
            if 2 <= level <= 6:
                self.add_module(f"downnorm{level}", nn.BatchNorm2d(channels[level]))
        for level in range(7, 0, -1):
            into = channels[level] * (1 if level == 7 else 2)
            out = mask_channels if level == 1 else channels[level - 1]
            self.add_module(f"upconv{level}", nn.Conv2d(into, out, 3, padding=1, bias=False))
            if level > 1:
                self.add_module(f"upnorm{level}", nn.BatchNorm2d(out))

    def forward(self, spectrogram: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1, F, T] -> mask features [B, C, F, T] and latent [B, D, F/8, T/8]."""
        part = self.get_submodule
        maps = [part("downconv1")(self.bn0(spectrogram))]
        for level in range(2, 8):
            x = part(f"downconv{level}")(F.leaky_relu(maps[-1], 0.2))
            maps.append(x if level == 7 else part(f"downnorm{level}")(x))
        x = maps[6]
        for level in range(7, 0, -1):
            if level < 7:
                x = torch.cat([maps[level - 1], x], dim=1)
            x = F.interpolate(F.relu(x), scale_factor=2, mode="nearest")
            x = part(f"upconv{level}")(x)
            if level > 1:
                x = part(f"upnorm{level}")(x)
            if level == 4:
                latent = x
        return x, latent


class _EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads)
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, source: Tensor, positions: Tensor) -> Tensor:
        at = source + positions
        source = self.norm1(source + self.self_attn(at, at, source)[0])
        encoded: Tensor = self.norm2(source + self.linear2(F.relu(self.linear1(source))))
        return encoded


class _DecoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads)
        self.multihead_attn = nn.MultiheadAttention(dim, heads)
        self.cross_attn_motion = nn.MultiheadAttention(dim, heads)
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)

    def forward(
        self,
        target: Tensor,
        queries: Tensor,
        memory: Tensor,
        positions: Tensor,
        motion: Tensor,
        motion_positions: Tensor,
        first: bool,
    ) -> Tensor:
        """Sequence-first tensors: target and queries [Q, B, D], memory [HW, B, D], motion [Tm, B, D]."""
        if first:
            seen = self.cross_attn_motion(target + queries, motion + motion_positions, motion)[0]
            target = self.norm4(target + seen)
        else:
            at = target + queries
            target = self.norm1(target + self.self_attn(at, at, target)[0])
            heard = self.multihead_attn(target + queries, memory + positions, memory)[0]
            target = self.norm2(target + heard)
        decoded: Tensor = self.norm3(target + self.linear2(F.relu(self.linear1(target))))
        return decoded


class _Stack(nn.Module):
    """A list of layers under the name ``layers``, and the norm that all of them share."""

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if norm is not None:
            self.norm = norm


class _Transformer(nn.Module):
    def __init__(self, dim: int, heads: int, feedforward: int, layers: int) -> None:
        super().__init__()
        self.encoder = _Stack([_EncoderLayer(dim, heads, feedforward)])
        self.decoder = _Stack([_DecoderLayer(dim, heads, feedforward) for _ in range(layers)], nn.LayerNorm(dim))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


class PublishedPredictor(nn.Module):
    """The audio-visual transformer of one source: object and motion in, the asked class's mask out."""

    def __init__(
        self,
        num_classes: int,
        object_dim: int = 512,
        motion_dim: int = 768,
        dim: int = 256,
        heads: int = 8,
        feedforward: int = 1024,
        layers: int = 4,
        mask_channels: int = 32,
    ) -> None:
        super().__init__()
        self.query_embed = nn.Embedding(num_classes, dim)
        self.transformer = _Transformer(dim, heads, feedforward, layers)
        self.mask_embed = _Stack([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, mask_channels)])
        self.down = nn.Conv1d(motion_dim, dim, 1)
        self.objproj = nn.Conv1d(object_dim, dim, 1)

    def forward(
        self, latent: Tensor, mask_features: Tensor, objects: Tensor, motion: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One source a mixture.

        Args:
            latent: [B, D, H, W]; mask_features: [B, C, F, T]; objects: [B, Do]; motion: [B, Dm, Tm]; labels: [B].

        Returns:
            mask logits [B, F, T], f_a [B, D], f_o [B, D], f_m [B, D].
        """
        batch, dim, height, width = latent.shape
        positions = _sine_map(height, width, dim).to(latent).unsqueeze(1)  # [HW, 1, D]
        memory = latent.flatten(2).permute(2, 0, 1)  # [HW, B, D]
        for layer in self.transformer.encoder.layers:
            memory = layer(memory, positions)

        objects = self.objproj(objects.unsqueeze(2)).squeeze(2)
        motion = self.down(motion)  # [B, D, Tm]
        motion_embedding = motion.mean(dim=2)
        motion = motion.permute(2, 0, 1)
        motion_positions = _sine_sequence(motion.shape[0], dim).to(motion).unsqueeze(1)

        queries = self.query_embed.weight.unsqueeze(1).repeat(1, batch, 1)  # [Q, B, D]
        starts = []
        for b in range(batch):
            start = torch.zeros_like(queries[:, b])
            start[int(labels[b].item())] = objects[b]
            starts.append(start)
        target = torch.stack(starts, dim=1)

        outputs = []
        for i, layer in enumerate(self.transformer.decoder.layers):
            target = layer(target, queries, memory, positions, motion, motion_positions, i == 0)
            outputs.append(self.transformer.decoder.norm(target))
        hidden = torch.stack(outputs).transpose(1, 2)  # [layers, B, Q, D]

        x = hidden
        for i, linear in enumerate(self.mask_embed.layers):
            x = linear(x) if i == 2 else F.relu(linear(x))
        masks = torch.einsum("lbqc,bchw->lbqhw", x, mask_features)  # every layer, every query
        picked, embeddings = [], []
        for b in range(batch):
            picked.append(masks[-1][b, int(labels[b].item())])
            embeddings.append(hidden[-1][b, int(labels[b].item())])
        return torch.stack(picked), torch.stack(embeddings), objects, motion_embedding


class PublishedSeparator(nn.Module):
    """U-Net and predictor together, as one object to copy, train and step."""

    def __init__(self, sound: PublishedUNet, predictor: PublishedPredictor) -> None:
        super().__init__()
        self.sound = sound
        self.predictor = predictor

    def forward(
        self, network_input: Tensor, objects: Tensor, motion: Tensor, class_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """network_input [B, 1, F, T], objects [B, N, Do], motion [B, N, Dm, Tm], class_ids [B, N] -> as the predictor,
        with N as second dimension."""
        mask_features, latent = self.sound(network_input)
        sources = [
            self.predictor(latent, mask_features, objects[:, n], motion[:, n], class_ids[:, n])
            for n in range(class_ids.shape[1])
        ]
        logits, audio, object_, motion_ = (torch.stack(parts, dim=1) for parts in zip(*sources, strict=True))
        return logits, audio, object_, motion_

    def grown(self, num_classes: int) -> PublishedSeparator:
        """A copy with fresh query rows after the old ones."""
        new = copy.deepcopy(self)
        old = self.predictor.query_embed.weight.detach()
        new.predictor.query_embed = nn.Embedding(num_classes, old.shape[1])
        with torch.no_grad():
            new.predictor.query_embed.weight[: len(old)] = old
        return new


@dataclass(frozen=True)
class LiteralBatch:
    """What a training step is given, already analysed.

    ``network_input`` and ``weight`` [B, 1, F, T], ``ratio`` [B, N, F, T], ``objects`` [B, N, Do], ``motion``
    [B, N, Dm, Tm], ``class_ids``, ``video_ids`` and ``is_memory`` [B, N].
    """

    network_input: Tensor
    weight: Tensor
    ratio: Tensor
    objects: Tensor
    motion: Tensor
    class_ids: Tensor
    video_ids: Tensor
    is_memory: Tensor


def literal_training_step(
    student: PublishedSeparator,
    teacher: PublishedSeparator,
    batch: LiteralBatch,
    optimizers: Sequence[torch.optim.Optimizer],
) -> dict[str, float]:
    """One step of ContAV-Sep from its second task on, as released: losses, one backward pass, all optimisers stepped.

    L = L_sep + 0.1 L_ins + 0.3 L_cls + 0.3 L_dist (Pian et al., NeurIPS 2024, Eq. 13; weights of the released code).
    """
    from avsep.kernels.similarity_distillation.reference import similarity_distillation_reference

    logits, *embeddings = student(batch.network_input, batch.objects, batch.motion, batch.class_ids)
    masks = logits.sigmoid()
    sources = masks.shape[1]
    separation = torch.stack(
        [(batch.weight[:, 0] * (masks[:, n] - batch.ratio[:, n]).abs()).mean() for n in range(sources)]
    ).mean()

    mask_features, latent = teacher.sound(batch.network_input)  # the whole batch, with gradients
    distances = []
    modalities: list[list[Tensor]] = [[], [], []]
    video_ids, class_ids, is_teacher = [], [], []
    for n in range(sources):
        new = ~batch.is_memory[:, n]
        for modality, embedding in zip(modalities, embeddings, strict=True):
            modality.append(embedding[new, n])
        video_ids.append(batch.video_ids[new, n])
        class_ids.append(batch.class_ids[new, n])
        is_teacher.append(torch.zeros(int(new.sum()), dtype=torch.bool, device=new.device))
    for n in range(sources):
        old = batch.is_memory[:, n]
        if not old.any():
            continue
        teacher_logits, *teacher_embeddings = teacher.predictor(
            latent[old], mask_features[old], batch.objects[old, n], batch.motion[old, n], batch.class_ids[old, n]
        )
        distances.append(batch.weight[old, 0] * (masks[old, n] - teacher_logits.sigmoid().detach()).abs())
        for rows, teaches in (([e[old, n] for e in embeddings], False), (teacher_embeddings, True)):
            for modality, row in zip(modalities, rows, strict=True):
                modality.append(row.detach() if teaches else row)
            video_ids.append(batch.video_ids[old, n])
            class_ids.append(batch.class_ids[old, n])
            is_teacher.append(torch.full((int(old.sum()),), teaches, device=old.device))
    contrast = similarity_distillation_reference(
        [torch.cat(rows) for rows in modalities],
        torch.cat(video_ids),
        torch.cat(class_ids),
        teacher_rows=torch.cat(is_teacher),
    )
    distillation = torch.cat(distances).mean() if distances else logits.new_zeros(())
    loss = separation + 0.1 * contrast[0] + 0.3 * contrast[1] + 0.3 * distillation
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return {
        "loss": loss.item(),
        "separation": separation.item(),
        "instance": contrast[0].item(),
        "class": contrast[1].item(),
        "distillation": distillation.item(),
    }


def _sine_sequence(length: int, dim: int) -> Tensor:
    table = torch.zeros(length, dim)
    for t in range(length):
        for i in range(0, dim, 2):
            angle = t / 10000 ** (i / dim)
            table[t, i] = math.sin(angle)
            table[t, i + 1] = math.cos(angle)
    return table


def _sine_map(height: int, width: int, dim: int) -> Tensor:
    """[HW, D]: y in the first half of the channels, x in the second, coordinates from 1 scaled to 2 pi."""
    half = dim // 2
    rates = 10000 ** (2 * torch.div(torch.arange(half), 2, rounding_mode="floor") / half)

    def axis(length: int) -> Tensor:
        coordinate = torch.arange(1, length + 1, dtype=torch.float32) / (length + 1e-6) * 2 * math.pi
        angles = coordinate[:, None] / rates
        return torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), dim=2).flatten(1)

    y, x = axis(height), axis(width)
    table = torch.cat((y[:, None, :].repeat(1, width, 1), x[None, :, :].repeat(height, 1, 1)), dim=2)
    return table.reshape(height * width, dim)
