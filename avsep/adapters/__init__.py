"""Adapters: what a component carries for each task. Importing this package registers the built-in ones."""

from avsep.adapters.base import Adapter, FeatureAdapter
from avsep.adapters.film import FiLM
from avsep.adapters.low_rank import LowRank
from avsep.adapters.projection import Projection
from avsep.adapters.task_tails import TaskTails

__all__ = ["Adapter", "FeatureAdapter", "FiLM", "LowRank", "Projection", "TaskTails"]
