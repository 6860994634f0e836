"""Stores whose labels expand: half of the clips are labelled with their instrument's family, the others with itself.

Source: the setting of Lee et al., Online Continual Learning on Hierarchical Label Expansion, ICCV 2023, where coarse
classes come first and their parts later. A stream over such a store begins with the families as its classes and goes on
with the instruments. The paper's pseudo-labels are not needed: a source's class is asked for, never guessed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from avsep.data.store.files import SPLITS, UNFIT, VIDEOS_FILE, Store
from avsep.errors import ConfigError, DataError, near_matches
from avsep.files import link_or_copy, refuse_file, staging_folder, write_json
from avsep.progress import Progress

__all__ = ["family_shares", "write_families"]


def write_families(
    store: Store,
    out: str | Path,
    families: Mapping[str, Sequence[str]],
    *,
    percent: int = 50,
    seed: int = 0,
    bars: Progress | None = None,
) -> Store:
    """Write a store in which some clips of the families' classes are labelled with the family; returns it.

    Its classes are the families, in the order that they are given in, and then the store's. Files are linked where the
    disk allows it, else copied. A class of no family stays as it is.

    Args:
        store: whose clips they are.
        out: the new store's folder; it is whole or absent.
        families: by the name of a family its classes.
        percent: of a class's clips of each split (rounded down, at least one and never all) that are labelled with the
            family.
        seed: of the choice of these clips.

    Raises:
        ConfigError: a class is not in the store or in two families, a family is named like a class or has no name that
            a task could be given by, or a class has a single clip of a split.
        DataError: the store's files are in shards, or the folder holds something.
    """
    out, bars = Path(out), bars or Progress()
    shares = family_shares(store, families, percent=percent, seed=seed)
    if "shards" in store.manifest:
        raise DataError(f"the files of {store.path} are in shards: give the store that these were made of")
    refuse_file(out)
    if out.is_dir():
        if there := sorted(p.name for p in out.iterdir()):
            raise DataError(f"{out} is not empty (it holds '{there[0]}'): choose another folder")
        out.rmdir()
    manifest = json.loads(json.dumps(store.manifest))
    manifest["classes"] = [*families, *store.classes]
    manifest["origin"] = {
        **manifest.get("origin", {}),
        "families": {name: list(classes) for name, classes in families.items()},
        "family_percent": percent,
        "family_seed": seed,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(out) as folder:
        bar = bars.add("linking clips", total=len(manifest["clips"]))
        for entry in manifest["clips"]:
            entry["class"] = shares.get(entry["id"], entry["class"])
            for record in entry["files"].values():
                target = folder / record["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(store.path / record["path"], target)
            bars.advance(bar)
        if (videos := store.path / VIDEOS_FILE).is_file():
            shutil.copyfile(videos, folder / VIDEOS_FILE)
        write_json(folder / "manifest.json", manifest)
        Store.open(folder)  # what cannot be read is not left there
        os.rename(folder, out)
    return Store.open(out)


def family_shares(
    store: Store, families: Mapping[str, Sequence[str]], *, percent: int = 50, seed: int = 0
) -> dict[str, str]:
    """The clips that are labelled with a family, by id, and with which (:func:`write_families`)."""
    if not 0 < percent < 100:
        raise ConfigError(f"percent must be 1 to 99, got {percent}: families and classes both need clips")
    if not families:
        raise ConfigError("there are no families: give at least one, with its classes")
    of_class: dict[str, str] = {}
    for family, members in families.items():
        if family != family.strip() or not family or UNFIT.search(family) or set(family) & set(",;"):
            raise ConfigError(
                f"{family!r} cannot be the name of a family: leave out commas, semicolons and outer spaces"
            )
        if family in store.classes:
            raise ConfigError(f"family '{family}' is named like a class of the store: give it another name")
        if not members:
            raise ConfigError(f"family '{family}' has no classes: name at least one")
        for name in members:
            if name not in store.classes:
                near = near_matches(name, store.classes)
                raise ConfigError(f"family '{family}' names class '{name}', which the store lacks: {near}")
            if name in of_class:
                raise ConfigError(f"class '{name}' is named twice, in families '{of_class[name]}' and '{family}'")
            of_class[name] = family
    shares: dict[str, str] = {}
    for number, (name, family) in enumerate(of_class.items()):
        for place, split in enumerate(SPLITS):
            ids = [clip.id for clip in store.select(classes=[name], split=split)]
            if len(ids) == 1:
                raise ConfigError(
                    f"class '{name}' has a single {split} clip, and its family needs one too: add another"
                )
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number, place])))
            count = max(len(ids) * percent // 100, 1) if ids else 0
            shares.update((ids[i], family) for i in rng.permutation(len(ids))[:count])
    return shares
