"""The README of a bundle, with the bundle's own facts: what someone on the device needs who never saw avsep."""

from __future__ import annotations

import shlex
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avsep.export.runtime.manifest import PRESENCE

__all__ = ["device_readme", "trtexec_line"]

# Megabytes that trtexec's builder may use for trying out kernels: fits the smallest Orin.
_WORKSPACE_MIB = 1024
_WHAT = {
    "separator": "waveforms from the mixture",
    "spectral": "spectra from the mixture's spectrum (transforms outside, for DLA)",
    "stream": "the next block of waveforms from the next block of the mixture, frame by frame",
    "object_encoder": "object features from frames",
    "motion_encoder": "motion features from frames",
}


def device_readme(manifest: Mapping[str, Any]) -> str:
    """The text in Markdown. ``manifest`` needs no hashes yet."""
    graphs: Sequence[Mapping[str, Any]] = manifest["graphs"]
    main = next((g for g in graphs if g["kind"] in ("separator", "spectral", "stream")), graphs[0])
    rate, chunking = manifest["sample_rate_hz"], manifest["chunking"]
    roles = [source["role"] for source in manifest["visual"]]
    kind = "mono" if manifest.get("channels", 1) == 1 else f"{manifest['channels']} channels or mono"
    facts = [
        f"- made from: {manifest['made_from'] or 'not stated'}, {manifest['created']}, by avsep "
        f"{manifest['made_with'].get('avsep', '')}",
        f"- sample rate: {rate} Hz, {kind}; {_call(main, manifest)}",
    ]
    for source in manifest["visual"]:
        told = f"stored features '{source['name']}'" if source["kind"] == "features" else "frames"
        computed = f", computed by `{source['graph']}`" if source["graph"] else ", which come from outside"
        facts.append(f"- {source['role']} features: from {told}{computed}")
    template = (Path(__file__).parent / "device_readme.md").read_text(encoding="utf-8")
    return string.Template(template).substitute(
        name=manifest["name"],
        what_it_sees=f", {' and '.join(roles)} features of each source" if roles else "",
        facts="\n".join(facts),
        graphs="\n".join(_row(graph) for graph in graphs),
        measured_on=main["parity"]["provider"],
        feeding=_feeding(main, manifest),
        example_features="{" + ", ".join(f'"{role}": ...' for role in roles) + "}",
        example_classes=shlex.quote(",".join(manifest["classes"][:2]) or "0,1"),
        features_option=" --features features.npz" if roles else "",
        features_note="\nfeatures.npz comes from `avsep data features`." if roles else "",
        classes=_classes(manifest["classes"]),
        golden=main["golden"],
        graph=main["file"],
        tolerance=f"{main['tolerance']:g}",
        least_tensorrt=", ".join(f"`{g['file']}` {g['least_tensorrt']}" for g in graphs),
        trtexec_10="\n".join(trtexec_line(g, 10) for g in graphs),
        trtexec_11="\n".join(trtexec_line(g, 11) for g in graphs),
        trtexec_rtx="\n".join(trtexec_line(g, "rtx") for g in graphs),
        context_s=f"{chunking['context_samples'] / rate:.2f}",
        weights_licence=manifest["weights_licence"] or "not stated; ask whoever trained them before passing them on",
    )


def _call(main: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    rate, samples = manifest["sample_rate_hz"], manifest["chunking"]["clip_samples"]
    if main["kind"] != "stream":
        return f"a call takes {samples} samples ({samples / rate:.3f} s)"
    hop, n_fft, frames = manifest["transform"]["hop"], manifest["transform"]["n_fft"], main["stream"]["frames"]
    delay = n_fft + (frames - 1) * hop
    return (
        f"a call takes the next {hop * frames} samples of a stream; what comes out lies {delay - hop * frames} samples "
        f"behind, so that a sample waits at most {delay} samples ({1e3 * delay / rate:.1f} ms)"
    )


def _tensor(tensor: Mapping[str, Any]) -> str:
    return f"{tensor['name']} {tensor['dtype']} [{', '.join(map(str, tensor['shape']))}]"


def _row(graph: Mapping[str, Any]) -> str:
    inputs, outputs = ("<br>".join(_tensor(t) for t in graph[side]) for side in ("inputs", "outputs"))
    gate = "not measured"
    if graph["gate"] is not None:
        drift = graph["gate"]["max_drift_db"]
        gate = ", ".join(f"{drift[key]:.3f}" for key in ("sdr", "sir", "sar")) + " dB"
        gate += f" on {graph['gate']['mixtures']} {graph['gate']['on']} mixtures"
        if graph["gate"]["overridden"]:
            gate += f", above the limit of {graph['gate']['limit_db']:g} dB and let pass by whoever exported it"
    error = f"{graph['parity']['max_error']:.1e} ({graph['parity']['error_db']:.0f} dB)"
    what, precision = _WHAT[graph["kind"]], graph["precision"]
    if chosen := graph.get("quantised"):
        precision += f", {chosen['layers']} of {chosen['of']} convolutions"
    return f"| `{graph['file']}` | {what} | {precision} | {inputs} | {outputs} | {error} | {gate} |"


def _feeding(main: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    lines = ["Every input as the network wants it:", ""]
    names = {tensor["name"] for tensor in main["inputs"]}
    channels = manifest.get("channels", 1)
    of = "mono samples" if channels == 1 else f"samples of {channels} channels (a mono signal in all of them)"
    if "mixture" in names:
        lines.append(f"- `mixture`: {of}, full scale 1, as recorded: no change of level is needed")
    if main["kind"] == "stream":
        lines += [
            "- `state_...`: zeros at first, then what the call before gave as `next_...`",
            "- the first frame is centred on the stream's first sample: begin with the first "
            f"{manifest['transform']['n_fft'] // 2 - manifest['transform']['hop']} samples at the end of "
            "`state_samples`, give the rest as blocks, and drop the first "
            f"{manifest['transform']['n_fft'] // 2} samples that come out (`avsep_runtime.streaming` does so)",
        ]
    if "counted" in names:
        lines.append("- `counted`: 1 of each frame, 0 of those beyond the end of the stream")
    if "spectrum" in names:
        t = manifest["transform"]
        each = "" if channels == 1 else f"of each of {channels} channels the "
        lines.append(
            f"- `spectrum`: {each}real and imaginary part of the centred STFT (n_fft {t['n_fft']}, hop {t['hop']}, "
            f"{t['window']} window, {t['padding']} beyond the ends); the estimate is transformed back and limited to ±1"
        )
    for role in ("object", "motion"):
        if f"{role}_features" in names:
            lines.append(f"- `{role}_features`: one set a source, in the order of the class ids")
    if "motion_mask" in names:
        lines.append("- `motion_mask`: which steps of the motion features are valid")
    if "seen" in names:
        lines.append("- `seen`: which sources there is a picture of; the features of the others are zeros")
    lines.append("- `class_ids`: one number a source, from the list below")
    if any(tensor["name"] == PRESENCE for tensor in main["outputs"]):
        threshold = manifest["presence_threshold"]
        lines += [
            "",
            f"Beside the sounds comes `{PRESENCE}`: of each source the probability that it sounds in the mixture at "
            f"all; below {threshold:.3g} it probably does not. Of a long recording what one chunk in twenty reaches "
            "counts.",
        ]
    return "\n".join(lines)


def _classes(names: Sequence[str]) -> str:
    if not names:
        return "- not named: numbers as in training"
    return "\n".join(f"- {index}: {name}" for index, name in enumerate(names))


def trtexec_line(graph: Mapping[str, Any], version: int | str) -> str:
    """The command that builds a graph's engine with trtexec of TensorRT 10 or 11, or of TensorRT-RTX (``"rtx"``)."""
    stem = graph["file"].removesuffix(".onnx")
    program = "tensorrt_rtx" if version == "rtx" else "trtexec"
    parts = [program, f"--onnx={graph['file']}", f"--saveEngine={stem}.plan", "--skipInference"]
    if version == 10:
        parts.append("--stronglyTyped")  # always on from 11, and in TensorRT-RTX
    if version != "rtx":
        parts += ["--noTF32", f"--memPoolSize=workspace:{_WORKSPACE_MIB}M", f"--timingCacheFile={stem}.timing"]
    for profile in graph["profiles"][:1]:
        for bound in ("min", "opt", "max"):
            shapes = ",".join(f"{name}:{'x'.join(map(str, sizes[bound]))}" for name, sizes in profile.items())
            parts.append(f"--{bound}Shapes={shapes}")
    return " ".join(parts)
