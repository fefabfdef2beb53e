"""Sets of classes that hold the right one as often as asked (split conformal prediction).

The score of a class is 1 minus its probability at the exit that answered. Limits come from
labelled rows that nothing else was chosen on; exits differ in how sure they are, so each has a
limit of its own where enough rows leave there (JEI-DNN, arXiv 2310.09163, section 5.3).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from offramp.errors import ConfigError

Floats = npt.NDArray[np.float64]
ENOUGH = 20
"""An exit that more rows than this leave at has a limit of its own."""


def conformal_limit(scores: npt.ArrayLike, alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest of n scores; infinity where there is none.

    A new row of the same kind is at or below it with probability of at least 1 - alpha. Raises
    ConfigError unless alpha is between 0 and 1.
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha is {alpha}. Give the share of rows that may be missed: 0 to 1.")
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    # a product such as 100 * (1 - 0.1) may come out just above a whole number
    place = math.ceil(round((len(ordered) + 1) * (1 - alpha), 9))
    return float(ordered[place - 1]) if place <= len(ordered) else math.inf


def conformal_limits(
    answers: npt.ArrayLike,
    labels: npt.ArrayLike,
    exit_layers: npt.ArrayLike,
    depth: int,
    alpha: float = 0.1,
) -> Floats:
    """A limit per exit layer, (depth,); that of all rows where at most 20 leave.

    Each exit with a limit of its own misses at most a share alpha of new rows; exits with that
    of all rows promise nothing by themselves, so the fewer rows leave there, the better.

    Args:
        answers: raw scores of the exit that answered, (rows, classes), as `replay` gives them.
        labels: (rows,).
        exit_layers: (rows,), 1-based.
        depth: number of layers.
        alpha: share of rows whose set may miss the right class.
    """
    rows = np.arange(len(np.asarray(labels)))
    scores = _scores(answers)[rows, np.asarray(labels)]
    where = np.asarray(exit_layers)
    limits = np.full(depth, conformal_limit(scores, alpha))
    for layer in range(1, depth + 1):
        here = scores[where == layer]
        if len(here) > ENOUGH:
            limits[layer - 1] = conformal_limit(here, alpha)
    return limits


def conformal_sets(
    answers: npt.ArrayLike, exit_layers: npt.ArrayLike, limits: npt.ArrayLike
) -> npt.NDArray[np.bool_]:
    """Which classes each row may have, (rows, classes); all where a score is no number."""
    allowed = np.asarray(limits)[np.asarray(exit_layers) - 1]
    return ~(_scores(answers) > allowed[:, None])


def _scores(answers: npt.ArrayLike) -> Any:
    return 1 - softmax(np.asarray(answers, dtype=np.float64), axis=-1)
