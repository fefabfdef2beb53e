"""What a call or a row runs under, once it is known to fit the model."""

from __future__ import annotations

from typing import NamedTuple

from offramp.calibration.certificate import Certificate
from offramp.calibration.conformal import Sets
from offramp.calibration.probabilities import Temperatures
from offramp.engines import Budget
from offramp.policies import Policy


class ReadyPoint(NamedTuple):
    """What a point stands for: where rows leave, and what is made of their answers."""

    policy: Policy
    sets: Sets | None = None
    temperatures: Temperatures | None = None
    certificate: Certificate | None = None

    def temperature(self, exit_layer: int) -> float:
        """By which the scores of an exit are divided before they are probabilities."""
        return 1.0 if self.temperatures is None else self.temperatures.values[exit_layer - 1]


class Course(NamedTuple):
    """How a row runs."""

    point: ReadyPoint
    budget: Budget
