"""Training losses, one file a family."""

from offramp.objectives.alternating import Alternating, correctness_loss
from offramp.objectives.base import Clock, Gradients, Objective, Part, Stage, added, weighted_sum
from offramp.objectives.distillation import SelfDistillation
from offramp.objectives.equal import EqualWeights
from offramp.objectives.imitation import Imitating
from offramp.objectives.joint import DepthWeighted
from offramp.objectives.plain import FullDepth
from offramp.objectives.robust import RobustExits
from offramp.objectives.simulated import SimulatedExits
from offramp.objectives.staged import TwoStage
from offramp.objectives.students import TeachStudents
from offramp.objectives.task import distillation_loss, row_losses, task_loss
from offramp.objectives.weighted import LearnedWeights

__all__ = [
    "Alternating",
    "Clock",
    "DepthWeighted",
    "EqualWeights",
    "FullDepth",
    "Gradients",
    "Imitating",
    "LearnedWeights",
    "Objective",
    "Part",
    "RobustExits",
    "SelfDistillation",
    "SimulatedExits",
    "Stage",
    "TeachStudents",
    "TwoStage",
    "added",
    "correctness_loss",
    "distillation_loss",
    "row_losses",
    "task_loss",
    "weighted_sum",
]
