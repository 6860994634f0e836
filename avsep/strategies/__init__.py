"""Continual strategies. One page a method."""

from avsep.strategies.agem import AGEM
from avsep.strategies.avcil import AVCIL
from avsep.strategies.base import Step, Strategy, TaskContext, TaskData
from avsep.strategies.composition import Composition, build_strategy
from avsep.strategies.contavsep import ContAVSep
from avsep.strategies.derpp import DERpp
from avsep.strategies.ewc import EWC
from avsep.strategies.ewf import EWF
from avsep.strategies.finetune import FineTune
from avsep.strategies.gated_distillation import GatedDistillation
from avsep.strategies.grad_surgery import GradSurgery
from avsep.strategies.joint import Joint
from avsep.strategies.lwf import LwF
from avsep.strategies.plop import PLOP
from avsep.strategies.prototype_relations import PrototypeRelations
from avsep.strategies.query_extension import QueryExtension
from avsep.strategies.slot_span import SlotSpan
from avsep.strategies.task_adapters import TaskAdapters
from avsep.strategies.topology import Topology
from avsep.strategies.weight_average import WeightAverage
from avsep.strategies.weight_fusion import WeightFusion

__all__ = [
    "AGEM",
    "AVCIL",
    "EWC",
    "EWF",
    "PLOP",
    "Composition",
    "ContAVSep",
    "DERpp",
    "FineTune",
    "GatedDistillation",
    "GradSurgery",
    "Joint",
    "LwF",
    "PrototypeRelations",
    "QueryExtension",
    "SlotSpan",
    "Step",
    "Strategy",
    "TaskAdapters",
    "TaskContext",
    "TaskData",
    "Topology",
    "WeightAverage",
    "WeightFusion",
    "build_strategy",
]
