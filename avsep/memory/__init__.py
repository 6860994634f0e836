"""Memory policies: which clips of a finished task are kept for replay. They hold ids, never tensors."""

from avsep.memory.base import Candidates, Exemplar, Memory, MemoryPolicy, PerClass, Total
from avsep.memory.byte_budget import ByteBudget
from avsep.memory.class_balanced import ClassBalanced
from avsep.memory.hardest import Hardest
from avsep.memory.herding import Herding
from avsep.memory.k_center import KCenter
from avsep.memory.none import NoMemory
from avsep.memory.random_per_class import RandomPerClass
from avsep.memory.reconstruction import Reconstruction
from avsep.memory.reservoir import Reservoir

__all__ = [
    "ByteBudget",
    "Candidates",
    "ClassBalanced",
    "Exemplar",
    "Hardest",
    "Herding",
    "KCenter",
    "Memory",
    "MemoryPolicy",
    "NoMemory",
    "PerClass",
    "RandomPerClass",
    "Reconstruction",
    "Reservoir",
    "Total",
]
