"""Every strategy over two tiny tasks."""

from __future__ import annotations

import pytest
from continual_runs import differing, resume_killed, train, weights


@pytest.mark.parametrize("memory", ["none", "random_per_class"])
@pytest.mark.parametrize("strategy", ["finetune", "contavsep"])
def test_a_killed_run_goes_on_to_the_same_weights(strategy, memory, tone_store, tmp_path):
    run = train(tone_store, tmp_path / "run", strategy, memory)
    resumed = resume_killed(tone_store, run, strategy, memory)
    assert differing(weights(run), weights(resumed)) == []
