"""The runtime's command: separate one WAV file with a bundle, on a device that has no more than the runtime."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import AvsepError, ConfigError, one_line
from .files import staged_files
from .names import names_in
from .recordings import (
    absent,
    check_rescale,
    check_targets,
    fitting_gain,
    mixed_down,
    output_paths,
)
from .separator import BundleSeparator
from .sessions import PROVIDERS
from .timeline import read_visual_file
from .wav import FORMATS, read_wav, write_wav

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Separate one WAV file. Returns 0; 2 after a mistake, which is one line; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="avsep-runtime" if __package__ == "avsep_runtime" else f"python -m {__package__}",
        description="Separate a WAV file with an exported bundle; needs NumPy and what runs the graph.",
    )
    parser.add_argument("bundle", help="folder or tar of avsep export")
    parser.add_argument(
        "audio", help="a WAV file at the separator's rate; other channels than the bundle's are mixed to mono"
    )
    parser.add_argument("--mono", action="store_true", help="mix the channels to mono in any case")
    parser.add_argument(
        "--classes",
        required=True,
        help="classes to separate, such as flute,piano; two of one class by names, such as left=violin,right=violin",
    )
    parser.add_argument("--features", help="frames or features by name or class (.npz of avsep data features)")
    parser.add_argument("--out", required=True, help="folder for STEM_NAME.wav and STEM_residual.wav")
    parser.add_argument("--provider", default="auto", help=f"one of {', '.join(PROVIDERS)} [default: auto]")
    parser.add_argument("--engines", help="folder of engines built with --out [default: engines in the bundle's]")
    parser.add_argument("--precision", help="of the graph: fp32, fp16 or int8 [default: fp32 where there is one]")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime or OpenVINO [default: its own choice]")
    parser.add_argument(
        "--context", type=float, help="seconds of each side of a chunk thrown away [default: as the bundle says]"
    )
    parser.add_argument("--format", default="PCM_16", help="of the samples written: PCM_16 or FLOAT [default: PCM_16]")
    parser.add_argument(
        "--rescale", action="store_true", help="scale all files by one factor where samples would be clipped"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    chosen = parser.parse_args(arguments)
    try:
        print(_separate_file(chosen))
    except (AvsepError, OSError) as error:
        print(f"avsep: {one_line(error, 1000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("avsep: stopped", file=sys.stderr)
        return 130
    return 0


def _separate_file(chosen: Any) -> str:
    path, out = Path(chosen.audio), Path(chosen.out)
    if chosen.format not in FORMATS:
        raise ConfigError(f"unknown sample format '{chosen.format}': one of {', '.join(FORMATS)}")
    check_rescale(chosen.rescale, chosen.format)
    audio, rate_hz = read_wav(path)
    features = None if chosen.features is None else read_visual_file(chosen.features)
    separator = BundleSeparator.load(
        chosen.bundle,
        chosen.provider,
        chosen.precision,
        chosen.threads,
        context_s=chosen.context,
        engines=chosen.engines,
    )
    clipped, gain = 0, 1.0
    with separator:
        classes = names_in(chosen.classes, separator.classes)
        names = [source.name for source in separator.sources_of(classes)]
        if features is None and separator.visual_sources and not separator.can_go_unseen:
            raise ConfigError("this separator needs video frames: give --features FILE.npz (avsep data features)")
        mixture = audio
        if chosen.mono or len(audio) not in (1, separator.channels):
            mixture = audio.mean(axis=0, dtype=np.float64, keepdims=True).astype(np.float32)
            if not chosen.mono:
                print(mixed_down(path.name, len(audio), separator.channels), file=sys.stderr)
        mixture = mixture[0] if len(mixture) == 1 else mixture
        separator.check(features, classes)
        separator._check_rate(rate_hz)
        targets = output_paths(path, names, out)
        check_targets([path], [targets], out, chosen.overwrite)
        for reason in separator.unused_engines:
            print(f"note: {reason}", file=sys.stderr)
        with staged_files(out, targets) as staging:
            begin = time.perf_counter()
            sources, presence = separator.separate_with_presence(
                mixture, features, classes, rate_hz, progress=_counter()
            )
            took_s = time.perf_counter() - begin
            signals = [*sources, mixture - sources.sum(axis=0)]
            if chosen.rescale:
                gain = fitting_gain(signals)
            for target, signal in zip(targets, signals, strict=True):
                clipped += write_wav(staging / target.name, signal * np.float32(gain), rate_hz, chosen.format)
    seconds = mixture.shape[-1] / rate_hz
    line = f"{', '.join(str(t) for t in targets)}: {seconds:.2f} s in {took_s:.2f} s on {separator.provider}"
    if chosen.rescale:
        line += f"; all files are scaled by {gain:.4f} ({20 * math.log10(gain):+.1f} dB)"
    if clipped:
        line += (
            f"; {clipped} samples beyond full scale were clipped: --rescale scales all files by one factor instead, "
        )
        line += "--format FLOAT keeps every sample"
    for name, probability in zip(names, () if presence is None else presence, strict=False):
        if probability < (separator.presence_threshold or 0.0):
            line += f"\n{name}: {absent(float(probability))}"
    return line


def _counter() -> Callable[[int, int], None] | None:
    """Chunks done, on a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        end = "\r" + " " * 40 + "\r" if done == total else ""
        print(f"\r{done} of {total} chunks{end}", end="", file=sys.stderr, flush=True)

    return show
