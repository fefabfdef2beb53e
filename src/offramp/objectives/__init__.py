"""Training losses, one file a family."""

from offramp.objectives.base import Clock, Gradients, Objective, Part, Stage, added, weighted_sum
from offramp.objectives.distillation import SelfDistillation
from offramp.objectives.joint import DepthWeighted
from offramp.objectives.plain import FullDepth
from offramp.objectives.robust import RobustExits
from offramp.objectives.staged import TwoStage
from offramp.objectives.students import TeachStudents
from offramp.objectives.task import distillation_loss, row_losses, task_loss
from offramp.objectives.weighted import LearnedWeights

__all__ = [
    "Clock",
    "DepthWeighted",
    "FullDepth",
    "Gradients",
    "LearnedWeights",
    "Objective",
    "Part",
    "RobustExits",
    "SelfDistillation",
    "Stage",
    "TeachStudents",
    "TwoStage",
    "added",
    "distillation_loss",
    "row_losses",
    "task_loss",
    "weighted_sum",
]
