"""What a call or a row runs under, once it is known to fit the model."""

from __future__ import annotations

from typing import NamedTuple

from offramp.calibration.certificate import Certificate
from offramp.calibration.conformal import Sets
from offramp.calibration.point import OperatingPoint
from offramp.calibration.probabilities import Temperatures
from offramp.engines import Budget
from offramp.errors import PointError
from offramp.policies import Policy
from offramp.prediction.items import Items


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


def check_length(point: OperatingPoint, items: Items, whole: Items) -> None:
    """Refuse a promise of whole texts where they are cut to fewer tokens. Raises PointError."""
    if items.longest != whole.longest:
        raise PointError(
            f"Point '{point.name}' promises for texts of up to {whole.longest} tokens, and "
            f"max_length cuts them to {items.longest}. Leave max_length out."
        )
