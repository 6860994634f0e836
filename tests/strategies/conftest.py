"""Fixtures of the tests of strategies."""

from __future__ import annotations

import pytest

from support.strategy_steps import student_and_teacher


@pytest.fixture(scope="module")
def separators():
    """A student of four classes and its teacher, which knows the first two."""
    return student_and_teacher()
