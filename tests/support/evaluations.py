"""Evaluations of runs with made-up scores."""

from __future__ import annotations

import numpy as np

from avsep.evaluation.comparison import Cell
from avsep.evaluation.evaluate import METRICS, summarise

TASKS = [["a", "b"], ["c", "d"], ["e", "f"]]
FEW = 300  # resamples: enough for everything but an interval's last digits


def evaluation(score, *, per_task=12, cross=6, steps=3, paper=False, skipped=(), **identity):
    """An ``evaluation.json``: ``score(t, task, mixture key)`` is the SDR of both sources of a mixture."""
    after = []
    for t in range(steps):
        rows, number = [], 0
        for j in range(t + 1):
            lists = [
                (f"paper-{t}" if paper else f"task-{j}", per_task),
                *([("cross", cross)] if j and not paper else []),
            ]
            for name, count in lists:
                for k in range(count):
                    degenerate = "self" if paper and k == 0 else ""
                    status = "silent_estimate" if (t, name, k) in skipped else "ok"
                    for place in range(2):
                        sdr = float(score(t, j, (name, k))) + 0.1 * place
                        values = {m: None if status != "ok" else sdr + i for i, m in enumerate(METRICS)}
                        rows.append(
                            {
                                "list": name,
                                "mixture": number,
                                "task": j,
                                "status": status,
                                "degenerate": degenerate,
                                "ill_conditioned": False,
                                **values,
                            }
                        )
                    number += 1
        after.append({"task": t, "rows": rows, "all": summarise(rows)})
    return {
        "protocol": "paper" if paper else "fixed",
        "protocol_version": 1,
        "protocol_hash": "1" * 64,
        "store_hash": "2" * 64,
        "tasks": TASKS[:steps],
        "after": after,
        **identity,
    }


def noise(*key):
    """A number near 0 that depends on the key alone."""
    return np.random.default_rng([sum(map(ord, str(part))) for part in key]).standard_normal()


def cells(method, seeds, level=0.0, spread=0.0, **kwargs):
    return [
        Cell(
            method,
            s,
            evaluation(lambda t, j, key, s=s: level + (10, 12, 9, 8)[t] + j + noise(*key) + spread * (s - 1), **kwargs),
            memory_bytes=1000 + s,
            seconds=10.0 * s**2,  # of three seeds the median is not the mean
        )
        for s in seeds
    ]
