"""``avsep doctor``: what is installed here, what works, and what to install for the rest.

Nothing here may fail: a machine on which something is broken is what it is for. What loads libraries with code of their
own (PyTorch, a driver, ONNX Runtime) runs in a process of its own, which may crash.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avsep.cli._output import Json, Output, Quiet, Verbose

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ALLOWS", "command", "look", "probe"]

ALLOWS = {
    "media": "separate and prepare videos and compressed audio (MP4, MKV, M4A)",
    "vision": "find objects in videos; pretrained picture encoders (CLIP, SigLIP 2, ResNet-18, VideoMAE)",
    "report": "pages and plots: avsep report, avsep compare --html, the page of avsep separate",
    "synth": "make the offline benchmark: avsep data synth",
    "demo": "avsep demo",
    "reproduce": "avsep reproduce, with its plots",
    "efficientnet": "object features without a download (efficientnet_lite0)",
    "notes": "find the pitch of recordings: avsep data notes",
    "cpu": "export bundles and run them on the CPU: avsep export, avsep separate --bundle",
    "gpu": "export bundles and run them on an NVIDIA GPU (ONNX Runtime, TensorRT)",
    "openvino": "run bundles on CPUs with OpenVINO: avsep separate --bundle --provider openvino",
    "tensorrt-rtx": "build engines for RTX GPUs: avsep export build --target tensorrt-rtx",
    "tensorboard": "training curves in TensorBoard: avsep train --logger tensorboard",
    "wandb": "training curves in Weights & Biases: avsep train --logger wandb",
    "mlflow": "training curves in MLflow: avsep train --logger mlflow",
    "cluster": "runs as jobs of a Slurm cluster: avsep reproduce --launcher submitit",
    "ray": "prepare videos on a Ray cluster: avsep data prepare --engine ray",
    "docs": "build the site, and run its notebook",
    "dev": "develop and test avsep",
}
"""What each extra is for."""

# a package that does as well as another
_INSTEAD = {"onnxruntime": ("onnxruntime-gpu",), "onnxruntime-gpu": ()}
# packages with code of their own, which may be installed and yet not load: distribution -> module
_NATIVE = {
    "torch": "torch",
    "soundfile": "soundfile",
    "soxr": "soxr",
    "av": "av",
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime",
    "tensorrt": "tensorrt",
}
_VARIABLES = (
    *("AVSEP_WEIGHTS", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "XDG_CACHE_HOME"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TMPDIR"),
)
_PROBE_S = 180
_MARK = "avsep-doctor: "


def command(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Say what is installed here, which devices, weights and space there are, what works, and what to install for more.

    Ends with exit code 0 whatever it finds, and changes nothing. With --quiet it lists only what is wrong.
    """
    output = Output(json=json, quiet=quiet, verbose=verbose)
    found = look()
    output.result(found)
    if output.json:
        return
    if quiet:
        for line in found["problems"]:
            output.wrong(line)
        return
    _print(output, found)


def look() -> dict[str, Any]:
    """All that is to say, as plain data; what cannot be found out is left out, and told under ``problems``."""
    problems: list[str] = []

    def of(what: str, find: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return find()
        except Exception as error:  # whatever is broken here, the rest is worth knowing
            problems.append(f"{what} cannot be found out: {type(error).__name__}: {_line(error)}")
            return otherwise

    requirements = of("what avsep needs", _requirements, {})
    packages, extras = of("the packages", lambda: _packages(requirements), ({}, {}))
    probed = of("what loads", lambda: _probe(_installed(_NATIVE.values())), {})
    for name, module in _NATIVE.items():
        reason = probed.get(module, {}).get("problem")
        if reason and name in packages and packages[name]["version"]:
            packages[name]["problem"] = f"is installed and does not load: {reason}"
    for name, package in packages.items():
        if package["problem"]:
            problems.append(f"{name} {package['problem']}")
    for extra in extras.values():
        broken = [name for name in extra["packages"] if "not load" in (packages[name]["problem"] or "")]
        extra["works"] = not extra["missing"] and not broken
    torch = probed.get("torch", {}).get("found") or {}
    problems += torch.get("notes", [])
    weights = probed.get("weights", {}).get("found") or []
    found = {
        "format": "avsep-doctor",
        "avsep": of("the version", _avsep, {}),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "system": of("the system", platform.platform, ""),
        "packages": packages,
        "extras": extras,
        "devices": {
            "cpu": of("the processor", _cpu, {}),
            "cuda": torch.get("cuda", []),
            "mps": torch.get("mps", False),
            "onnxruntime": (probed.get("onnxruntime", {}).get("found") or {}).get("providers", []),
        },
        "weights": weights,
        "banks": of("the SoundFont banks", _banks, []),
        "caches": of("the caches", _caches, []),
        "disk": of("the free space", _disk, []),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    found["works"] = of("what works", lambda: _works(found, loads=probed.get("torch", {}).get("found") is not None), [])
    found["problems"] = [*problems, *(f"{d['folder']}: {d['problem']}" for d in found["disk"] if d["problem"])]
    return found


# --- what is installed ------------------------------------------------------------------------------------------------


def _avsep() -> dict[str, Any]:
    import avsep
    from avsep.environment import commit

    return {"version": avsep.__version__, "commit": commit(), "folder": str(Path(avsep.__file__).parent)}


def _requirements() -> dict[str, list[Any]]:
    """Extra ("" for what everything needs) -> requirements, as the installed package states them."""
    from packaging.requirements import Requirement

    try:
        stated = [Requirement(text) for text in metadata.requires("avsep") or ()]
    except metadata.PackageNotFoundError:
        raise LookupError("avsep is not installed here, but runs from its source: pip install -e .") from None
    names = metadata.metadata("avsep").get_all("Provides-Extra") or []
    found: dict[str, list[Any]] = {}
    for name in ("", *names):
        found[name] = [r for r in stated if r.marker is None or r.marker.evaluate({"extra": name})]
        if name:
            found[name] = [r for r in found[name] if r.marker is not None and "extra" in str(r.marker)]
    return found


def _packages(requirements: dict[str, list[Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What there is of each package that anything needs, and of each extra."""
    packages: dict[str, Any] = {}
    extras: dict[str, Any] = {}
    for name in requirements:
        asked = list(_flat(name, requirements))
        missing = []
        for wanted in asked:
            package, lacks = _package(wanted)
            packages.setdefault(wanted.name, package)
            if lacks:
                missing.append(f"{wanted.name}{wanted.specifier}")
            if name == "" and package["version"] is None:
                packages[wanted.name]["problem"] = 'is missing: pip install "avsep"'
        if name:
            extras[name] = {
                "for": ALLOWS.get(name, ""),
                "packages": [wanted.name for wanted in asked],
                "missing": missing,
                "install": f'pip install "avsep[{name}]"',
            }
    return packages, extras


def _flat(extra: str, requirements: dict[str, list[Any]]) -> Iterator[Any]:
    """The packages of an extra, with those of the extras it is made of."""
    for wanted in requirements[extra]:
        if wanted.name == "avsep":
            for inner in sorted(wanted.extras):
                yield from _flat(inner, requirements)
        else:
            yield wanted


def _package(wanted: Any) -> tuple[dict[str, Any], bool]:
    """What is there of a package, and whether that is not enough."""
    for name in (wanted.name, *_INSTEAD.get(wanted.name, ())):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        fits = wanted.specifier.contains(version, prereleases=True)
        problem = None if fits else f"is of version {version}, and avsep needs {wanted.specifier}"
        return {"version": version, "needs": str(wanted.specifier), "problem": problem}, not fits
    return {"version": None, "needs": str(wanted.specifier), "problem": None}, True


# --- what loads: in a process of its own ------------------------------------------------------------------------------


def _installed(modules: Iterable[str]) -> list[str]:
    from importlib.util import find_spec

    return [name for name in dict.fromkeys(modules) if find_spec(name) is not None]


def _probe(modules: list[str]) -> dict[str, Any]:
    """What :func:`probe` found by module; of one that ended the process, that it did."""
    import json

    from avsep.environment import python_command

    code = "import sys; from avsep.cli.doctor_command import probe; probe(sys.argv[1:])"
    found: dict[str, Any] = {}
    left = list(modules) + (["weights"] if "torch" in modules else [])
    while left:
        ending = ""
        try:
            done = subprocess.run(
                python_command(code, *left), capture_output=True, text=True, errors="replace", timeout=_PROBE_S
            )
            out = done.stdout
            if done.returncode:
                ending = f"the process ended with code {done.returncode}"
        except subprocess.TimeoutExpired as error:
            out = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
            ending = f"no answer within {_PROBE_S} s"
        for line in out.splitlines():
            if line.startswith(_MARK):
                found |= json.loads(line.removeprefix(_MARK))
        left = [name for name in left if name not in found]
        if left:  # the first of these is the one that it did not survive
            found[left[0]] = {"problem": ending or "the process said nothing"}
            left = left[1:]
    return found


def probe(names: list[str]) -> None:
    """Load modules one by one and print what each says of itself: a line of JSON each, at once."""
    import importlib
    import json

    looks: dict[str, Callable[[Any], Any]] = {"torch": _torch, "onnxruntime": _onnxruntime}
    for name in names:
        answer: dict[str, Any]
        try:
            if name == "weights":
                answer = {"found": _weights()}
            else:
                module = importlib.import_module(name)
                answer = {"found": looks[name](module) if name in looks else {}}
        except BaseException as error:
            answer = {"problem": f"{type(error).__name__}: {_line(error)}"}
        print(f"\n{_MARK}{json.dumps({name: answer})}", flush=True)


def _torch(torch: Any) -> dict[str, Any]:
    notes, cuda = [], []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(number)
            cuda.append(
                {"name": of.name, "gb": round(of.total_memory / 1e9, 1), "capability": f"{of.major}.{of.minor}"}
            )
    elif shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        if torch.version.cuda is None:
            notes.append(
                "there is an NVIDIA driver here, and this PyTorch is a build for the CPU alone: install one for CUDA "
                "(https://pytorch.org/get-started/locally)"
            )
        else:
            notes.append(
                f"there is an NVIDIA driver here, and PyTorch (built for CUDA {torch.version.cuda}) finds no GPU: see "
                "nvidia-smi, and CUDA_VISIBLE_DEVICES"
            )
    mps = getattr(torch.backends, "mps", None)
    return {"cuda": cuda, "mps": bool(mps is not None and mps.is_available()), "notes": notes}


def _onnxruntime(onnxruntime: Any) -> dict[str, Any]:
    return {"providers": [p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()]}


def _weights() -> list[dict[str, Any]]:
    """The published weights that avsep knows, and where they are here."""
    from avsep.media.detection import owlv2_hub
    from avsep.registry import VISUAL_ENCODERS

    models = {"avsep separate, to find objects in videos": owlv2_hub()}
    for spec in VISUAL_ENCODERS:
        if (hub := getattr(spec.factory, "hub", None)) is not None:
            models[f"the encoder {spec.name}"] = hub
    found = []
    for purpose, hub in models.items():
        folder = hub.here()
        place = None if folder is None else str(folder)
        found.append(
            {
                "weights": hub.repository,
                "for": purpose,
                "licence": hub.licence,
                "folder": place,
                "get": None if place else hub.command(),
            }
        )
    return found


# --- the machine ------------------------------------------------------------------------------------------------------


def _cpu() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"name": platform.processor() or platform.machine(), "cores": usable}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if name := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            found["name"] = name[1].strip()
    except OSError:
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    return found


def _banks() -> list[str]:
    from avsep.data.synth.synthesis import find_banks

    return [str(bank) for bank in find_banks()]


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _caches() -> list[dict[str, Any]]:
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or _cache_home() / "huggingface") / "hub"
    places = {
        "weights given by hand (AVSEP_WEIGHTS)": os.environ.get("AVSEP_WEIGHTS"),
        "weights downloaded (Hugging Face)": hub,
        "downloads of avsep itself": _cache_home() / "avsep",
    }
    return [
        {"what": what, "folder": str(place), "there": Path(place).is_dir()} for what, place in places.items() if place
    ]


def _disk() -> list[dict[str, Any]]:
    places = {"this folder": Path.cwd(), "temporary files": Path(tempfile.gettempdir()), "caches": _cache_home()}
    if Path("/dev/shm").is_dir():
        places["memory shared by processes"] = Path("/dev/shm")
    found = []
    for what, folder in places.items():
        there = next(p for p in (folder, *folder.parents) if p.exists())
        usage = shutil.disk_usage(there)
        problem = None
        if not os.access(there, os.W_OK | os.X_OK):
            problem = "cannot be written"
        elif usage.free < 1e9:
            problem = f"only {usage.free / 1e6:.0f} MB are free"
            if what == "memory shared by processes":
                problem += ": reader processes may fail (--workers 0, or docker run --shm-size=2g)"
        found.append(
            {
                "what": what,
                "folder": str(folder),
                "free_gb": round(usage.free / 1e9, 1),
                "total_gb": round(usage.total / 1e9, 1),
                "problem": problem,
            }
        )
    return found


# --- what works -------------------------------------------------------------------------------------------------------


def _works(found: dict[str, Any], loads: bool) -> list[dict[str, Any]]:
    """What a person may want to do, whether it works, and what is to be done for it. ``loads``: PyTorch does."""
    packages, extras, devices = found["packages"], found["extras"], found["devices"]
    core = [name for name in packages if (packages[name]["problem"] or "").startswith(("is missing", "is installed"))]
    core = core or ([] if loads else ["torch"])
    rows = [
        {
            "what": "train, evaluate and compare; separate sound files (WAV, FLAC, OGG, MP3)",
            "works": not core,
            "do": f"repair {', '.join(core)}" if core else "",
        }
    ]
    gpus = [f"{gpu['name']} ({gpu['gb']:.0f} GB)" for gpu in devices["cuda"]] + ["Apple GPU"] * bool(devices["mps"])
    rows.append(
        {
            "what": "train and separate on a GPU",
            "works": bool(gpus),
            "do": "" if gpus else "needs a GPU that PyTorch can use; the CPU does the same, slower",
        }
    )
    weights = {w["weights"]: w for w in found["weights"]}
    detector = next((w for name, w in weights.items() if "owlv2" in name), None)
    for name, extra in sorted(extras.items(), key=lambda item: [*ALLOWS, item[0]].index(item[0])):
        if name == "dev":
            continue
        do = "" if extra["works"] else _how(name, extra, packages)
        works = extra["works"]
        if works and name == "vision" and detector is not None and detector["folder"] is None:
            do = "the detector's weights are downloaded when it is first used"
        if works and name == "synth" and not found["banks"]:
            works, do = False, "needs a SoundFont: see avsep data banks, or give one by --bank"
        if works and name == "gpu" and not devices["cuda"]:
            do = "no NVIDIA GPU is found here"
        rows.append({"what": extra["for"] or name, "works": works, "do": do})
    return rows


def _how(name: str, extra: dict[str, Any], packages: dict[str, Any]) -> str:
    broken = [n for n in extra["packages"] if "not load" in (packages[n]["problem"] or "")]
    if not extra["missing"]:
        return f"repair {', '.join(broken)}"
    way = str(extra["install"])
    if name == "gpu" and packages.get("onnxruntime", {}).get("version"):
        way = f"pip uninstall onnxruntime, then {way}"
    return way


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- the text ---------------------------------------------------------------------------------------------------------


def _print(output: Output, found: dict[str, Any]) -> None:
    own, cpu = found["avsep"], found["devices"]["cpu"]
    output.say(f"avsep {own.get('version', '?')} (commit {own.get('commit', '?')}) in {own.get('folder', '?')}")
    output.say(f"Python {found['python']['version']} ({found['python']['executable']}) on {found['system']}")
    torch = found["packages"].get("torch", {}).get("version")
    memory = f", {cpu['memory_gb']:.0f} GB of memory" if "memory_gb" in cpu else ""
    output.say(f"PyTorch {torch or 'is missing'}; {cpu.get('name', 'CPU')}, {cpu.get('cores', '?')} cores{memory}")
    for gpu in found["devices"]["cuda"]:
        output.say(f"GPU: {gpu['name']}, {gpu['gb']:.0f} GB, compute capability {gpu['capability']}")
    if found["devices"]["mps"]:
        output.say("GPU: Apple (mps)")
    if found["devices"]["onnxruntime"]:
        output.say(f"ONNX Runtime runs on {', '.join(found['devices']['onnxruntime'])}")

    table = _table("what works here", "", "what", "to do for it")
    for row in found["works"]:
        table.add_row("yes" if row["works"] else "no", row["what"], row["do"])
    output.show(table)

    table = _table("published weights", "weights", "for", "licence", "here")
    for row in found["weights"]:
        table.add_row(row["weights"], row["for"], row["licence"], row["folder"] or "no: downloaded when first used")
    if found["weights"]:
        output.show(table)

    table = _table("space", "what", "folder", "free")
    for row in found["disk"]:
        table.add_row(row["what"], row["folder"], f"{row['free_gb']:.1f} of {row['total_gb']:.1f} GB")
    output.show(table)
    for row in found["caches"]:
        output.say(f"{row['what']}: {row['folder']}{'' if row['there'] else ' (empty)'}")
    banks = found["banks"]
    output.say(f"SoundFont banks: {len(banks)} (avsep data banks)")
    for name, value in found["environment"].items():
        output.say(f"{name}={value}")
    if output.verbose:
        table = _table("packages", "package", "version", "needed")
        for name, row in sorted(found["packages"].items(), key=lambda item: item[0].lower()):
            table.add_row(name, row["version"] or "-", row["needs"] or "any")
        output.show(table)
    if found["problems"]:
        output.say("not in order:")
    for line in found["problems"]:
        output.say(f"- {line}")


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
