"""The data of a grid: a store that is there, or the offline benchmark, made if missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from avsep.data.store import SPLITS, Clip, OtherStoreError, Store, add_features
from avsep.data.synth.phrases import CLASSES
from avsep.data.synth.synthesis import MOTION_RATES_HZ, OBJECT_RATE_HZ, SAMPLE_RATE_HZ, SIZES, SIZES_V2, synthesise
from avsep.environment import torch_threads
from avsep.errors import ConfigError
from avsep.progress import Progress, progress_bar
from avsep.registry import VISUAL_ENCODERS
from avsep.reproduce.preset import GridPreset

__all__ = ["BENCHMARK", "SYNTH", "open_dataset", "planned_dataset", "store_object_features"]

_FEATURE_THREADS = 2  # their last bits depend on it, and so does by their hash every cell that reads them

SYNTH = "synth"
BENCHMARK = "offline benchmark"


def open_dataset(name: str, preset: GridPreset, folder: Path, *, progress: bool | Progress = True) -> tuple[Store, str]:
    """The store ``name``, or for ``synth`` the offline benchmark in ``folder`` as the preset describes it, and what to
    call it in tables. What is there of the benchmark is kept, and a killed making goes on."""
    if name != SYNTH:
        store = Store.open(name)
        made_by = (store.manifest.get("origin") or {}).get("generator")
        return store, BENCHMARK if made_by == "avsep data synth" else Path(name).resolve().name
    sizes = preset.dataset
    for feature in sizes.features:
        VISUAL_ENCODERS.create(feature)  # a missing package or weight shows before the clips are made
    try:
        store = synthesise(
            folder,
            version=sizes.version,
            size=sizes.size,
            classes=sizes.classes,
            seed=sizes.seed,
            clips_per_class=sizes.clips_per_class,
            clip_s=sizes.clip_s,
            progress=progress,
        )
    except OtherStoreError as error:  # a grid has no --force: the cells in its folder belong to that store
        raise ConfigError(f"{error.fact}: choose another --out, or remove {folder}") from error
    for feature in sizes.features:
        if feature not in store.features:
            store = store_object_features(store, feature, progress=progress)
    return store, BENCHMARK


def planned_dataset(preset: GridPreset) -> Store:
    """The offline benchmark as the preset describes it, without a file: its classes and clips, to plan a grid with
    before there is one. Nothing of it can be read, and its hash is not that of a store."""
    sizes = preset.dataset
    chosen = (SIZES if sizes.version == 1 else SIZES_V2)[sizes.size]
    names = sorted(sizes.classes or chosen.classes, key=CLASSES.index)
    samples = round((chosen.clip_s if sizes.clip_s is None else sizes.clip_s) * SAMPLE_RATE_HZ)
    kinds = ("audio", "object", "motion", *(f"features/{name}" for name in sizes.features))
    file = {"path": "", "sha256": "", "bytes": 0}
    clips = [
        {
            "id": f"{name}-{split}-{number:03d}",
            "class": name,
            "split": split,
            "samples": samples,
            "files": dict.fromkeys(kinds, file),
        }
        for name in names
        for split, count in zip(SPLITS, sizes.clips_per_class or chosen.clips_per_class, strict=True)
        for number in range(count)
    ]
    features = {
        name: {"role": "object", "dim": VISUAL_ENCODERS.create(name).dim, "steps": None} for name in sizes.features
    }
    rates = {"sample_rate_hz": SAMPLE_RATE_HZ, "object_rate_hz": OBJECT_RATE_HZ}
    rates["motion_rate_hz"] = MOTION_RATES_HZ[sizes.version]
    return Store(Path("planned"), {**rates, "classes": names, "clips": clips, "features": features})


def store_object_features(store: Store, encoder: str, *, progress: bool | Progress = True) -> Store:
    """Add what a frozen visual encoder gives for each object frame of a store, under its name, as float16 vectors.

    They are computed once and read by the ``precomputed`` encoder. Raises :class:`ConfigError` for an encoder that is
    trained, whose vectors would change, or that takes no frames.
    """
    import contextlib

    import torch

    network = VISUAL_ENCODERS.create(encoder)
    if not network.frozen or network.source().kind != "frames" or network.source().role != "object":
        raise ConfigError(f"visual encoder '{encoder}' is no frozen encoder of object frames: nothing to store")
    with contextlib.ExitStack() as stack:
        bars = progress if isinstance(progress, Progress) else stack.enter_context(progress_bar(progress))
        bar = bars.add("object features", total=len(store.clips))

        def features(clip: Clip) -> np.ndarray:
            frames = store.timeline(clip).object
            assert frames is not None
            with torch.no_grad():
                vectors: torch.Tensor = network(torch.from_numpy(np.array(frames))[:, None])  # each frame for itself
            bars.advance(bar)
            return vectors.numpy().astype(np.float16)

        with torch_threads(_FEATURE_THREADS):
            return add_features(store, encoder, "object", features)
