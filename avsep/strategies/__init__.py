"""Continual strategies. One page a method."""

from avsep.strategies.base import Step, Strategy, TaskData
from avsep.strategies.contavsep import ContAVSep
from avsep.strategies.finetune import FineTune
from avsep.strategies.joint import Joint

__all__ = ["ContAVSep", "FineTune", "Joint", "Step", "Strategy", "TaskData"]
