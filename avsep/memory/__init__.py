"""Memory policies: which clips of a finished task are kept for replay. They hold ids, never tensors."""

from avsep.memory.base import MemoryPolicy
from avsep.memory.none import NoMemory
from avsep.memory.random_per_class import RandomPerClass

__all__ = ["MemoryPolicy", "NoMemory", "RandomPerClass"]
