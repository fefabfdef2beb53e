"""Score over cost: hulls of points, what lies under them, and where they stand at a cost.

Between two policies the curve is straight, since tossing a coin for every row which of the two
answers it attains every mixture of their costs and scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from offramp.comparison.board import AREA, AT, CHEAPEST, DEAREST, TARGETS

Floats = npt.NDArray[np.float64]
Place = tuple[float, float]
"""Cost and score."""


def columns(cost: npt.ArrayLike, score: npt.ArrayLike) -> dict[str, Floats]:
    """All of `COLUMNS`, each (..., points) -> (...)."""
    at = [score_at(cost, score, 1 / target) for target in TARGETS]
    return {AREA: area(cost, score), **dict(zip(AT, at, strict=True))}


def area(cost: npt.ArrayLike, score: npt.ArrayLike) -> Floats:
    """Mean score over costs from CHEAPEST to DEAREST, (..., points) -> (...).

    Points may come in any order; their costs must reach from CHEAPEST to DEAREST.
    """
    x, y = _by_cost(cost, score)
    left, right = x[..., :-1], x[..., 1:]
    start, end = left.clip(CHEAPEST, DEAREST), right.clip(CHEAPEST, DEAREST)
    middle = y[..., :-1] + _slopes(x, y) * ((start + end) / 2 - left)
    return ((end - start) * middle).sum(axis=-1) / (DEAREST - CHEAPEST)


def score_at(cost: npt.ArrayLike, score: npt.ArrayLike, at: float) -> Floats:
    """The curve at one cost, (..., points) -> (...); the costs must reach around it."""
    x, y = _by_cost(cost, score)
    place = ((x <= at).sum(axis=-1, keepdims=True) - 1).clip(0, x.shape[-1] - 2)
    left, value, slope = (
        np.take_along_axis(values, place, axis=-1)[..., 0] for values in (x, y, _slopes(x, y))
    )
    return value + slope * (at - left)


def hull(places: Sequence[Place]) -> list[int]:
    """Which places are corners of the upper convex hull, by cost."""
    corners: list[int] = []
    for new in sorted(range(len(places)), key=lambda one: places[one]):
        if corners and places[corners[-1]][0] == places[new][0]:
            corners.pop()
        while len(corners) > 1 and _height(*(places[one] for one in (*corners[-2:], new))) <= 0:
            corners.pop()
        corners.append(new)
    return corners


def thinned(places: Sequence[Place], corners: Sequence[int], most: int) -> list[int]:
    """At most so many corners of a hull, both ends among them; the area loses little.

    The corner that adds the smallest triangle goes first (Visvalingam and Whyatt, 1993).
    """
    kept = list(corners)
    while len(kept) > max(most, 2):
        triangles = [
            _height(*(places[one] for one in kept[inner - 1 : inner + 2]))
            for inner in range(1, len(kept) - 1)
        ]
        del kept[1 + int(np.argmin(triangles))]
    return kept


def _height(left: Place, middle: Place, right: Place) -> float:
    """Twice the triangle's area; above 0 where the middle lies above the line of the others."""
    rise, run = right[1] - left[1], right[0] - left[0]
    return (middle[1] - left[1]) * run - rise * (middle[0] - left[0])


def _by_cost(cost: npt.ArrayLike, score: npt.ArrayLike) -> tuple[Floats, Floats]:
    x = np.asarray(cost, dtype=np.float64)
    y = np.broadcast_to(np.asarray(score, dtype=np.float64), x.shape)
    order = np.argsort(x, axis=-1, kind="stable")
    return np.take_along_axis(x, order, axis=-1), np.take_along_axis(y, order, axis=-1)


def _slopes(x: Floats, y: Floats) -> Floats:
    """Of the segments between points; 0 where two points cost the same."""
    run = np.diff(x, axis=-1)
    return np.diff(y, axis=-1) / np.where(run > 0, run, np.inf)
