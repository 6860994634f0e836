"""Memory policies."""

from __future__ import annotations

import numpy as np
import pytest

from avsep.errors import ConfigError, UnknownNameError
from avsep.registry import MEMORIES

CANDIDATES = {"a": [f"a{i}" for i in range(6)], "b": [f"b{i}" for i in range(3)]}


def test_none_keeps_nothing():
    assert MEMORIES.create("none").select(CANDIDATES, np.random.default_rng(0)) == {"a": [], "b": []}


def test_random_per_class_draws_distinct_members_reproducibly():
    policy = MEMORIES.create("random_per_class", {"per_class": 3})
    chosen = policy.select(CANDIDATES, np.random.default_rng(7))
    assert chosen == policy.select(CANDIDATES, np.random.default_rng(7))
    assert all(len(set(v)) == 3 and set(v) <= set(CANDIDATES[k]) for k, v in chosen.items())
    draws = {tuple(policy.select(CANDIDATES, np.random.default_rng(s))["a"]) for s in range(20)}
    assert len(draws) > 5


def test_budgets_that_cannot_be_filled():
    policy = MEMORIES.create("random_per_class", {"per_class": 4})
    policy.check({"a": 4})
    with pytest.raises(ConfigError, match="memory of 4 clips per class is larger than class 'b', which has 3"):
        policy.check({"a": 6, "b": 3})
    with pytest.raises(ConfigError, match="per_class must be at least 1, got 0"):
        MEMORIES.create("random_per_class", {"per_class": 0})
    with pytest.raises(UnknownNameError, match="no parameter 'perclass': did you mean 'per_class'"):
        MEMORIES.create("random_per_class", {"perclass": 4})
