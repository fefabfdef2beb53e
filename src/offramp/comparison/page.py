"""A board as one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.calibration.sentences import policy_text
from offramp.comparison import words
from offramp.comparison.board import (
    TARGETS,
    AtTarget,
    Board,
    Figure,
)
from offramp.comparison.chart import Chart
from offramp.report.templates import write_html


def write_page(board: Board, path: Path) -> Path:
    """Write the leaderboard as a page that asks for nothing; gives the path.

    Raises:
        OutputError: the path is a folder, or cannot be written.
    """
    chart = Chart(board)
    areas = [one.row.area for one in board.methods]
    gaps = [one.against["area"] for one in board.methods if "area" in one.against]
    return write_html(
        path,
        "comparison",
        title=board.title,
        board=board,
        facts=_facts(board),
        chart=chart,
        targets=TARGETS,
        areas=Scale.around(areas),
        gaps=Scale.around(gaps, 0.0),
        at=_at,
        policy_text=policy_text,
        words=words,
        data=_data(board, chart),
    )


@dataclass(frozen=True, slots=True)
class Scale:
    """Numbers as places in a small bar, in percent from its left."""

    low: float
    high: float

    @classmethod
    def around(cls, figures: Iterable[Figure], *more: float) -> Scale:
        """Wide enough for the intervals of all, and for more."""
        ends = [*more, *(end for one in figures for end in (one.low, one.value, one.high))]
        return cls(min(ends, default=0.0), max(ends, default=1.0))

    def place(self, value: float) -> float:
        wide = self.high - self.low
        return 100 * (value - self.low) / wide if wide else 50.0


def _at(found: Iterable[AtTarget], target: float) -> AtTarget | None:
    return next((one for one in found if one.target == target), None)


def _facts(board: Board) -> dict[str, str]:
    """What is said of how it was made, after what the board knows itself."""
    facts = {
        "layers": str(board.depth),
        "seeds": ", ".join(map(str, board.seeds)),
        "test rows": f"{board.test_rows:,}",
        "commonest answer": f"{board.metric} {words.written(board.guess)} at no cost",
        "written by": f"offramp {board.offramp}",
    }
    if board.plain is not None:
        facts["plain fine-tune"] = (
            f"{board.metric} {words.written(board.plain.value)} at full depth "
            f"(95 % interval {words.interval(board.plain)})"
        )
    return board.facts | {key: said for key, said in facts.items() if key not in board.facts}


def _data(board: Board, chart: Chart) -> dict[str, Any]:
    """What the script reads out."""
    return {
        "metric": board.metric,
        "costs": [float(cost) for cost in chart.costs],
        "last": chart.last,
        "values": chart.values,
        "lines": [
            {"number": line.number, "name": line.name, "scores": _rounded(line.scores)}
            for line in chart.lines
        ],
    }


def _rounded(scores: Iterable[float]) -> list[float | None]:
    return [round(float(one), 5) if math.isfinite(one) else None for one in scores]
