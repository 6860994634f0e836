"""Continual strategies. One page a method."""

from avsep.strategies.agem import AGEM
from avsep.strategies.analytic_mask import AnalyticMask
from avsep.strategies.avcil import AVCIL
from avsep.strategies.base import Step, Strategy, TaskContext, TaskData
from avsep.strategies.composition import Composition, build_strategy
from avsep.strategies.contavsep import ContAVSep
from avsep.strategies.ewc import EWC
from avsep.strategies.ewf import EWF
from avsep.strategies.finetune import FineTune
from avsep.strategies.joint import Joint
from avsep.strategies.lwf import LwF
from avsep.strategies.plop import PLOP
from avsep.strategies.query_extension import QueryExtension
from avsep.strategies.similar_queries import SimilarQueries
from avsep.strategies.task_adapters import TaskAdapters
from avsep.strategies.text_queries import TextQueries
from avsep.strategies.weight_average import WeightAverage
from avsep.strategies.weight_fusion import WeightFusion

__all__ = [
    "AGEM",
    "AVCIL",
    "EWC",
    "EWF",
    "PLOP",
    "AnalyticMask",
    "Composition",
    "ContAVSep",
    "FineTune",
    "Joint",
    "LwF",
    "QueryExtension",
    "SimilarQueries",
    "Step",
    "Strategy",
    "TaskAdapters",
    "TaskContext",
    "TaskData",
    "TextQueries",
    "WeightAverage",
    "WeightFusion",
    "build_strategy",
]
