#!/usr/bin/env python3
"""Make the separator that comes with avsep: its data, its training, its scores, its card. Goes on after a kill.

    python scripts/ship_separator.py work --bank FluidR3_GM.sf2 --bank GeneralUser_GS.sf2 --holdout-bank TimGM6mb.sf2

Trains on the sounds of ``--bank``, whose licences must allow it, and scores on those of ``--holdout-bank``, none of
which is trained on or shipped. A class is offered only if the separator, asked by name alone, beats a static filter on
the held-out bank by more than the 95 % interval of the difference. ``--into`` takes the result.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

NAME = "instruments"
SAMPLE = ("flute", "piano")  # what sounds in the sample
SEED = 1234
# Of the benchmark's 20 those that General MIDI has: its erhu, guzheng, pipa and ukulele are other instruments.
CLASSES = (
    "accordion,acoustic_guitar,bagpipe,banjo,bassoon,cello,clarinet,drum,electric_bass,flute,piano,saxophone,trumpet,"
    "tuba,violin,xylophone"
)
EXEMPLARS = 3  # crops of a class that the run keeps
APART = {"val": 1, "test": 2}  # crops of a class that are shipped to validate and test on, as sounds
SETTINGS = (
    "separator.audio_encoder.params.base_channels=16",
    "separator.adapter.name=low_rank",
    "separator.adapter.params.audio_encoder=true",
    "separator.adapter.params.rank=8",
    "separator.adapter.params.conv_rank=8",
    f"memory.params.per_class={EXEMPLARS}",
    "memory.params.keep=clip",
    "train.epochs=20",
    "train.mixer.params.unseen=0.5",  # most will ask by name alone
    "train.mixer.params.same_class=0.2",
)
LATER = {  # what tasks that are added are learned with
    "epochs": 4,
    "current_repeats": 400,
    "validate_every": 4,
    "mixer": {"params": {"current": 0.7}},
}
LICENCES = {
    "FluidR3_GM": "MIT",
    "GeneralUser_GS_v1.471": "GeneralUser GS licence 2.0: free use, also commercial",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="Folder to work in, about 3 GB.")
    parser.add_argument(
        "--bank", type=Path, action="append", required=True, help="SoundFont to train on; again for more."
    )
    parser.add_argument("--holdout-bank", type=Path, required=True, help="SoundFont to test on alone.")
    parser.add_argument("--into", type=Path, default=Path(__file__).parents[1] / "avsep" / "models" / NAME)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    store, run = folder / "store", folder / "run"
    banks = [word for bank in arguments.bank for word in ("--bank", str(bank))]
    holdout = ["--holdout-bank", str(arguments.holdout_bank)]
    _avsep(
        "data",
        "synth",
        str(store),
        "--version",
        "2",
        "--size",
        "small",
        "--classes",
        CLASSES,
        *banks,
        *holdout,
    )
    if not (run / "tasks" / "00" / "task.json").is_file():
        resume = ["--resume"] if (run / "run.yaml").is_file() else _new_run(store)
        _avsep("train", *resume, "--out", str(run))
    carried = folder / "carried"
    if not (carried / "memory" / "manifest.json").is_file():
        shutil.rmtree(carried, ignore_errors=True)
        shutil.copytree(run, carried)
        _avsep("memory", str(carried), "--carry")
    made = folder / "made"
    shutil.rmtree(made, ignore_errors=True)
    pack(carried, made)
    _sample(folder, arguments.bank[0], made)
    scores = score(made / "separator", store)
    write_card(made, scores, store, run)
    shutil.rmtree(arguments.into, ignore_errors=True)
    shutil.copytree(made, arguments.into)
    size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
    print(f"{arguments.into}: {size / 1e6:.1f} MB")


def _new_run(store: Path) -> list[str]:
    settings = [word for setting in (*SETTINGS, f"train.seed={SEED}") for word in ("--set", setting)]
    how = ["--preset", "aligned", "--strategy", "task_adapters", "--memory", "random_per_class"]
    return [str(store), *how, "--classes-per-task", str(CLASSES.count(",") + 1), *settings]


def _avsep(*words: str) -> None:
    print("avsep", *words, flush=True)
    subprocess.run([sys.executable, "-m", "avsep", *words], check=True)


def pack(carried: Path, made: Path) -> None:
    """Write the weights in half precision, and the rest of the run with as much of its memory as a package can bear."""
    from avsep.data.protocol import centre_start
    from avsep.data.store import Store, StoreWriter
    from avsep.data.store.selection import Selected, write_selection
    from avsep.data.tasks import task_stream
    from avsep.memory.base import read_exemplars
    from avsep.runs.folder import RunFolder
    from avsep.separator import load_separator, save_separator
    from avsep.spec import RunSpec, validated

    run = RunFolder(carried)
    spec, separator, memory = run.spec(), load_separator(run), Store.open(run.memory)
    front_end = spec.separator.front_end
    kept = {e.id: e.start for of in read_exemplars(run, 0).values() for e in of}
    part = made / "run"
    new = RunFolder(part)
    save_separator(separator, new.task(0).separator, half=True)
    apart = [
        clip for name in memory.classes for split, count in APART.items()
        for clip in memory.select(classes=[name], split=split)[:count]
    ]  # fmt: skip
    cut = made / "cut"
    with StoreWriter(cut, classes=memory.classes, sample_rate_hz=memory.sample_rate_hz, origin={}) as writer:
        for clip in apart:
            start = centre_start(clip, memory.sample_rate_hz, front_end.clip_samples)
            sound = memory.read_audio(clip, start, front_end.clip_samples)
            writer.write_clip(clip.id, clip.class_name, clip.split, sound)
        short = writer.finish([clip.id for clip in apart])
    exemplars = [Selected(memory, c, c.id, (kept[c.id] or 0,)) for c in memory.select(split="train") if c.id in kept]
    final = write_selection(
        new.memory,
        [*exemplars, *(Selected(short, clip, clip.id) for clip in short.clips)],
        classes=memory.classes,
        sources=separator.visual_sources(),
        front_end=front_end,
        origin=memory.manifest["origin"],
        licence=memory.manifest["licence"],
    )
    data = spec.model_dump(mode="json")
    data["train"] = _merged(data["train"], LATER)
    data["memory"]["params"]["short_class"] = "all"  # of few recordings that are given
    data |= {"store": new.memory.name, "store_hash": final.content_hash}
    spec = validated(RunSpec, data, "run")
    new.write_spec(spec)
    stream = task_stream(final, spec.tasks, protocol=spec.protocol, clip_samples=front_end.clip_samples)
    stream.protocol.save(new.protocol_file)
    new.task(0).write_record(run.task(0).record())
    shutil.copytree(new.task(0).separator, made / "separator")
    shutil.rmtree(new.task(0).separator)
    with zipfile.ZipFile(made / "memory.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file in sorted(p for p in part.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(file.relative_to(part).as_posix())  # without this moment's date
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED, 9)
    shutil.rmtree(part)
    shutil.rmtree(cut)


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    found = dict(one)
    for key, value in other.items():
        found[key] = _merged(found[key], value) if isinstance(value, dict) else value
    return found


def _sample(folder: Path, bank: Path, made: Path) -> None:
    """A duet of phrases that are in no split, played by a bank whose licence allows it to be passed on."""
    from avsep.media.audio import write_audio
    from avsep.media.video import read_sound

    store, duet = folder / "sample", folder / "duet"
    _avsep("data", "synth", str(store), "--version", "2", "--size", "tiny", "--seed", "77", "--clips", "1,1,1",
           "--classes", ",".join(SAMPLE), "--bank", str(bank))  # fmt: skip
    shutil.rmtree(duet, ignore_errors=True)
    _avsep("data", "mix", str(store), "--clips", ",".join(f"{name}-test-000" for name in SAMPLE), "--out", str(duet))
    sound, rate_hz = read_sound(duet / "duet.wav")
    write_audio(made / "sample.flac", sound[0], rate_hz)


def score(separator_folder: Path, store_folder: Path) -> list[dict[str, Any]]:
    """By class the SDR improvement in dB on the test pairs: by name alone, with pictures, and of the static filter."""
    from avsep.data.store import Store
    from avsep.data.tasks import task_stream
    from avsep.dsp import FrontEnd
    from avsep.evaluation.continual import paired_bootstrap
    from avsep.evaluation.scores import evaluate_separator, rows_of
    from avsep.evaluation.yardsticks import StaticFilter, measure
    from avsep.separator import load_separator

    separator, store = load_separator(separator_folder), Store.open(store_folder)
    front_end = separator.spec.front_end
    tests = task_stream(store, [separator.classes], clip_samples=front_end.clip_samples).protocol.at(0)
    by_name = [replace(m, roles=("unseen_source",) * len(m.clips)) for m in tests]
    found = {
        "seen": rows_of(evaluate_separator(separator, store, tests, interference=False)),
        "unseen": rows_of(evaluate_separator(separator, store, by_name, interference=False)),
    }
    rows = measure(tests, store, front_end, StaticFilter.fit(store, separator.classes, FrontEnd(front_end)))
    found["filter"] = [row for row in rows if row["yardstick"] == "static filter"]
    values = {key: np.array([np.nan if r["sdri"] is None else r["sdri"] for r in of]) for key, of in found.items()}
    clips = np.array([row["clip"] for row in found["seen"]])
    classes = np.array([row["class"] for row in found["seen"]])
    scores = []
    for name in separator.classes:
        own = (classes == name) & np.isfinite(values["seen"] + values["unseen"] + values["filter"])
        gain = paired_bootstrap(values["unseen"][own], values["filter"][own], groups=clips[own])
        means = {key: round(float(of[own].mean()), 3) for key, of in values.items()}
        interval = {"difference": gain.mean, "low": gain.low, "high": gain.high}
        scores.append(
            {"class": name, **means, **{k: round(float(v), 3) for k, v in interval.items()}, "mixtures": int(own.sum())}
        )
    return scores


def write_card(made: Path, scores: list[dict[str, Any]], store_folder: Path, run: Path) -> None:
    from avsep import __version__
    from avsep.data.store import Store
    from avsep.files import read_yaml, sha256_file, write_json
    from avsep.runs.folder import RunFolder
    from avsep.separator import load_separator

    store, separator = Store.open(store_folder), load_separator(made / "separator")
    origin = store.manifest["origin"]
    (tested_on,) = origin["test_banks"]
    offered = [row["class"] for row in scores if row["low"] > 0]
    record = RunFolder(run).task(0).record()
    trained = [{**bank, "licence": LICENCES.get(Path(bank["name"]).stem, "see the bank")} for bank in origin["banks"]]
    names = " and ".join(Path(bank["name"]).stem for bank in trained)
    files = sorted(p for p in made.rglob("*") if p.is_file())
    write_json(
        made / "card.json",
        {
            "summary": f"{len(offered)} instruments at {separator.spec.front_end.sample_rate_hz} Hz, asked for by name",
            "about": {
                "trained on": f"the offline benchmark, version 2, played by the SoundFonts {names}: sampled "
                "instruments, composed phrases, drawn players",
                "good for": "a first try, and a separator to teach more instruments (avsep learn)",
                "not for": "music production: its sound ends at 5.5 kHz; singing, speech and "
                "instruments that it does not know; telling two of one instrument apart in a real video",
                "pictures": "it learned to look at drawn players, so it is asked by name alone unless --look is given; "
                "on filmed players it was never tested",
                "licence": "MIT",
            },
            "classes": offered,
            "left_out": [row["class"] for row in scores if row["low"] <= 0],
            "sample_rate_hz": separator.spec.front_end.sample_rate_hz,
            "licence": "MIT",
            "parameters": sum(p.numel() for p in separator.parameters()),
            "trained_on": trained,
            "tested_on": tested_on,
            "scores": scores,
            "sample_classes": list(SAMPLE),
            "training": {"seed": SEED, "settings": list(SETTINGS), "seconds": record.get("seconds")},
            "store": store.content_hash,
            "avsep": __version__,
            "run": read_yaml(run / "run.yaml")["train"],
            "files": {file.relative_to(made).as_posix(): sha256_file(file) for file in files},
        },
    )
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
