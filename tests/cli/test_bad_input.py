"""What people get wrong, one case each, through the command line: one clear line, exit code 2, nothing lost or begun.

Every case runs a command in a folder of its own. Afterwards standard error holds one line that names what is wrong and
a way out, and the folder holds byte for byte what it held before.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file

from avsep.data.synth.synthesis import find_banks
from support.commands import run
from support.folders import contents
from support.tones import RATE, TINY_SEPARATOR, TINY_TRAIN

TASKS = "ding,hum;peep,whirr"
EXPORT_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def lines_of(text: str) -> list[str]:
    """The lines of standard error that say something: not empty, not the bar of work that was done before."""
    return [line for line in text.splitlines() if line.strip() and "━" not in line]


@dataclass
class Desk:
    """A folder to work in, with copies of a store and a run to spoil."""

    path: Path
    tone_store: Path
    tone_run: Path
    cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def store(self) -> Path:
        if not (self.path / "store").exists():
            shutil.copytree(self.tone_store, self.path / "store")
        return self.path / "store"

    @property
    def run(self) -> Path:
        if not (self.path / "run").exists():
            shutil.copytree(self.tone_run, self.path / "run")
        return self.path / "run"

    @property
    def preset(self) -> Path:
        return self.write_preset()

    def write_preset(self, separator: dict | None = None, **train) -> Path:
        path = self.path / "tiny.yaml"
        path.write_text(
            yaml.safe_dump({"separator": {**TINY_SEPARATOR, **(separator or {})}, "train": {**TINY_TRAIN, **train}})
        )
        return path

    def train(self, *more: object, store: object = None, preset: object = None, tasks: str | None = TASKS) -> list:
        chosen = ["--tasks", tasks] if tasks is not None else []
        store, preset = store or self.tone_store, preset or self.preset
        return ["train", store, "--preset", preset, *chosen, "--out", self.path / "new", *more]

    def resume(self, *more: object) -> list:
        return ["train", "--out", self.run, "--resume", *more]

    def features(self) -> Path:
        path = self.path / "features.npz"
        assert run("data", "features", self.tone_store, "--clips", "ding-test-0,peep-test-0", "--out", path) == 0
        return path

    def wave(self, samples: object = None, name: str = "sound.wav", rate_hz: int = RATE) -> Path:
        if samples is None:
            samples = 0.1 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
        soundfile.write(self.path / name, np.asarray(samples, dtype=np.float32), rate_hz, subtype="FLOAT")
        return self.path / name

    def separate(
        self, audio: object = None, *more: object, classes: str = "ding,peep", features: object = None
    ) -> list:
        return [
            *("separate", audio or self.wave(), "--run", self.tone_run, "--classes", classes),
            *("--features", features or self.features(), "--out", self.path / "separated", *more),
        ]

    def spoil(self, path: Path, text: str | bytes) -> Path:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def truncate(self, path: Path, share: float = 0.5) -> Path:
        return self.spoil(path, path.read_bytes()[: int(share * path.stat().st_size)])

    def edit(self, path: Path, change: Callable[[dict], object]) -> Path:
        data = json.loads(path.read_text())
        change(data)
        return self.spoil(path, json.dumps(data))

    def hold(self, folder: Path) -> None:
        """Write in ``folder`` from another process, until the test ends."""
        script = (
            "import sys; from avsep.files import FolderLock\n"
            "with FolderLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.cleanup.callback(other.communicate)
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"


@pytest.fixture
def desk(tmp_path, tone_store, tone_run, monkeypatch) -> Iterator[Desk]:
    made = Desk(tmp_path / "desk", tone_store, tone_run)
    made.path.mkdir()
    monkeypatch.chdir(made.path)
    with made.cleanup:
        yield made


@dataclass(frozen=True)
class Case:
    name: str
    command: Callable[[Desk], list]
    says: tuple[str, ...]
    """What stands in the one line: the offending value, and the way out."""
    needs: tuple[str, ...] = ()


def case(name: str, command: Callable[[Desk], list], *says: str, needs: tuple[str, ...] = ()) -> Case:
    return Case(name, command, says, needs)


def _set(value: str) -> Callable[[Desk], list]:
    return lambda d: d.train("--set", value)


def _chopped(name: str, share: float = 0.5) -> Callable[[Desk], list]:
    def command(d: Desk) -> list:
        d.truncate(d.store / name, share)
        return d.train(store=d.store)

    return command


def _manifest(change: Callable[[dict], object]) -> Callable[[Desk], list]:
    def command(d: Desk) -> list:
        d.edit(d.store / "manifest.json", change)
        return d.train(store=d.store)

    return command


def _damaged(path: str, command: Callable[[Desk], list], text: str | bytes | None = None) -> Callable[[Desk], list]:
    """``command`` after the run's file ``path`` (a pattern) was cut in half, or replaced by ``text``."""

    def spoilt(d: Desk) -> list:
        for file in sorted(d.run.glob(path))[:1]:
            if text is None:
                d.truncate(file)
            else:
                d.spoil(file, text)
            return command(d)
        raise AssertionError(f"the run has no {path}")

    return spoilt


def _flipped(d: Desk) -> list:
    """One bit of one recording."""
    file = d.store / "audio" / "hum-val-1.wav"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    d.spoil(file, bytes(data))
    return ["data", "check", d.store]


def _silent_store(d: Desk) -> list:
    from avsep.data.store import StoreWriter

    with StoreWriter(d.path / "quiet", classes=["a"], sample_rate_hz=RATE, origin={}) as writer:
        writer.write_clip("one", "a", "train", np.zeros(RATE, np.float32))
        writer.finish(["one"])
    return ["data", "check", d.path / "quiet"]


def _other_rate(d: Desk) -> list:
    front_end = {**TINY_SEPARATOR["front_end"], "sample_rate_hz": 16000}
    return d.train(preset=d.write_preset({"front_end": front_end}))


def _with_features(d: Desk, width: int, params: dict, role: str = "object") -> list:
    from avsep.data.store import Store, add_features

    add_features(Store.open(d.store), "clip", role, lambda clip: np.zeros((3, width), np.float32))
    return d.train(store=d.store, preset=d.write_preset({"object_encoder": {"name": "precomputed", "params": params}}))


def _unfinished_store(d: Desk) -> list:
    (d.store / "manifest.json").unlink()
    (d.store / ".journal").mkdir()
    return d.train(store=d.store)


def _features_beyond(d: Desk) -> list:
    from avsep.data.store import Store, add_features

    add_features(Store.open(d.store), "clip", "object", lambda clip: np.zeros((3, 8), np.float32))
    file = d.store / "features" / "clip" / "hum-train-0.npy"
    array = np.load(file)
    array[0, 0] = np.nan
    with open(file, "wb") as target:
        np.save(target, array)
    from avsep.files import sha256_file

    def state(manifest: dict) -> None:
        for clip in manifest["clips"]:
            if clip["id"] == "hum-train-0":
                clip["files"]["features/clip"]["sha256"] = sha256_file(file)

    d.edit(d.store / "manifest.json", state)
    return ["data", "check", d.store]


def _no_task_yet(command: Callable[[Desk], list]) -> Callable[[Desk], list]:
    def unfinished(d: Desk) -> list:
        shutil.rmtree(d.run / "tasks")
        return command(d)

    return unfinished


def _separate_run(run_of: Callable[[Desk], Path]) -> Callable[[Desk], list]:
    return lambda d: [
        *("separate", d.wave(), "--run", run_of(d), "--classes", "ding,peep"),
        *("--features", d.features(), "--out", d.path / "separated"),
    ]


def _held_run(d: Desk) -> list:
    d.hold(d.run)
    return d.resume()


def _held_store(d: Desk) -> list:
    store = d.path / "making"
    (store / ".journal").mkdir(parents=True)
    d.hold(store)
    return ["data", "synth", store, "--classes", "flute", "--clips", "1,1,1", "--clip-s", "1", "--workers", "1"]


def _foreign(d: Desk) -> Path:
    (d.path / "new").mkdir()
    (d.path / "new" / "thesis.tex").write_text("years of work")
    return d.path / "new"


def _after(*steps: Callable[[Desk], object]) -> Callable[[Desk], list]:
    """The last step's command, after the others were done."""

    def command(d: Desk) -> list:
        result: object = None
        for step in steps:
            result = step(d)
        assert isinstance(result, list)
        return result

    return command


def _pickled(d: Desk) -> Path:
    np.savez(d.path / "evil.npz", **{"ding/object": np.array([{"a": 1}], dtype=object)})
    return d.path / "evil.npz"


def _bare(d: Desk) -> Path:
    np.save(d.path / "bare.npy", np.zeros(3))
    return d.path / "bare.npy"


def _other_arrays(**arrays: np.ndarray) -> Callable[[Desk], Path]:
    def write(d: Desk) -> Path:
        np.savez(d.path / "other.npz", **{k.replace("__", "/"): v for k, v in arrays.items()})
        return d.path / "other.npz"

    return write


def _sound(write: Callable[[Desk], object]) -> Callable[[Desk], list]:
    return lambda d: d.separate(write(d))


def _seen(write: Callable[[Desk], object]) -> Callable[[Desk], list]:
    return lambda d: d.separate(features=write(d))


def _export(*more: object) -> Callable[[Desk], list]:
    return lambda d: ["export", d.tone_run, "--all-tasks", "--out", d.path / "new", *more]


def _evaluate(d: Desk) -> list:
    return ["evaluate", d.run]


def _report(d: Desk) -> list:
    return ["report", d.run]


NOISE = np.random.default_rng(0).standard_normal(4000).astype(np.float32) * 0.1
DIFFERENT = ("--set", "train.partner=different_class")
ABSENT = "mps" if torch.cuda.is_available() else "cuda"
CASES = [
    # unknown names
    case("unknown strategy", lambda d: d.train("--strategy", "contavsepp"), "contavsepp", "'contavsep'"),
    case("unknown memory", lambda d: d.train("--memory", "random"), "'random'", "random_per_class"),
    case("unknown preset", lambda d: d.train(preset="iqery"), "'iqery'", "'iquery'", "avsep list"),
    case("unknown preset file", lambda d: d.train(preset=d.path / "no.yaml"), "no.yaml", "no such file"),
    case("preset that is none", lambda d: d.train(preset=d.spoil(d.path / "p.yaml", "a: 1")), "p.yaml", "separator"),
    case("preset that is not YAML", lambda d: d.train(preset=d.spoil(d.path / "p.yaml", "a: [")), "p.yaml", "YAML"),
    case("unknown component", _set("separator.audio_encoder.name=unet"), "'unet'", "'unet7'"),
    case("unknown parameter", _set("separator.audio_encoder.params.base=4"), "'base'", "base_channels"),
    case("unknown strategy parameter", _set("strategy.params.weight_masks=0"), "weight_masks", "weight_mask'"),
    case("unknown memory parameter", _set("memory.params.size=2"), "'size'", "per_class"),
    case("unknown setting", _set("train.batchsize=2"), "batchsize", "batch_size"),
    case("unknown group of settings", _set("trian.batch_size=2"), "trian", "'train'"),
    case("setting below a value", _set("train.epochs.x=2"), "train.epochs.x=2", "epochs"),
    case("setting without a value", _set("train.epochs"), "train.epochs", "KEY=VALUE"),
    case("setting of a wrong kind", _set("train.epochs=many"), "epochs", "many", "integer"),
    case("setting that is too small", _set("train.batch_size=0"), "batch_size", "0", "greater"),
    case("setting that is not YAML", _set("train.epochs=[1"), "train.epochs=[1", "YAML"),
    case("unknown precision", _set("train.precision=half"), "half", "16-mixed"),
    case("gain without end", _set("train.gain=[1, .inf]"), "train.gain", "inf", "finite"),
    case("gain beyond sense", _set("train.gain=[1, 1e300]"), "gain", "1000"),
    case("rate beyond sense", _set("train.decoder.lr=1.0e+308"), "lr", "1e+308", "1000"),
    case("batch beyond memory", _set("train.batch_size=1000000000000"), "batch_size", "65536"),
    case("number of 5000 digits", _set("train.epochs=" + "9" * 5000), "train.epochs", "YAML"),
    case("aliases without end", _set("train.gain=[&a [1], *a, *b]"), "train.gain", "YAML"),
    case("far too many processes", lambda d: d.train("--devices", "9999"), "--devices 9999", "at most"),
    case("logger that is two dots", lambda d: d.train("--logger", ".."), "logger", "'..'"),
    case("parameter of a wrong kind", _set("separator.audio_encoder.params.base_channels=many"), "unet7", "many"),
    case("parameter below nothing", _set("separator.audio_encoder.params.base_channels=-4"), "base_channels", "-4"),
    case("parameter of nothing", _set("separator.mask_decoder.params.heads=0"), "heads", "0"),
    case("parameters that do not divide", _set("separator.mask_decoder.params.heads=3"), "16", "3"),
    case("encoder in a wrong place", _set("separator.object_encoder=motion_cnn"), "motion_cnn", "object"),
    case("decoder without its object", _set("separator.object_encoder=null"), "query_transformer", "object_encoder"),
    case("parameter of half a kind", _set("separator.mask_decoder.params.heads=2.5"), "heads", "2.5", "int"),
    case("memory of none", _set("memory.params.per_class=0"), "per_class", "0", "'none'"),
    case("unknown protocol", lambda d: d.train("--protocol", "papre"), "papre", "'paper'"),
    case("unknown kind to list", lambda d: ["list", "strategy"], "'strategy'", "'strategies'"),
    case("unknown device of train", lambda d: d.train("--device", "tpu"), "'tpu'", "cpu"),
    case("numbered device of train", lambda d: d.train("--device", "cpu:1"), "'cpu:1'", "CUDA_VISIBLE_DEVICES"),
    case("device of another machine", lambda d: d.train("--device", ABSENT), ABSENT, "--device cpu"),
    case("unknown device of evaluate", lambda d: ["evaluate", d.tone_run, "--device", "tpu"], "'tpu'", "cpu"),
    case("unknown device of separate", lambda d: d.separate(None, "--device", "gpu0"), "'gpu0'", "cpu"),
    case("unknown device of report", lambda d: ["report", d.tone_run, "--device", "tpu"], "'tpu'", "cpu"),
    # classes and tasks
    case("unknown class in a task", lambda d: d.train(tasks="ding,humm"), "'humm'", "'hum'"),
    case("unknown class to separate", lambda d: d.separate(classes="ding,peeep"), "'peeep'", "'peep'"),
    case("class twice to separate", lambda d: d.separate(classes="ding,ding"), "'ding'", "left=ding,right=ding"),
    case("no class to separate", lambda d: d.separate(classes=","), "--classes"),
    case("unknown class to make", lambda d: ["data", "synth", "new", "--classes", "fluet"], "'fluet'", "'flute'"),
    case("class twice to make", lambda d: ["data", "synth", "new", "--classes", "flute,flute"], "'flute'", "twice"),
    case("task that repeats a class", lambda d: d.train(tasks="ding,hum;peep,ding"), "'ding'", "task 1", "one task"),
    case("class twice in a task", lambda d: d.train(tasks="ding,ding;peep"), "'ding'", "task 0", "one task"),
    case("empty task", lambda d: d.train(tasks="ding,hum;;peep"), "task 1", "no class"),
    case("no tasks", lambda d: d.train(tasks=""), "task 0", "at least one"),
    case("tasks by a setting", _set("tasks=[[ding,hum]]"), "tasks=[[ding,hum]]", "--tasks"),
    case("store by a setting", _set("store=elsewhere"), "store=elsewhere", "no effect"),
    case("first task of one class", lambda d: d.train(tasks="ding;hum,peep"), "first task, ding", "two or more"),
    case("seed below nothing", lambda d: d.train("--seed", "-1"), "seed", "-1"),
    case("partners that a task lacks", lambda d: d.train(*DIFFERENT, "--memory", "none", tasks="ding,hum;peep"),
         "task 1",
         "partner=any"),
    case("classes that do not divide", lambda d: d.train("--classes-per-task", "3", tasks=None), "4", "of 3",
         "another size"),
    case("both ways to cut tasks", lambda d: d.train("--classes-per-task", "2"), "--tasks", "not both"),
    case("memory larger than the class", _set("memory.params.per_class=4"), "4", "'ding'", "3", "per_class"),
    case("batch larger than an epoch", _set("train.batch_size=1000"), "1000", "batch_size"),
    # audio files
    case("missing sound", _sound(lambda d: d.path / "no.wav"), "no.wav", "no such"),
    case("folder for a sound", _sound(lambda d: d.path), "desk", "not a file"),
    case("empty sound", _sound(lambda d: d.spoil(d.path / "e.wav", b"")), "e.wav", "empty", "again"),
    case("text named .wav", _sound(lambda d: d.spoil(d.path / "t.wav", "la la la")), "t.wav", "not WAV"),
    case("truncated sound", _sound(lambda d: d.truncate(d.wave(NOISE))), "sound.wav", "truncated", "again"),
    case("truncated header", _sound(lambda d: d.truncate(d.wave(NOISE), 0.001)), "sound.wav", "truncated"),
    case("sound of no samples", _sound(lambda d: d.wave(np.zeros(0))), "sound.wav", "no samples"),
    case("silent sound", _sound(lambda d: d.wave(np.zeros(9000))), "sound.wav", "silent"),
    case("stereo that cancels", _sound(lambda d: d.wave(np.stack([NOISE, -NOISE], 1))), "sound.wav", "2 channels"),
    case("NaN in a sound", _sound(lambda d: d.wave(np.r_[NOISE, np.nan])), "sound.wav", "1 NaN", "again"),
    case("infinity in a sound", _sound(lambda d: d.wave(np.r_[NOISE, np.inf])), "sound.wav", "infinite", "again"),
    case("unknown rate", lambda d: d.separate(None, "--rate", "cd"), "'cd'", "input"),
    case("unknown sample format", lambda d: d.separate(None, "--format", "PCM_12"), "PCM_12", "PCM_16"),
    # frames and features
    case("missing features", _seen(lambda d: d.path / "no.npz"), "no.npz", "avsep data features"),
    case("features of a missing class", lambda d: d.separate(classes="ding,hum"), "'hum'", "ding, peep"),
    case("pickled features", _seen(_pickled), "evil.npz", "visual file"),
    case("bare array for features", _seen(_bare), "bare.npy", "CLASS/object"),
    case("text for features", _seen(lambda d: d.spoil(d.path / "f.npz", "la")), "f.npz", "no .npz"),
    case("truncated features", _seen(lambda d: d.truncate(d.features())), "features.npz", "visual file"),
    case("features without frames", _seen(_other_arrays(ding__features__clip=np.zeros((3, 8)))), "'ding'", "clip"),
    case("frames that are numbers", _seen(_other_arrays(ding__object=np.zeros((3, 8)))), "ding/object", "uint8"),
    case("unknown entry of features", _seen(_other_arrays(weights=np.zeros(3))), "'weights'", "CLASS/object"),
    # stores
    case("missing store", lambda d: d.train(store=d.path / "no"), "no store", "desk/no", "avsep data synth"),
    case("store that is not one", lambda d: d.train(store=_foreign(d)), "new", "not a store", "avsep data synth"),
    case("file for a store", lambda d: ["data", "info", d.preset], "tiny.yaml", "not a store"),
    case("no store", lambda d: ["train", "--out", "new"], "STORE", "avsep data synth"),
    case("unfinished store", _unfinished_store, "unfinished", "avsep data synth"),
    case("truncated recording", _chopped("audio/hum-train-0.wav"), "hum-train-0.wav", "truncated", "again"),
    case("truncated frames", _chopped("motion/hum-train-0.npy"), "hum-train-0.npy", "truncated", "again"),
    case("missing recording", lambda d: [(d.store / "audio/hum-val-0.wav").unlink(), *d.train(store=d.store)][1:],
         "hum-val-0.wav", "missing", "again"),
    case("truncated manifest", _chopped("manifest.json"), "manifest.json", "truncated", "again"),
    case("manifest of another kind", _manifest(lambda m: m.update(format="x")), "manifest.json", "not the manifest",
         "give"),
    case("manifest of a later version", _manifest(lambda m: m.update(version=9)), "manifest.json", "9", "update"),
    case("manifest without clips", _manifest(lambda m: m.pop("clips")), "manifest.json", "damaged", "clips", "again"),
    case("manifest with a bad rate", _manifest(lambda m: m.update(sample_rate_hz="fast")), "sample_rate_hz", "fast",
         "again"),
    case("manifest with a way out", _manifest(lambda m: m["clips"][0]["files"]["audio"].update(path="../x.wav")),
         "../x.wav", "outside"),
    case("hash that does not match", _flipped, "hum-val-1.wav", "hash", "again"),
    case("silent store", _silent_store, "silent", "leave them out"),
    case("store of another rate", _other_rate, "11025", "16000", "make the store"),
    case("features of another width", lambda d: _with_features(d, 9, {"features": "clip", "dim": 8}), "9", "8",
         "extractor"),
    case("features of another name", lambda d: _with_features(d, 8, {"features": "clipp", "dim": 8}), "'clipp'",
         "'clip'"),
    case("features of the other role", lambda d: _with_features(d, 3, {"features": "clip", "dim": 3}, "motion"),
         "'clip'", "motion", "object"),
    case("features with a NaN", _features_beyond, "'clip'", "hum-train-0", "NaN", "again"),
    case("split without clips", _manifest(lambda m: [c.update(split="train") for c in m["clips"] if "hum" in c["id"]]),
         "'hum'", "val", "leave it out"),
    case("store that is there", lambda d: ["data", "synth", d.store], "store", "--force"),
    case("folder with other things to make a store in", lambda d: ["data", "synth", _foreign(d)], "thesis.tex",
         "another folder"),
    case("other things to delete", lambda d: ["data", "synth", _foreign(d), "--force"], "new", "not deleted"),
    case("store being written", _held_store, "another process", "another folder"),
    case("missing bank", lambda d: ["data", "synth", "new", "--bank", "no.sf2"], "no.sf2", "no such",
         "avsep data banks"),
    case("bank that is none", lambda d: ["data", "synth", "new", "--bank", d.spoil(d.path / "b.sf2", "la")], "b.sf2"),
    case("unknown size", lambda d: ["data", "synth", "new", "--size", "huge"], "'huge'", "full"),
    case("counts that are none", lambda d: ["data", "synth", "new", "--clips", "1,2"], "1,2", "14,3,4"),
    case("counts of nothing", lambda d: ["data", "synth", "new", "--clips", "0,0,0"], "(0, 0, 0)", "not all 0"),
    case("features of no clip", lambda d: ["data", "features", d.tone_store, "--clips", ","], "no clip", "at least"),
    case("sheet that is a sound", lambda d: ["data", "sheet", d.tone_store, "--out", "a.wav"], "a.wav", "contact.png",
         needs=("PIL",)),
    case("clips of no length", lambda d: ["data", "synth", "new", "--clip-s", "0"], "0", "0.5"),
    case("unknown clip", lambda d: ["data", "features", d.tone_store, "--clips", "hum-test-9"], "hum-test-9",
         "hum-test-"),
    case("mix of one clip", lambda d: ["data", "mix", d.tone_store, "--clips", "hum-test-0", "--out", "new"],
         "hum-test-0", "two"),
    case("mix of one clip twice", lambda d: ["data", "mix", d.tone_store, "--clips", "hum-test-0,hum-test-0", "--out",
         "new"],
         "'hum-test-0'", "twice"),
    # runs
    case("evaluate what is no run", lambda d: ["evaluate", d.path], "desk", "run.yaml", "avsep train"),
    case("report what is no run", lambda d: ["report", d.path], "desk", "run.yaml", "avsep train"),
    case("export what is no run", lambda d: ["export", d.path, "--out", "new"], "desk", "avsep train"),
    case("separate by what is no run", _separate_run(lambda d: d.path), "desk", "neither", "run"),
    case("separate by what is not there", _separate_run(lambda d: d.path / "no"), "no such folder", "no"),
    case("resume what is no run", lambda d: ["train", "--out", d.path, "--resume"], "desk", "run.yaml"),
    case("evaluate a run without a task", _no_task_yet(_evaluate), "run", "no finished task", "--resume"),
    case("report a run without a task", _no_task_yet(_report), "run", "no finished task", "--resume"),
    case("export a run without a task", _no_task_yet(lambda d: ["export", d.run, "--out", "new"]), "no finished task",
         "--resume"),
    case("separate by a run without a task", _no_task_yet(_separate_run(lambda d: d.run)), "no finished task",
         "--resume"),
    case("evaluate a task that is not there", lambda d: ["evaluate", d.tone_run, "--task", "7"], "7", "0, 1"),
    case("export a task that is not there", lambda d: ["export", d.tone_run, "--task", "7", "--out", "new"], "7",
         "0, 1"),
    case("separate by a task that is not there", lambda d: d.separate(None, "--task", "7"), "7", "0, 1"),
    case("run being written", _held_run, "run", "another process", "another folder"),
    case("run that is there", lambda d: d.train("--out", d.run), "run", "--resume", "another folder"),
    case("folder with other things to train in", _after(_foreign, lambda d: d.train()), "thesis.tex",
         "another folder"),
    case("file to train in", lambda d: d.train("--out", d.preset), "tiny.yaml", "folder"),
    case("folder below a file to train in", lambda d: d.train("--out", d.preset / "new"), "tiny.yaml"),
    case("folder with other things to export to",
         lambda d: ["export", d.tone_run, "--all-tasks", "--out",
                    [(_foreign(d) / "task-00").mkdir(), _foreign_in(d, "task-00")][1]],
         "task-00", "another folder"),
    case("file to export to", lambda d: ["export", d.tone_run, "--out", d.preset], "tiny.yaml", "folder"),
    case("file to separate into", lambda d: d.separate(None, "--out", d.preset), "tiny.yaml", "folder"),
    case("separated before", lambda d: _separated_before(d), "sound_ding.wav", "--overwrite"),
    case("folder for a report", lambda d: ["report", d.tone_run, "--out", d.path], "desk", "folder"),
    case("store of a run that moved", lambda d: _moved(d), "gone", "--store"),
    # checkpoints
    case("another spec: train", lambda d: d.resume("--set", "train.epochs=9"), "train.epochs", "9", "2",
         "same settings"),
    case("another spec: separator", lambda d: d.resume("--set", "separator.mask_decoder.params.layers=3"), "layers",
         "same settings"),
    case("another spec: strategy", lambda d: d.resume("--strategy", "finetune"), "finetune", "contavsep"),
    case("another spec: memory", lambda d: d.resume("--memory", "none"), "'none'", "random_per_class"),
    case("another spec: preset", lambda d: d.resume("--preset", "iquery"), "'iquery'", "--preset"),
    case("another spec: tasks", lambda d: d.resume("--tasks", "hum,ding;peep,whirr"), "'hum'", "same settings"),
    case("another spec: protocol", lambda d: d.resume("--protocol", "paper"), "protocol", "'paper'"),
    case("another spec: store", lambda d: [*("train", _changed(d), "--out", d.run, "--resume")], "store_hash",
         "same settings"),
    case("damaged run.yaml", _damaged("run.yaml", Desk.resume, "separator: ["), "run.yaml", "YAML", "restore"),
    case("run.yaml of another kind", _damaged("run.yaml", Desk.resume, "- 1"), "run.yaml", "mapping", "restore"),
    case("truncated checkpoint", _damaged("state/task*/student.safetensors", Desk.resume), "student.safetensors",
         "damaged", "remove"),
    case("truncated checkpoint state", _damaged("state/task*/state.json", Desk.resume), "state.json", "damaged",
         "remove"),
    case("truncated checkpoint pointer", _damaged("state/latest.json", Desk.resume), "latest.json", "remove"),
    case("checkpoint pointer of another kind", _damaged("state/latest.json", Desk.resume, "[]"), "latest.json",
         "remove"),
    case("truncated protocol", _damaged("protocol.json", _evaluate), "protocol.json", "truncated", "--resume"),
    case("edited protocol", _damaged("protocol.json", _evaluate, '{"format": "avsep-protocol", "version": 1}'),
         "protocol.json", "damaged", "--resume"),
    case("truncated separator", _damaged("tasks/00/separator/model.safetensors", _evaluate), "model.safetensors",
         "damaged"),
    case("separator of another spec", lambda d: _mixed_up(d), "separator.yaml", "damaged", "restore"),
    case("separator that is a pickle", _damaged("tasks/00/separator/model.safetensors", _evaluate, b"\x80\x04N."),
         "model.safetensors", "damaged"),
    # export
    case("tolerance that nothing holds", _export("--tolerance", "1e-30"), "separator.onnx", "differs from PyTorch",
         "1e-30", "nothing was written", "--tolerance", needs=EXPORT_PACKAGES),
    case("tolerance of nothing", _export("--tolerance", "0"), "tolerance", "0.0", "positive", needs=EXPORT_PACKAGES),
    case("tolerance below nothing", _export("--tolerance", "-1"), "tolerance", "-1", needs=EXPORT_PACKAGES),
    case("a file where a task is exported to",
         _after(lambda d: (d.path / "new").mkdir(), lambda d: d.spoil(d.path / "new/task-00", "x"), _export()),
         "task-00", "folder", needs=EXPORT_PACKAGES),
]  # fmt: skip


def _foreign_in(d: Desk, name: str) -> Path:
    (d.path / "new" / name / "thesis.tex").write_text("years of work")
    return d.path / "new"


def _separated_before(d: Desk) -> list:
    (d.path / "separated").mkdir()
    (d.path / "separated" / "sound_ding.wav").write_text("from yesterday")
    return d.separate()


def _moved(d: Desk) -> list:
    spec = yaml.safe_load((d.run / "run.yaml").read_text())
    (d.run / "run.yaml").write_text(yaml.safe_dump({**spec, "store": str(d.path / "gone")}))
    return ["evaluate", d.run]


def _changed(d: Desk) -> Path:
    """The run's store with one recording replaced, its record with it: whole, but not the one trained on."""
    from avsep.files import sha256_file

    file = d.store / "audio" / "hum-val-1.wav"
    shutil.copy(d.store / "audio" / "hum-val-0.wav", file)

    def state(manifest: dict) -> None:
        for clip in manifest["clips"]:
            if clip["id"] == "hum-val-1":
                clip["files"]["audio"]["sha256"] = sha256_file(file)

    d.edit(d.store / "manifest.json", state)
    return d.store


def _mixed_up(d: Desk) -> list:
    shutil.copy(d.run / "tasks/01/separator/separator.yaml", d.run / "tasks/00/separator/separator.yaml")
    return ["evaluate", d.run]


@pytest.mark.parametrize("bad", CASES, ids=[c.name for c in CASES])
def test_one_line_and_nothing_lost(bad: Case, desk: Desk, capfd):
    for package in bad.needs:
        pytest.importorskip(package)
    argv = bad.command(desk)
    before = contents(desk.path)
    capfd.readouterr()
    code = run(*argv)
    said, told = capfd.readouterr()
    lines = lines_of(told)
    assert len(lines) == 1, told
    assert lines[0].startswith("avsep: ")
    assert len(lines[0]) < 600
    for part in bad.says:
        assert part in lines[0]
    assert code == 2
    assert "Traceback" not in said
    after = contents(desk.path)
    assert sorted(after) == sorted(before)
    assert after == before


# ---------------------------------------------------------------------- a full disk


class SmallDisk:
    """A disk to fill: a tmpfs where mounting is allowed, else a folder and a limit on the size of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(path)]
        try:
            self.mounted = subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            self.mounted = False

    def leave(self, kilobytes: int | None) -> None:
        """Leave so much room (None: as much as is wanted)."""
        if self.mounted:
            found = os.statvfs(self.path)
            used = (found.f_blocks - found.f_bfree) * found.f_frsize
            size = 256 << 20 if kilobytes is None else used + kilobytes * 1024
            subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True)
        else:
            resource = pytest.importorskip("resource")
            limit = resource.RLIM_INFINITY if kilobytes is None else min(kilobytes, 8) * 1024
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=True)
        else:
            self.leave(None)


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "disk")
    try:
        yield made
    finally:
        made.close()


def refused_for_space(argv: list, disk: SmallDisk, capfd) -> None:
    capfd.readouterr()
    code = run(*argv)
    told = capfd.readouterr().err
    lines = lines_of(told)
    assert (len(lines), code) == (1, 2), told
    assert lines[0].startswith("avsep: ")
    if disk.mounted:
        assert "space" in lines[0]
        assert "free some" in lines[0]


def _log(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_training_survives_a_full_disk(desk, disk, capfd):
    """Filled at several moments, it stops in one line each time, and ends as if nothing had been."""
    out = disk.path / "run"
    refused = 0
    for kilobytes in (4, 64, 900, 1500, 2200, 3000, None):
        disk.leave(kilobytes)
        argv = ["train", "--out", out, "--resume"] if (out / "run.yaml").is_file() else desk.train("--out", out)
        if kilobytes is None:
            assert run(*argv) == 0, capfd.readouterr().err
        else:
            refused_for_space(argv, disk, capfd)
            refused += 1
    assert refused == 6
    for task in ("00", "01"):
        name = f"tasks/{task}/separator/model.safetensors"
        mine, whole = load_file(out / name), load_file(desk.tone_run / name)
        assert all(torch.equal(mine[k], whole[k]) for k in whole)
    for name in ("train.csv", "validation.csv"):
        assert _log(out / "logs" / name) == _log(desk.tone_run / "logs" / name)


ROOM = {  # command -> the kilobytes left for it
    "separate": (8, lambda d, out: d.separate(None, "--out", out)),
    "separate the second file": (28, lambda d, out: d.separate(None, "--out", out)),
    "export": (200, lambda d, out: ["export", d.tone_run, "--task", "0", "--out", out]),
    "report": (8, lambda d, out: ["report", d.tone_run, "--mixtures", "1", "--out", out / "page.html"]),
    "features": (4, lambda d, out: ["data", "features", d.tone_store, "--clips", "hum-test-0", "--out", out / "f.npz"]),
    "mix": (48, lambda d, out: ["data", "mix", d.tone_store, "--clips", "hum-test-0,ding-test-0", "--out", out]),
    "sheet": (4, lambda d, out: ["data", "sheet", d.tone_store, "--out", out / "sheet.png"]),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "export" else n for n in ROOM])
def test_a_full_disk_leaves_nothing_half_written(name, desk, disk, capfd):
    for package in {"export": EXPORT_PACKAGES, "report": ("jinja2", "matplotlib"), "sheet": ("PIL",)}.get(name, ()):
        pytest.importorskip(package)
    kilobytes, command = ROOM[name]
    out = disk.path / "out"
    argv = command(desk, out)
    disk.leave(kilobytes)
    refused_for_space(argv, disk, capfd)
    assert [p for p in disk.path.rglob("*") if p.is_file()] == []
    if name not in ("report", "features", "sheet"):
        assert not out.exists()
    if name != "export":  # whose second time takes long, and is tested elsewhere
        disk.leave(None)
        assert run(*argv) == 0
        assert [p for p in disk.path.rglob("*") if p.is_file()]


def test_an_evaluation_on_a_full_disk_leaves_the_run_as_it_was(desk, disk, capfd):
    folder = shutil.copytree(desk.tone_run, disk.path / "run")
    (folder / "evaluation.json").write_text("of yesterday")
    before = contents(folder)
    disk.leave(4)
    refused_for_space(["evaluate", folder], disk, capfd)
    assert contents(folder) == before


@pytest.mark.skipif(not find_banks(), reason="no SoundFont bank here")
def test_a_store_goes_on_after_a_full_disk(tmp_path, disk, capfd):
    options = ["--classes", "flute,piano", "--clips", "1,1,1", "--clip-s", "1", "--workers", "1"]
    assert run("data", "synth", tmp_path / "whole", *options) == 0
    disk.leave(100)
    if disk.mounted:
        refused_for_space(["data", "synth", disk.path / "store", *options], disk, capfd)
        disk.leave(70)
        refused_for_space(["data", "synth", disk.path / "store", *options], disk, capfd)
    disk.leave(None)
    assert run("data", "synth", disk.path / "store", *options) == 0
    assert contents(disk.path / "store") == contents(tmp_path / "whole")
