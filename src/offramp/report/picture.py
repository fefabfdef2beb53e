"""The picture of a model card: score against cost of every policy, and the chosen points."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offramp.calibration import Calibration, OperatingPoint, Outcome
from offramp.calibration.listing import PICTURE, drawn, refresh, stamp
from offramp.calibration.point import usable_points
from offramp.calibration.sentences import policy_text
from offramp.errors import PointError
from offramp.report.figures import Curve, curves_of
from offramp.report.templates import pages
from offramp.storage import whole_file

logger = logging.getLogger("offramp")

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 760, 64, 736, 74, 400
_KEYS, _LINE, _LETTER, _COLOURS = 462, 22, 7, 6
Place = tuple[float, float]
Dot = Outcome | OperatingPoint


def write_picture(folder: str | Path, found: Calibration) -> Path | None:
    """Draw what `calibrate` tried and chose as `trade-off.svg` in a model folder; gives its path.

    Points of the folder that were chosen on the same rows are drawn, too. The model card shows
    the picture until one of these points changes. A file of that name that is not ours stays as
    it is, which is logged, and None is given.

    Raises:
        PointError: the point is not in the folder: save it first.
        OutputError: the file cannot be written.
    """
    folder, chosen = Path(folder), found.point
    kept = usable_points(folder)
    if chosen not in kept:
        raise PointError(
            f"{folder} does not hold the point '{chosen.name}' as it was chosen: save it there "
            "before it is drawn."
        )
    path = folder / PICTURE
    if path.exists() and drawn(folder) is None:
        logger.info("%s is your own and stays as it is.", path)
        return None
    points = [point for point in kept if _alike(point, chosen)]
    text = _render(curves_of(found.frontier), points, chosen)
    with whole_file(path) as staged:
        staged.write_text(text, encoding="utf-8")
    refresh(folder, kept)
    return path


def _alike(point: OperatingPoint, chosen: OperatingPoint) -> bool:
    """Whether the figures of two points are of the same rows, model and metric."""
    names = ("metric", "rows", "data_fingerprint", "model_fingerprint", "processor_fingerprint")
    return all(getattr(point, name) == getattr(chosen, name) for name in names)


def _height(dot: Dot) -> float:
    return dot.disagreement if dot.score is None else dot.score


class Plot:
    """Where costs and scores lie in the picture.

    Attributes:
        name: of what is drawn against the cost.
        full: place of full depth.
    """

    width, left, right, bottom = WIDTH, LEFT, RIGHT, BOTTOM

    def __init__(self, dots: Sequence[Dot], chosen: OperatingPoint) -> None:
        self.name = chosen.metric or "disagreement with full depth"
        level = 0.0 if chosen.full_score is None else chosen.full_score
        self.costs = 0.0, max(1.0, *(dot.cost for dot in dots)) * 1.02
        values = [level, *map(_height, dots)]
        low, high = min(values), max(values)
        margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
        self.values = low - margin, high + margin
        self.full = self.place(1.0, level)

    def place(self, cost: float, value: float) -> Place:
        (first, last), (low, high) = self.costs, self.values
        x = LEFT + (cost - first) / (last - first) * (RIGHT - LEFT)
        y = BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)
        return round(x, 1), round(y, 1)

    def path(self, dots: Sequence[Dot]) -> str:
        places = (self.place(dot.cost, _height(dot)) for dot in dots)
        return "M" + "L".join(f"{x:g} {y:g}" for x, y in places)

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        return [(self.place(at, 0.0)[0], f"{at:.0%}") for at, _ in ticks(*self.costs, 9)]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        return [(self.place(0.0, at)[1], said) for at, said in ticks(*self.values, 6)]


def ticks(low: float, high: float, wanted: int) -> list[tuple[float, str]]:
    """Round numbers between two, about so many, as they are written."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    factor = next(n for n in (1, 2, 2.5, 5, 10) if n * power >= rough * (1 - 1e-9))
    step = factor * power
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + (factor == 2.5))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(n * step, f"{n * step:.{digits}f}") for n in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class Line:
    """A policy: its curve, and its place in the key."""

    name: str
    style: str
    path: str
    key: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Mark:
    """A point, and where its name stands beside it."""

    name: str
    x: float
    y: float
    shift: int
    drop: int
    anchor: str


def _render(
    curves: Sequence[Curve], points: Sequence[OperatingPoint], chosen: OperatingPoint
) -> str:
    by_cost = sorted(points, key=lambda point: point.cost)
    plot = Plot([*points, *(dot for curve in curves for dot in curve.outcomes)], chosen)
    lines = _lines(curves, plot)
    better = "down" if chosen.score is None else "up"
    return (
        pages()
        .get_template("picture.svg")
        .render(
            plot=plot,
            height=max((line.key[1] for line in lines), default=_KEYS) + 16,
            stamp=stamp(points),
            subtitle=f"{chosen.rows:,} rows (role {chosen.role}); cheaper is to the left, better "
            f"is {better}. Dashed: everyone leaves at one layer.",
            description=". ".join([_described(point) for point in points]) + ".",
            lines=lines,
            marks=[_mark(point, plot, above=n % 2 == 1) for n, point in enumerate(by_cost)],
        )
    )


def _lines(curves: Sequence[Curve], plot: Plot) -> list[Line]:
    """Curves with their keys in rows below the axis, and a colour each."""
    lines: list[Line] = []
    x, y, colours = LEFT, _KEYS, 0
    for curve in curves:
        name = curve.name + (" (baseline)" if curve.baseline else "")
        wide = 48 + _LETTER * len(name)
        if x > LEFT and x + wide > RIGHT:
            x, y = LEFT, y + _LINE
        style = "base" if curve.baseline else f"s{colours % _COLOURS}"
        colours += not curve.baseline
        lines.append(Line(name, style, plot.path(curve.outcomes), (x, y)))
        x += wide
    return lines


def _mark(point: OperatingPoint, plot: Plot, above: bool) -> Mark:
    """A name stands below to the right, or above to the left, where a rising curve leaves room."""
    x, y = plot.place(point.cost, _height(point))
    to_left = x > (LEFT + RIGHT) / 2 or (above and x > LEFT + _LETTER * len(point.name) + 9)
    shift, anchor = (-9, "end") if to_left else (9, "start")
    return Mark(point.name, x, y, shift, -10 if above else 20, anchor)


def _described(point: OperatingPoint) -> str:
    said = f"Point {point.name}: {policy_text(point.policy)}, cost {point.cost:.1%} of full depth"
    if point.score is not None and point.full_score is not None:
        said += f", {point.metric} {point.score:.4f} where full depth has {point.full_score:.4f}"
    return f"{said}, disagreement {point.disagreement:.4f}"
