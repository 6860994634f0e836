"""Continual strategies. One page a method."""

from avsep.strategies.base import Step, Strategy, TaskData
from avsep.strategies.contavsep import ContAVSep
from avsep.strategies.ewc import EWC
from avsep.strategies.finetune import FineTune
from avsep.strategies.joint import Joint
from avsep.strategies.plop import PLOP

__all__ = ["EWC", "PLOP", "ContAVSep", "FineTune", "Joint", "Step", "Strategy", "TaskData"]
