"""How many rows a promise hangs on: how many planted or mislabelled ones would have moved it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from offramp.calibration.certificate import Procedure, Test
from offramp.calibration.proving import prove

Floats = npt.NDArray[np.float64]
FEW = 20


class Influence(NamedTuple):
    """So many changed rows suffice, as the order of rows is.

    Of `faster`, no fewer do where losses are 0 and 1 and `binomial` tests one candidate after the
    other. Bets depend on which row comes when, and where all candidates are tested another may be
    nearer: there a cleverer choice of rows can do with fewer.

    Attributes:
        faster: that lose nothing, or gain, where they lost, until a faster policy would have been
            chosen; None where there is no faster one.
        withdrawn: that lose all where they lost nothing, until this one would not have been.
    """

    faster: int | None
    withdrawn: int | None


def influence(
    losses: Floats,
    place: int | None,
    limit: float,
    confidence: float,
    procedure: Procedure,
    test: Test,
    lowest: float = 0.0,
) -> Influence:
    """What it takes to move the choice of `prove` away from `place`.

    Args:
        losses, limit, confidence, procedure, test: as `prove` had them.
        place: what it chose.
        lowest: what a row can lose at the least.
    """

    def chosen(rows: npt.NDArray[np.intp], value: float) -> int:
        changed = losses.copy()
        changed[rows] = value
        found = prove(changed, limit, confidence, procedure, test).place
        return -1 if found is None else found

    now, most = -1 if place is None else place, losses.shape[1] - 1
    faster = withdrawn = None
    if now < most:
        worst = np.argsort(-losses[:, now + 1], kind="stable")
        faster = _fewest(len(losses), lambda rows: chosen(worst[:rows], lowest) > now)
    if now >= 0:
        best = np.argsort(losses[:, now], kind="stable")
        withdrawn = _fewest(len(losses), lambda rows: chosen(best[:rows], 1.0) < now)
    return Influence(faster, withdrawn)


def _fewest(rows: int, moves: Callable[[int], bool]) -> int | None:
    """So many rows move the choice and one less does not; None where all of them do not.

    Few rows are counted up to, since with bets one more row may help less; many are bisected.
    """
    first = next((count for count in range(1, min(rows, FEW) + 1) if moves(count)), None)
    if first is not None or not moves(rows):
        return first
    low, high = min(rows, FEW), rows
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if moves(middle) else (middle, high)
    return high
