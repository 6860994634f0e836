"""What a report shows, of made-up numbers and noise."""

from __future__ import annotations

import numpy as np

from avsep.evaluation.report import (
    MixtureView,
    ReportContext,
    RunView,
    SeparatedView,
    Series,
    SignalView,
    SourceView,
)

RATE = 11025


def make_context(names=("contavsep", "finetune <b>"), mixtures=2) -> ReportContext:
    rng = np.random.default_rng(0)
    summary = {"mean": dict.fromkeys(("sdr", "sir", "sar", "sdri", "si_sdr"), 7.25), "scored": 9, "skipped": 1}
    summary["degenerate"] = 0
    runs = []
    for k, name in enumerate(names):
        evaluation = {
            "after": [{"lists": {"task-0": summary}, "all": summary}],
            "matrices": {"sdr": [[8.0, None], [7.0 - 4 * k, 9.0]]},
            "continual": {
                "sdr": {"average": [8.0, 8.0 - 2 * k], "forgetting": 1.0 + 4 * k, "backward_transfer": -1.0 - 4 * k}
            },
        }
        curve = Series("loss", [1.0, 2.0, 3.0, 4.0], [0.9, 0.5, 0.8, 0.4])
        check = Series("validation SDR", [2.0, 4.0], [5.0, 6.0])
        settings = {"strategy": name, "preset": "iquery_small"}
        runs.append(
            RunView(name, f"run-{k}", settings, [["flute"], ["tuba"]], evaluation, [curve], check, [2.0, 4.0], 2)
        )

    def signal(label):
        return SignalView(0.2 * rng.standard_normal(4096).astype(np.float32), label)

    def source(class_name, task):
        mask = rng.random((32, 16))
        pictures = rng.integers(0, 255, (2, 3, 24, 24), dtype=np.uint8)
        scores = {"sdr": 5.0, "sdri": 3.0, "sir": 9.0, "sar": float("nan"), "si_sdr": 4.0}
        separated = [SeparatedView(name, signal(f"{class_name} by {name}"), mask, scores) for name in names]
        return SourceView(class_name, task, signal(class_name), mask, pictures, separated, 2.0)

    views = [
        MixtureView("flute + tuba", "A note.", signal("mixture"), [source("flute", 0), source("electric_bass", 1)])
        for _ in range(mixtures)
    ]
    return ReportContext("contavsep against finetune <b>", runs, views, RATE, protocol="fixed", version="0")
