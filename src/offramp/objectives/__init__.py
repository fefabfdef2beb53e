"""Training losses, one file a family."""

from offramp.objectives.base import Clock, Objective, Part, Stage, weighted_sum
from offramp.objectives.distillation import SelfDistillation
from offramp.objectives.joint import DepthWeighted
from offramp.objectives.plain import FullDepth
from offramp.objectives.staged import TwoStage
from offramp.objectives.task import distillation_loss, row_losses, task_loss

__all__ = [
    "Clock",
    "DepthWeighted",
    "FullDepth",
    "Objective",
    "Part",
    "SelfDistillation",
    "Stage",
    "TwoStage",
    "distillation_loss",
    "row_losses",
    "task_loss",
    "weighted_sum",
]
