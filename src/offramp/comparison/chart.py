"""Score over cost of all methods, as places in a chart that any width may stretch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from offramp.comparison.board import CHEAPEST, DEAREST, TARGETS, Board, Point, PolicyRow
from offramp.report.picture import ticks

SIDE = 1000
"""Width and height of the drawing in its own units; the page stretches it."""
QUIET = ("fixed", "truncated")
"""Baselines, drawn dashed."""
COLOURED, HUES = 5, 5
_STEP = 0.01
Floats = npt.NDArray[np.float64]


def mean_curve(curves: Sequence[Sequence[Point]], costs: Floats) -> Floats:
    """Score at each cost, linear between points, mean over seeds; (costs,).

    NaN below the cheapest point of any seed and above the dearest of all.
    """
    starts, ends = (max(curve[place].cost for curve in curves) for place in (0, -1))
    scores = [
        np.interp(costs, [dot.cost for dot in curve], [dot.score for dot in curve])
        for curve in curves
    ]
    inside = (costs >= starts - 1e-9) & (costs <= ends + 1e-9)
    return np.where(inside, np.mean(scores, axis=0), np.nan)


@dataclass(frozen=True, slots=True)
class Line:
    """One curve.

    Attributes:
        number: of the method in the table, or a letter; it stands on the curve.
        style: classes of its colour and dashes.
        shown: coloured from the start.
        scores: at each cost of the chart, NaN where there is none.
        where: index of the cost at which the number stands, None where it is out of sight.
    """

    number: str
    name: str
    style: str
    shown: bool
    scores: Floats
    where: int | None


class Chart:
    """The curves of a board's chosen families, the baselines among them.

    Attributes:
        costs: shares of full depth, from 0 on.
        lines: in the order of the table.
        values: lowest and highest score in sight.
    """

    def __init__(self, board: Board) -> None:
        rows = _rows(board)
        last = max((dot.cost for *_, row in rows for one in row.curves for dot in one), default=1.0)
        self.costs: Floats = np.arange(0, max(1.0, last) + _STEP, _STEP).round(4)
        scores = [mean_curve(row.curves, self.costs) for *_, row in rows]
        self.values = self._sight(scores, [] if board.plain is None else [board.plain.value])
        self.lines: list[Line] = []
        self.last = min(max(1.0, last), float(self.costs[-1])) + _STEP
        coloured = 0
        for (number, name, _), found in zip(rows, scores, strict=True):
            quiet = name.split()[0] in QUIET
            style = "base" if quiet else f"h{coloured % HUES} d{coloured // HUES % 4}"
            shown, coloured = quiet or coloured < COLOURED, coloured + (not quiet)
            where = self._where(found, len(self.lines))
            self.lines.append(Line(number, name, style, shown, found, where))

    def _sight(self, scores: Sequence[Floats], more: Sequence[float]) -> tuple[float, float]:
        """All scores in the range of the area, with a margin."""
        inside = (self.costs >= CHEAPEST - 1e-9) & (self.costs <= DEAREST + 1e-9)
        values = np.concatenate([*(one[inside] for one in scores), more])
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
        return low - margin, high + margin

    def _where(self, scores: Floats, turn: int) -> int | None:
        """Where the number of the line stands: each a bit further right than the one before."""
        low, high = self.values
        first = round((0.24 + 0.08 * (turn % 6) + 0.02 * (turn // 6)) / _STEP)
        order = [*range(first, len(scores)), *range(first, 0, -1)]
        return next((at for at in order if low <= scores[at] <= high), None)

    def x(self, cost: float) -> float:
        return cost / self.last * SIDE

    def y(self, score: float) -> float:
        low, high = self.values
        return (high - score) / (high - low) * SIDE

    def place(self, line: Line) -> tuple[float, float]:
        """Of the number on a line whose `where` is known, in percent from the left and the top."""
        at = line.where or 0
        return 100 * self.x(self.costs[at]) / SIDE, 100 * self.y(line.scores[at]) / SIDE

    def path(self, line: Line) -> str:
        dots = [
            f"{self.x(cost):.1f} {self.y(score):.1f}"
            for cost, score in zip(self.costs, line.scores, strict=True)
            if np.isfinite(score)
        ]
        return "M" + "L".join(dots) if dots else ""

    @cached_property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Costs, in percent from the left."""
        return [(100 * self.x(at) / SIDE, f"{100 * at:.0f} %") for at, _ in ticks(0, 1, 5)]

    @cached_property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Scores, in percent from the top."""
        return [
            (100 * self.y(at) / SIDE, said.replace("-", "\N{MINUS SIGN}"))
            for at, said in ticks(*self.values, 6)
        ]

    @cached_property
    def targets(self) -> list[tuple[float, str]]:
        """Cost reductions, in percent from the left."""
        return [
            (100 * self.x(1 / target) / SIDE, f"{target:g}\N{MULTIPLICATION SIGN}")
            for target in TARGETS
        ]

    @property
    def span(self) -> tuple[float, float]:
        """Where the area is taken."""
        return self.x(CHEAPEST), self.x(DEAREST)


def _rows(board: Board) -> list[tuple[str, str, PolicyRow]]:
    """(number, name, family) of each line; `fixed` of the best method where it is none itself."""
    rows = [(str(rank), one.name, one.row) for rank, one in enumerate(board.methods, 1)]
    if "fixed" not in [name for _, name, _ in rows]:
        found = [(one.name, row) for one in board.methods for row in one.policies]
        fixed = [(name, row) for name, row in found if row.name == "fixed"][:1]
        rows += [("F", f"fixed exits of {name}", row) for name, row in fixed]
    return [row for row in rows if row[2].curves and all(row[2].curves)]
