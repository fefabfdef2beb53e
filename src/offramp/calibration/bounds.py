"""How surely a mean loss is below a limit, from n rows: p-values and upper bounds.

Losses are at most 1. Every function takes them as (rows,) or (rows, candidates) and answers for
each candidate. `binomial` is exact for losses of 0 and 1; `paired`, in a file of its own, for
those of -1, 0 and 1. `betting` holds for any losses, uses those below 0, and depends on the order
of rows, which must be random.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, betaincinv

Floats = npt.NDArray[np.float64]
_HALVINGS = 40


def binomial(losses: Floats, limit: float, alpha: float = 0.05) -> Floats:
    """Chance of so few losses of 1, or fewer, if their mean were `limit`; `alpha` plays no part."""
    counts = np.asarray(losses).sum(axis=0)
    return np.asarray(bdtr(counts, len(losses), limit))


def binomial_bound(losses: Floats, alpha: float) -> Floats:
    """The mean is above this with a chance of at most `alpha` (Clopper and Pearson)."""
    counts, rows = np.asarray(losses).sum(axis=0), len(losses)
    others = np.maximum(rows - counts, 1)
    return np.where(counts < rows, betaincinv(counts + 1, others, 1 - alpha), 1)


def betting(losses: Floats, limit: float, alpha: float = 0.05) -> Floats:
    """One over the most that bets against 'the mean is `limit` or more' have ever won.

    Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting"
    (arXiv 2010.09686), section 4.3, with losses up to 1 and of any size below. By Ville's
    inequality the chance of p <= alpha is at most alpha where the mean is `limit` or more.

    Args:
        losses: in random order.
        alpha: the level that stakes are best for; p-values hold at every level.
    """
    logs = _fortune(np.asarray(losses, dtype=np.float64), limit, _stakes(losses, alpha))
    return np.exp(-np.maximum(logs.max(axis=0), 0.0))


def betting_bound(losses: Floats, alpha: float) -> Floats:
    """The mean is above this with a chance of at most `alpha`; see `betting`."""
    losses = np.asarray(losses, dtype=np.float64)
    stakes, needed = _stakes(losses, alpha), np.log(1 / alpha)
    low, high = np.zeros(losses.shape[1:]), np.ones(losses.shape[1:])
    for _ in range(_HALVINGS):  # what is won grows with the mean that is bet against
        middle = (low + high) / 2
        rejected = _fortune(losses, middle, stakes).max(axis=0) >= needed
        low, high = np.where(rejected, low, middle), np.where(rejected, middle, high)
    return high


def _stakes(losses: npt.ArrayLike, alpha: float) -> Floats:
    """Share of the fortune to bet on each row, from the rows before it alone."""
    losses = np.asarray(losses, dtype=np.float64)
    seen = np.arange(1, len(losses) + 1).reshape(-1, *[1] * (losses.ndim - 1))
    mean = (0.5 + losses.cumsum(axis=0)) / (seen + 1)
    spread = (0.25 + ((losses - mean) ** 2).cumsum(axis=0)) / (seen + 1)
    before = np.concatenate((np.full_like(spread[:1], 0.25), spread[:-1]))
    return np.minimum(1.0, np.sqrt(2 * np.log(1 / alpha) / (len(losses) * before)))


def _fortune(losses: Floats, limit: float | Floats, stakes: Floats) -> Floats:
    """Log of what one has after each row, having begun with 1."""
    # a bet of everything on a loss of 1 against a mean of 0 loses everything
    return np.log(np.maximum(1 - stakes * (losses - limit), 1e-300)).cumsum(axis=0)
