"""What a policy scores and costs on a table, and what it saves on the clock."""

from offramp.evaluation.scoring import Evaluation, evaluate
from offramp.evaluation.speed import Speed, ideal_speed_up, laps, measure_speed

__all__ = ["Evaluation", "Speed", "evaluate", "ideal_speed_up", "laps", "measure_speed"]
