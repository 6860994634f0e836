"""What only a GPU can show. Run with ``python -m pytest -m gpu tests/kernels/test_gpu.py`` on a machine with one."""

from __future__ import annotations

import pytest
import torch

from avsep import load_separator
from avsep.data.tasks import task_stream
from avsep.evaluation.evaluate import evaluate_run
from avsep.registry import STRATEGIES
from avsep.training.learner import ContinualLearner
from avsep.types import VisualInputs
from support.continual_runs import REFUSED, SEPARATORS, resume_killed, train, weights
from support.tones import TINY_FRONT_END, TINY_TASKS, tiny_run_spec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


_CASES = [
    (strategy, separator)
    for strategy in [*((s.name, dict(s.example)) for s in STRATEGIES), ("lwf", {"variant": "grown_teacher"})]
    for separator in SEPARATORS
    if separator not in REFUSED.get(strategy[0], ())
]


@pytest.mark.parametrize("precision", ["auto", "32-true", "16-mixed"])
def test_training_resuming_and_scoring(precision, tone_store, tmp_path):
    stream = task_stream(tone_store, TINY_TASKS, clip_samples=TINY_FRONT_END["clip_samples"])
    spec = tiny_run_spec(precision=precision)
    ContinualLearner.from_spec(spec, accelerator="cuda", workers=1).fit(stream, tmp_path / "run", progress=False)
    again = ContinualLearner.from_spec(spec, accelerator="cuda", workers=0)
    again.fit(stream, tmp_path / "run", resume=True, progress=False)
    separator = load_separator(tmp_path / "run")
    assert all(p.isfinite().all() for p in separator.parameters())
    assert evaluate_run(tmp_path / "run", device="cuda")["matrix"][1][0] is not None


@pytest.mark.parametrize(("strategy", "separator"), _CASES)
def test_every_strategy_learns_and_resumes(strategy, separator, tone_store, tmp_path):
    how = {"separator": separator, "accelerator": "cuda"}
    out = train(tone_store, tmp_path / "run", strategy, "random_per_class", **how)
    killed = resume_killed(tone_store, out, strategy, "random_per_class", **how)
    assert all(value.isfinite().all() for folder in (out, killed) for value in weights(folder).values())


def test_the_separator_gives_the_same_as_on_the_cpu(tone_run):
    separator = load_separator(tone_run)
    rng = torch.Generator().manual_seed(0)
    mixture = 0.2 * torch.randn(1, TINY_FRONT_END["clip_samples"], generator=rng)
    pictures = torch.randint(0, 255, (1, 2, 3, 3, 32, 32), dtype=torch.uint8, generator=rng)
    motion = torch.randint(0, 255, (1, 2, 6, 1, 16, 16), dtype=torch.uint8, generator=rng)
    class_ids = torch.tensor([[0, 3]])

    @torch.no_grad()
    def run(device):
        separator.to(device)
        visual = separator.encode_visual(VisualInputs(pictures.to(device), motion.to(device)))
        return separator.separate(mixture.to(device), visual, class_ids.to(device)).cpu()

    torch.testing.assert_close(run("cuda"), run("cpu"), rtol=1e-3, atol=2e-3)  # TF32 convolutions
