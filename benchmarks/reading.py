"""How much memory reading a store takes, measured in a fresh process for each store.

``python -m avsep.benchmarks.reading STORE [BATCH MIXTURES PASSES]`` prints what one process saw, as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from avsep.benchmarks.measure import environment, system_load
from avsep.data.store import Store
from avsep.errors import AvsepError

__all__ = ["memory_rows", "reading_memory"]

_PASSES = 6


def memory_rows(
    stores: Mapping[str, Path], *, batch: int, mixtures: int, done: Callable[[], None] | None = None
) -> Iterator[dict[str, Any]]:
    """A row a store, by what to call it: ``peak_memory_mb`` is the process's own memory (anonymous pages, so without
    the system's cache of files, which maps show too) at its highest, with Python, PyTorch and all.

    The first store is the baseline of ``ratio``. Linux only.
    """
    baseline = None
    for name, path in stores.items():
        load = system_load()
        command = [sys.executable, "-m", "avsep.benchmarks.reading", str(path), str(batch), str(mixtures)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise AvsepError(f"the process that reads {path} failed: {result.stderr.strip().splitlines()[-1]}")
        found = json.loads(result.stdout)
        baseline = baseline or found["median_ms"]
        yield {
            "case": "data, memory",
            "variant": name,
            "median_ms": round(found["median_ms"], 3),
            "p20_ms": round(found["p20_ms"], 3),
            "p80_ms": round(found["p80_ms"], 3),
            "repeats": _PASSES,
            "ratio": round(baseline / found["median_ms"], 3),
            "peak_memory_mb": round(found["peak_mb"], 1),
            "per_second": float(f"{found['sources'] * 1e3 / found['median_ms']:.4g}"),
            "item": "source",
            "settings": f"batch {batch}, {mixtures} mixtures a pass; {found['before_mb']:.1f} MB before the store was "
            "opened",
            "check": f"{found['clips']} clips, {found['megabytes']:.0f} MB",
            "load": load,
            **environment("cpu"),
        }
        if done is not None:
            done()


def reading_memory(path: str | Path, batch: int, mixtures: int, passes: int = _PASSES) -> dict[str, float]:
    """Read passes of different mixtures in this process, and look at its memory after every batch."""
    from avsep.benchmarks.cases import _loader, _mixtures_of
    from avsep.mixers import AsPublished
    from avsep.mixers.mixtures import TrainingMixtures
    from avsep.spec import FrontEndSpec

    before = peak = _anonymous_mb()
    store = Store.open(path)
    data: TrainingMixtures = _mixtures_of(store, batch, mixtures, FrontEndSpec(sample_rate_hz=store.sample_rate_hz))
    times = []
    for _ in range(passes):
        began = time.perf_counter()
        for _ in _loader(data, batch, 0):
            peak = max(peak, _anonymous_mb())
        times.append(1e3 * (time.perf_counter() - began))
        assert isinstance(data.mixer, AsPublished)
        data.mixer.order = np.roll(data.mixer.order, 1)
    return {
        "before_mb": before,
        "peak_mb": peak,
        "median_ms": median(times),
        "p20_ms": float(np.percentile(times, 20)),
        "p80_ms": float(np.percentile(times, 80)),
        "sources": len(data) * data.train.sources,
        "clips": len(store.clips),
        "megabytes": sum(r["bytes"] for e in store.manifest["clips"] for r in e["files"].values()) / 1e6,
    }


def _anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1e3
    raise AvsepError("this system does not tell a process's own memory: leave --memory out")


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    print(json.dumps(reading_memory(sys.argv[1], *map(int, sys.argv[2:]))))
