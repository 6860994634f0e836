"""Continual strategies. One page a method."""

from avsep.strategies.avcil import AVCIL
from avsep.strategies.base import Step, Strategy, TaskData
from avsep.strategies.contavsep import ContAVSep
from avsep.strategies.ewc import EWC
from avsep.strategies.ewf import EWF
from avsep.strategies.finetune import FineTune
from avsep.strategies.joint import Joint
from avsep.strategies.lwf import LwF
from avsep.strategies.plop import PLOP
from avsep.strategies.query_extension import QueryExtension

__all__ = [
    "AVCIL",
    "EWC",
    "EWF",
    "PLOP",
    "ContAVSep",
    "FineTune",
    "Joint",
    "LwF",
    "QueryExtension",
    "Step",
    "Strategy",
    "TaskData",
]
