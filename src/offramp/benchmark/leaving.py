"""Where rows leave in a benchmark: at operating points, or by force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offramp.benchmark.document import Contender, Skipped
from offramp.benchmark.subject import Subject
from offramp.benchmark.workloads import Forced, forced_policies
from offramp.calibration import OperatingPoint, list_points
from offramp.engines import dtype_name, processor_fingerprint
from offramp.errors import ConfigError, PointError
from offramp.policies import Policy

SHARES = (0.25, 0.5, 0.75)
_ROUNDING = 1e-2
"""33.3 percent of three layers are one layer."""


@dataclass(frozen=True)
class Leaving:
    """Points and patterns, by the words of each.

    Attributes:
        everywhere: patterns run on every engine, else where no point may.
    """

    points: dict[str, OperatingPoint]
    forced: dict[str, Forced]
    everywhere: bool

    @property
    def policies(self) -> dict[str, Policy]:
        return {said: one.build_policy() for said, one in self.points.items()} | self.forced

    def fitting(self, wanted: Sequence[Contender]) -> tuple[list[Contender], list[Skipped]]:
        """Without points on engines or in precisions that they were not chosen for."""
        able, unable = [], []
        for one in wanted:
            try:
                if one.leaves in self.points:
                    point = self.points[one.leaves]
                    point.check_engine(one.runtime, dtype_name(one.precision))
                able.append(one)
            except PointError as problem:
                unable.append(Skipped(names=(one.name,), why=str(problem)))
        return self._needed(able), unable

    def _needed(self, able: Sequence[Contender]) -> list[Contender]:
        """Without patterns where a point says what they would stand for."""
        if self.everywhere:
            return list(able)
        served = {(one.runtime, one.precision) for one in able if one.leaves in self.points}
        return [
            one
            for one in able
            if one.leaves not in self.forced or (one.runtime, one.precision) not in served
        ]


def choose_leaving(
    subject: Subject, points: Sequence[str] | None, depths: Sequence[float] | None, rows: int
) -> Leaving:
    """Points and depths that are asked for; else `default`, and the usual depths beside it.

    Args:
        depths: shares of all layers; those that are given run on every engine.
        rows: of the benchmark.

    Raises:
        ConfigError: a depth of less than a layer, or a point of what has no folder.
        PointError: no such point, or not for this model.
    """
    known = [] if subject.folder is None else list_points(subject.folder)
    if points is None:
        points = ["default"] if depths is None and "default" in known else []
    chosen = {f"point {name}": _point(subject, name) for name in points}
    depth = subject.model.depth
    check_depths(depths or (), depth)
    shares = depths or [share for share in SHARES if share * depth >= 1] or [1.0]
    names = [f"forced {100 * share:g}% depth" for share in shares]
    forced = forced_policies(subject.model, shares, rows)
    return Leaving(chosen, dict(zip(names, forced, strict=True)), everywhere=depths is not None)


def check_depths(shares: Sequence[float], depth: int) -> None:
    """Raise ConfigError where one is less than a layer."""
    for share in shares:
        if share * depth < 1 - _ROUNDING:
            raise ConfigError(
                f"--depths: {100 * share:g} percent of {depth} layers is less than one layer. Give "
                f"{100 / depth:.3g} or more."
            )


def _point(subject: Subject, name: str) -> OperatingPoint:
    if subject.folder is None:
        raise ConfigError(f"--point {name}: {subject.name} is {subject.source}. Leave it out.")
    point = OperatingPoint.load(subject.folder, name)
    point.check(subject.model.fingerprint(), processor_fingerprint(subject.processor))
    return point
