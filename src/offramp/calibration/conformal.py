"""Sets of classes that hold the right one as often as asked (split conformal prediction).

The score of a class is 1 minus its probability at the exit that answered. Limits come from
labelled rows that nothing else was chosen on; exits differ in how sure they are, so each has a
limit of its own where enough rows leave there (JEI-DNN, arXiv 2310.09163, section 5.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.special import softmax

from offramp.calibration.target import parse_share
from offramp.errors import ConfigError
from offramp.policies import Policy
from offramp.storage import Strict
from offramp.table import ExitTable, replay

Floats = npt.NDArray[np.float64]
ENOUGH = 20
"""An exit at which more of the other rows than this leave has a limit of its own."""


class Sets(Strict):
    """What makes a set of classes of an answer, stored with an operating point.

    Attributes:
        share: of new rows whose set holds the right class, or more.
        limits: by exit layer, on 1 minus a class's probability; 1 lets every class in.
        rows: that they come from; nothing else was chosen on these.
        size: mean number of classes in a set there.
    """

    share: float = Field(gt=0, lt=1)
    limits: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    rows: int = Field(ge=1)
    size: float = Field(ge=0)

    @classmethod
    def fit(cls, table: ExitTable, policy: Policy, share: float, others: ExitTable) -> Self:
        """Limits from labelled rows of one class each, with finite scores.

        Args:
            others: rows that say which exits many leave at, see `conformal_limits`.
        """
        done, labels = replay(table, policy), np.asarray(table.labels)
        many = busy_exits(replay(others, policy).exit_layers, table.depth)
        found = conformal_limits(done.answers, labels, done.exit_layers, many, 1 - share)
        sets = conformal_sets(done.answers, done.exit_layers, found)
        return cls(
            share=share,
            limits=tuple(np.minimum(found, 1.0).tolist()),
            rows=table.rows,
            size=float(sets.sum(axis=1).mean()),
        )

    def of(self, answers: npt.ArrayLike, exit_layers: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Which classes each row may have, (rows, classes), see `conformal_sets`."""
        return conformal_sets(answers, exit_layers, self.limits)


@dataclass(frozen=True, slots=True)
class Covered:
    """What sets did on labelled rows.

    Attributes:
        asked: the least share of rows whose set holds the right class.
        covered: that share here.
        size: mean number of classes in a set.
    """

    asked: float
    covered: float
    size: float

    @classmethod
    def measure(cls, sets: Sets, table: ExitTable, policy: Policy) -> Self:
        """On the rows of a table with labels and finite scores."""
        done = replay(table, policy)
        inside = sets.of(done.answers, done.exit_layers)
        right = inside[np.arange(table.rows), np.asarray(table.labels)]
        return cls(sets.share, float(right.mean()), float(inside.sum(axis=1).mean()))


def parse_coverage(text: float | str) -> float:
    """'90%' and 0.9 are 0.9. Raises ConfigError unless it is between 0 and 1."""
    share = parse_share(text)
    if not 0 < share < 1:
        raise ConfigError(f"Sets cannot hold the right class for {text} of rows. Write 90% or 0.9.")
    return share


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
    own: npt.ArrayLike,
    alpha: float = 0.1,
) -> Floats:
    """A limit per exit layer, (depth,); those without one of their own share one.

    Each exit with a limit of its own misses at most a share alpha of new rows, and so do those
    that share one together. That of all rows would not do for them: rows that leave early are
    easy, and would vouch for the hard ones.

    Args:
        answers: raw scores of the exit that answered, (rows, classes), as `replay` gives them.
        labels: (rows,).
        exit_layers: (rows,), 1-based.
        own: which exits have a limit of their own, (depth,) bool. It must not hang on these rows:
            an exit that just so happens to have enough of them would be no exit like any other.
        alpha: share of rows whose set may miss the right class.
    """
    rows = np.arange(len(np.asarray(labels)))
    scores = _scores(answers)[rows, np.asarray(labels)]
    where = np.asarray(exit_layers)
    alone = np.asarray(own, dtype=bool)
    limits = np.full(len(alone), conformal_limit(scores[~alone[where - 1]], alpha))
    for place in np.flatnonzero(alone):
        limits[place] = conformal_limit(scores[where == place + 1], alpha)
    return limits


def busy_exits(exit_layers: npt.ArrayLike, depth: int) -> npt.NDArray[np.bool_]:
    """Exits at which more than 20 of some rows leave, (depth,)."""
    found: npt.NDArray[np.bool_] = (
        np.bincount(np.asarray(exit_layers), minlength=depth + 1)[1:] > ENOUGH
    )
    return found


def conformal_sets(
    answers: npt.ArrayLike, exit_layers: npt.ArrayLike, limits: npt.ArrayLike
) -> npt.NDArray[np.bool_]:
    """Which classes each row may have, (rows, classes); all where a score is no number."""
    allowed = np.asarray(limits)[np.asarray(exit_layers) - 1]
    return ~(_scores(answers) > allowed[:, None])


def _scores(answers: npt.ArrayLike) -> Any:
    return 1 - softmax(np.asarray(answers, dtype=np.float64), axis=-1)
