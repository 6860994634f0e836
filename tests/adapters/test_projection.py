"""Projections: which way they are gone, that they undo a drift, what stays as it was, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from avsep.encoders import AudioEncoder
from avsep.errors import ConfigError
from avsep.registry import ADAPTERS
from avsep.separator import build_separator, load_separator, save_separator
from avsep.separator.adapted import ProjectedEncoder
from avsep.types import AdapterPlace, AudioFeatures
from support.components import random_batch
from support.continual_runs import SEPARATORS

OLD, MIXED = [[0, 1], [1, 0]], [[0, 4], [5, 3]]


def projected(base="iquery", classes=("a", "b")):
    return build_separator(**{**SEPARATORS[base], "adapter": "projection"}, classes=classes, seed=3).eval()


def grown(*sizes, base="iquery"):
    """A separator after tasks of so many classes, whose every projection is something."""
    names = tuple("abcdefgh")
    separator = projected(base, names[: sizes[0]])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for k in range(1, len(sizes)):
            separator.grow(sum(sizes[: k + 1]), names[: sum(sizes[: k + 1])])
        for parameter in separator.adapters()[0].parameters():
            torch.nn.init.normal_(parameter, 0, 0.2)
    return separator


@torch.no_grad()
def logits(separator, class_ids):
    """Of always the same mixtures and frames."""
    return separator.predict(replace(random_batch(separator), class_ids=torch.tensor(class_ids))).output.logits


class Given(AudioEncoder):
    """In the place of an encoder: these features, whatever is heard; ``calls`` counts."""

    mask_channels = latent_channels = 32

    def __init__(self, features):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.features, self.calls = features, 0

    def forward(self, spectrogram):
        self.calls += 1
        return self.features


def cascade(features, *matrices):
    """The encoder with these projections [C, C], of the second task and those after it, of both maps."""
    places = [AdapterPlace(name, (32,), "map") for name in ("mask_features", "latent")]
    encoder = ProjectedEncoder(Given(features), ADAPTERS.create("projection", places=places))
    encoder.set_tasks((1,) * (1 + len(matrices)))
    with torch.no_grad():
        for step, matrix in zip(encoder.adapter.tasks, matrices, strict=True):
            for change in step.values():
                change.weight[:, :, 0, 0] = matrix - torch.eye(32, dtype=matrix.dtype)
    return encoder


def turned(matrix, features):
    return torch.einsum("ij,bjhw->bihw", matrix, features)


def residual(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def test_the_newest_projection_comes_first():
    """Two drifts in 32 dimensions, and what is left of them: nothing, and most of it in the other order."""
    rng = torch.Generator().manual_seed(0)
    first = torch.randn(2, 32, 4, 4, dtype=torch.float64, generator=rng)
    drifts = [torch.eye(32) + 0.1 * torch.randn(32, 32, dtype=torch.float64, generator=rng) for _ in range(2)]
    second = turned(drifts[0], first)
    third = turned(drifts[1], second)
    back = [torch.linalg.inv(drift) for drift in drifts]
    assert residual(third, first) > 0.5

    encoder = cascade(AudioFeatures(third, 2 * third), *back)
    with torch.no_grad():
        audio = encoder(torch.zeros(2, 1, 4, 4))
        for task, wanted in enumerate((first, second, third)):
            assert residual(audio.of_task(task).mask_features, wanted) < 1e-13
            assert residual(audio.of_task(task).latent, 2 * wanted) < 1e-13
        wrong = cascade(AudioFeatures(third, third), *back[::-1])(torch.zeros(2, 1, 4, 4)).of_task(0)
    assert audio.mask_features is third  # its own are those of the newest task
    assert audio.of_task(2).latent is encoder.encoder.features.latent
    assert encoder.encoder.calls == 1
    assert residual(wrong.mask_features, first) > 0.3


def test_an_undone_drift_gives_the_old_masks():
    """The last layer of the U-Net turns twice: with the turns undone in order, old classes get what they got."""
    separator = projected()
    wanted = logits(separator, OLD)
    rng = torch.Generator().manual_seed(0)
    left = [wanted]
    for names in ("abcd", "abcdef"):
        separator.grow(len(names), tuple(names))
        drift = torch.eye(4) + 0.3 * torch.randn(4, 4, generator=rng)
        with torch.no_grad():
            weight = separator.audio_encoder.encoder.up[6].weight
            weight.copy_(torch.einsum("ij,jklm->iklm", drift, weight))
            newest = separator.adapters()[0].tasks[-1]["mask_features"].weight
            newest.copy_((torch.linalg.inv(drift) - torch.eye(4))[:, :, None, None])
        left.append(logits(separator, [[len(names) - 1, len(names) - 2]] * 2))
    for found, then in zip((OLD, [[3, 2]] * 2, [[5, 4]] * 2), left, strict=True):
        scale = then.abs().max()
        torch.testing.assert_close(logits(separator, found) / scale, then / scale, atol=1e-4, rtol=0)
    for step in separator.adapters()[0].tasks:
        torch.nn.init.zeros_(step["mask_features"].weight)
    assert (logits(separator, OLD) - wanted).abs().max() > 0.05 * wanted.abs().max()


@pytest.mark.parametrize("base", ["iquery", "sound_of_pixels"])
def test_the_first_task_and_a_new_one_are_the_separator_itself(base):
    separator = projected(base)
    plain = build_separator(**SEPARATORS[base], classes=("a", "b"), seed=3).eval()
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in separator.parameters())
    before = logits(separator, OLD)
    assert torch.equal(before, logits(plain, OLD))
    separator.grow(4, tuple("abcd"))
    assert separator.spec.task_sizes == (2, 2)
    assert torch.equal(before, logits(separator, OLD))  # the identity, and new queries are hidden


def test_only_the_audio_encoder_carries_them_and_only_of_maps_that_are_read():
    both = grown(2, 2).adapters()
    assert [{place.parameter: place.shape for place in adapter.places} for adapter in both] == [
        {"mask_features": (4,), "latent": (16,)}
    ]
    (masks,) = grown(2, 2, base="sound_of_pixels").adapters()
    assert [place.parameter for place in masks.places] == ["mask_features"]
    with torch.device("meta"):
        separator = build_separator("iquery", adapter="projection", num_classes=5)
        separator.grow(10)
    assert sum(p.numel() for p in separator.adapters()[0].newest()) == 256 * 257 + 32 * 33 == 65_792 + 1_056


def test_each_projection_is_of_the_sources_before_its_task_alone():
    separator = grown(2, 2, 2)
    before = logits(separator, MIXED)  # of the tasks 0 and 2, and 2 and 1
    for task, changed in ((1, [[True, False], [False, True]]), (0, [[True, False], [False, False]])):
        kept = logits(separator, MIXED)
        with torch.no_grad():
            for parameter in separator.adapters()[0].tasks[task].parameters():
                parameter += 0.1
        assert (logits(separator, MIXED) != kept).flatten(2).any(dim=2).tolist() == changed
    assert torch.equal(logits(separator, MIXED)[0, 1], before[0, 1])


def test_only_the_newest_learns():
    separator = grown(2, 2, 2)
    (adapter,) = separator.adapters()
    older, newest = adapter.tasks
    assert not any(p.requires_grad for p in older.parameters())
    batch = replace(random_batch(separator), class_ids=torch.tensor(MIXED))
    separator.predict(batch).output.logits.square().mean().backward()
    assert all(p.grad is None for p in older.parameters())
    assert all(p.grad.abs().max() > 0 for p in newest.parameters())


@pytest.mark.parametrize("base", ["iquery", "sound_of_pixels"])
def test_merged_and_exported_separators_separate_alike(base):
    from avsep.export.build.graph import WaveformSeparator

    separator = grown(2, 1, 1, base=base)
    merged = separator.merged()
    assert merged.adapters() == []
    assert len([m for m in merged.modules() if isinstance(m, type(separator.audio_encoder.encoder))]) == 1
    for class_ids in ([[0, 3], [2, 1]], [[1, 0], [0, 0]], [[3, 3], [3, 3]]):
        torch.testing.assert_close(logits(separator, class_ids), logits(merged, class_ids), atol=1e-6, rtol=1e-6)
    batch = replace(random_batch(separator), class_ids=torch.tensor([[0, 2], [3, 1]]))
    with torch.no_grad():
        visual = separator.encode_visual(batch.visual)
        expected = separator.separate(batch.mixture, visual, batch.class_ids)
        features = [part for part in (visual.object, visual.motion) if part is not None]
        found = WaveformSeparator(separator)(batch.mixture, *features, batch.class_ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_save_and_load(tmp_path):
    separator = grown(2, 2, 2)
    save_separator(separator, tmp_path / "one")
    loaded = load_separator(tmp_path / "one")
    assert loaded.spec == separator.spec
    assert loaded.spec.task_sizes == (2, 2, 2)
    kept = logits(loaded, MIXED)
    assert torch.equal(kept, logits(separator, MIXED))
    loaded.grow(7, tuple("abcdefg"))
    assert torch.equal(kept, logits(loaded, MIXED))
    assert len(loaded.adapters()[0].tasks) == 3


def test_a_decoder_that_reads_other_maps_is_refused():
    with pytest.raises(ConfigError) as caught:
        projected("coseparation")
    assert str(caught.value) == (
        "adapter 'projection' projects mask_features and latent, and mask decoder 'conditioned_unet' reads bottleneck "
        "and skips: leave the adapter out, or choose query_transformer"
    )


@pytest.mark.slow
def test_it_is_exported(tmp_path):
    """Which holds the graph against PyTorch."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from avsep.export import export

    bundle = export(grown(2, 1, 1), None, tmp_path / "bundle", made_from="a test")
    assert "separator" in {graph.kind for graph in bundle.graphs}
