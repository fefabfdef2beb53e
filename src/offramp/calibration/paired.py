"""How surely gains and losses of one cancel out but for a limit: an exact test of counts."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, betaincinv, gammaln, xlog1py, xlogy

Floats = npt.NDArray[np.float64]
_OUTSIDE = 1e-4
"""Part of alpha that is kept for shares of gains that are not looked at."""
_SHARES = 129
"""Of gains, to look at; the chance waves up and down between them."""
_FAR = 7.0
"""Standard deviations beyond which counts of gains do not occur."""
_STEPS, _ZOOMS = 16, 6
"""Limits that a bound is looked for among, and how often anew between two of them."""


def paired(losses: Floats, limit: float, alpha: float = 0.05) -> Floats:
    """Chance of counts that speak so much against a mean of `limit` or more, if it were so.

    The most over all shares of gains that the rows leave open (Berger and Boos, "P values maximized
    over a confidence set for the nuisance parameter", 1994). What speaks more is told by the score
    of the difference of two paired shares (Tango, "Equivalence test and confidence interval for
    the difference in proportions for the paired-sample design", 1998). The order of rows plays no
    part.

    Args:
        losses: of -1, 0 and 1, (rows,) or (rows, candidates).
        alpha: the level that matters most; p-values hold at every level.
    """
    losses = np.asarray(losses)
    worse, better = (losses > 0).sum(axis=0), (losses < 0).sum(axis=0)
    outside = _OUTSIDE * min(alpha, 0.1)
    pairs = zip(worse.ravel().tolist(), better.ravel().tolist(), strict=True)
    found = [_chance(*pair, len(losses), limit, outside) for pair in pairs]
    return np.array(found).reshape(worse.shape)


def paired_bound(losses: Floats, alpha: float) -> Floats:
    """The mean is above this with a chance of at most `alpha`; see `paired`."""
    losses = np.asarray(losses)
    columns = losses.reshape(len(losses), -1).T
    return np.array([_turn(column, alpha) for column in columns]).reshape(losses.shape[1:])


def _turn(losses: Floats, alpha: float) -> float:
    """The highest limit that the test leaves open; of counts, lower ones may be closed."""
    low, high = max(0.0, float(losses.mean())), 1.0
    for _ in range(_ZOOMS):
        limits = np.linspace(low, high, _STEPS + 1)
        still = (step for step in range(_STEPS - 1, 0, -1) if paired(losses, limits[step]) > alpha)
        last = next(still, 0)
        low, high = float(limits[last]), float(limits[last + 1])
    return high


@lru_cache(maxsize=1 << 17)
def _chance(worse: int, better: int, rows: int, limit: float, outside: float) -> float:
    """Of counts that speak as much, the most over the shares of gains."""
    if worse - better >= limit * rows:
        return 1.0
    low, high = _open(better, rows, limit, outside)
    shares = low + (high - low) * (1 - np.cos(np.linspace(0, np.pi, _SHARES))) / 2
    least, most = rows * low, rows * high
    first = max(0, int(least - _FAR * np.sqrt(least)) - 20)
    gains = np.arange(first, min(rows, int(most + _FAR * np.sqrt(most)) + 20) + 1)
    losses = _as_telling(gains, float(_score(worse, better, rows, limit)), rows, limit)
    found = 0.0
    for _ in range(2):  # and once more around the worst
        chances = _of_region(gains, losses, rows, limit, shares)
        worst = int(chances.argmax())
        found = max(found, float(chances[worst]))
        shares = np.linspace(
            shares[max(worst - 1, 0)], shares[min(worst + 1, _SHARES - 1)], _SHARES
        )
    return min(1.0, found + outside)


def _of_region(
    gains: npt.NDArray[np.int_], losses: Floats, rows: int, limit: float, shares: Floats
) -> Floats:
    """Chance of so many gains with no more than these losses, (shares,), at a mean of `limit`."""
    shares = shares[:, None]
    choose = gammaln(rows + 1) - gammaln(gains + 1) - gammaln(rows - gains + 1)
    of_gains = np.exp(choose + xlogy(gains, shares) + xlog1py(rows - gains, -shares))
    # of the rows that do not gain, so many lose
    of_losses = bdtr(losses.clip(0), rows - gains, ((shares + limit) / (1 - shares)).clip(max=1))
    return np.asarray(np.where(losses >= 0, of_gains * of_losses, 0.0).sum(axis=1))


def _open(better: int, rows: int, limit: float, outside: float) -> tuple[float, float]:
    """Shares of gains that these counts leave open (Clopper and Pearson)."""
    low = betaincinv(better, rows - better + 1, outside / 2) if better else 0.0
    high = betaincinv(better + 1, rows - better, 1 - outside / 2) if better < rows else 1.0
    most = (1 - limit) / 2  # as many losses, and `limit` more
    return min(low, most), min(high, most)


def _as_telling(gains: npt.NDArray[np.int_], score: float, rows: int, limit: float) -> Floats:
    """The most losses beside these gains that speak as much as the score; -1 where none do.

    Fewer losses speak more, so that of all means from `limit` on, `limit` is the worst case.
    """
    low = np.full(len(gains), -1)
    high = np.minimum(rows - gains, gains + int(limit * rows) + 1) + 1
    while (high - low > 1).any():
        middle = (low + high) // 2
        telling = _score(middle.clip(0), gains, rows, limit) <= score
        low, high = np.where(telling, middle, low), np.where(telling, high, middle)
    return low.astype(np.float64)


def _score(
    worse: npt.ArrayLike, better: npt.ArrayLike, rows: int, limit: float
) -> npt.NDArray[np.float64]:
    """Standard deviations by which the mean is above `limit`, under the likeliest share of gains
    of those with a mean of `limit`."""
    worse, better = np.asarray(worse), np.asarray(better)
    half = (worse + better - limit * (2 * rows - worse + better)) / (4 * rows)
    share = half + np.sqrt(half**2 + better * limit * (1 - limit) / (2 * rows))
    spread = rows * (2 * share + limit * (1 - limit))
    return np.asarray((worse - better - limit * rows) / np.sqrt(spread))
