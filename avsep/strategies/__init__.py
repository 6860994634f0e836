"""Continual strategies. One page a method."""

from avsep.strategies.agem import AGEM
from avsep.strategies.analytic_mask import AnalyticMask
from avsep.strategies.avcil import AVCIL
from avsep.strategies.base import Step, Strategy, TaskContext, TaskData
from avsep.strategies.composition import Composition, build_strategy
from avsep.strategies.contavsep import ContAVSep
from avsep.strategies.derpp import DERpp
from avsep.strategies.drift_compensation import DriftCompensation
from avsep.strategies.ewc import EWC
from avsep.strategies.ewf import EWF
from avsep.strategies.family_queries import FamilyQueries
from avsep.strategies.feature_distillation import FeatureDistillation
from avsep.strategies.finetune import FineTune
from avsep.strategies.first_session import FirstSession
from avsep.strategies.gated_anchor import GatedAnchor
from avsep.strategies.gated_distillation import GatedDistillation
from avsep.strategies.gdumb import GDumb
from avsep.strategies.grad_surgery import GradSurgery
from avsep.strategies.joint import Joint
from avsep.strategies.l2_anchor import L2Anchor
from avsep.strategies.low_rank_step import LowRankStep
from avsep.strategies.lwf import LwF
from avsep.strategies.magmax import MagMax
from avsep.strategies.mas import MAS
from avsep.strategies.perturb_and_merge import PerturbAndMerge
from avsep.strategies.plop import PLOP
from avsep.strategies.prototype_relations import PrototypeRelations
from avsep.strategies.query_extension import QueryExtension
from avsep.strategies.reference import Reference
from avsep.strategies.shrink_and_perturb import ShrinkAndPerturb
from avsep.strategies.si import SI
from avsep.strategies.similar_queries import SimilarQueries
from avsep.strategies.slot_span import SlotSpan
from avsep.strategies.slow_learner import SlowLearner
from avsep.strategies.task_adapters import TaskAdapters
from avsep.strategies.text_queries import TextQueries
from avsep.strategies.topology import Topology
from avsep.strategies.weight_average import WeightAverage
from avsep.strategies.weight_fusion import WeightFusion

__all__ = [
    "AGEM",
    "AVCIL",
    "EWC",
    "EWF",
    "MAS",
    "PLOP",
    "SI",
    "AnalyticMask",
    "Composition",
    "ContAVSep",
    "DERpp",
    "DriftCompensation",
    "FamilyQueries",
    "FeatureDistillation",
    "FineTune",
    "FirstSession",
    "GDumb",
    "GatedAnchor",
    "GatedDistillation",
    "GradSurgery",
    "Joint",
    "L2Anchor",
    "LowRankStep",
    "LwF",
    "MagMax",
    "PerturbAndMerge",
    "PrototypeRelations",
    "QueryExtension",
    "Reference",
    "ShrinkAndPerturb",
    "SimilarQueries",
    "SlotSpan",
    "SlowLearner",
    "Step",
    "Strategy",
    "TaskAdapters",
    "TaskContext",
    "TaskData",
    "TextQueries",
    "Topology",
    "WeightAverage",
    "WeightFusion",
    "build_strategy",
]
