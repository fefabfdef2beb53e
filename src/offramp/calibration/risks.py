"""What a row loses by leaving early: a number of known range, whose mean a certificate bounds.

Sources: the gaps and consistencies of "Fast yet Safe: Early-Exiting with Risk Control"
(arXiv 2405.20915), section 3. A new one is a function with `@risk(...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit, softmax

from offramp.errors import ConfigError, TableError
from offramp.metrics import MULTI, SINGLE, predictions
from offramp.registry import Registry
from offramp.table import ExitTable

Floats = npt.NDArray[np.float64]
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Answered:
    """Rows that left early, and what full depth would have said.

    Attributes:
        early, full: raw scores of the exit that answered and of the last, (rows, classes).
        labels: (rows,), or (rows, classes) for label sets; None without labels.
    """

    early: npt.NDArray[np.float32]
    full: npt.NDArray[np.float32]
    labels: npt.NDArray[np.generic] | None
    problem_type: str


@dataclass(frozen=True, slots=True)
class Risk:
    """One way to lose.

    Attributes:
        losses: of answered rows, (rows,) float64, from `lowest` to 1; below 0 is a gain.
        words: 'accuracy lost against full depth', what the mean is.
        lowest: -1 where leaving early may gain, else 0.
        labelled: whether it needs labels.
        whole: whether losses are whole numbers, 0 and 1 or -1, 0 and 1.
    """

    name: str
    words: str
    losses: Callable[[Answered], Floats]
    problem_types: tuple[str, ...]
    lowest: float
    labelled: bool
    whole: bool

    def of(self, rows: Answered) -> Floats:
        """The losses.

        Raises:
            ConfigError: the task does not fit, or losses are not what this risk says of them.
            TableError: labels are missing.
        """
        self.check(rows.problem_type, rows.labels is not None)
        losses = np.asarray(self.losses(rows), dtype=np.float64)
        self._check_losses(losses, len(rows.early))
        return losses.clip(self.lowest, 1)

    def _check_losses(self, losses: Floats, rows: int) -> None:
        """A proof holds for losses of the range that it assumes, and for no others."""
        inside = (losses >= self.lowest - _ROUNDING) & (losses <= 1 + _ROUNDING)  # NaN is not
        if losses.shape != (rows,) or not inside.all():
            raise ConfigError(
                f"Risk '{self.name}' must give each row one number from {self.lowest:g} to 1."
            )
        if self.whole and (losses != np.round(losses)).any():
            raise ConfigError(f"Risk '{self.name}' gives fractions, but says `whole=True`.")

    def check(self, problem_type: str, labelled: bool) -> None:
        """Refuse a risk that the task or the lack of labels rules out."""
        if problem_type not in self.problem_types:
            fitting = [name for name in RISKS if problem_type in RISKS[name].problem_types]
            use = (
                f"Use: {', '.join(fitting)}."
                if fitting
                else "Nothing known measures that task: register a risk of your own, or choose by "
                "--max-drop without --confidence."
            )
            raise ConfigError(f"Risk '{self.name}' is not for {problem_type}. {use}")
        if self.labelled and not labelled:
            free = [name for name in RISKS if not RISKS[name].labelled]
            raise TableError(
                f"Risk '{self.name}' needs labels, but the table has none. Without labels: "
                f"{', '.join(free)}."
            )


def losses_of(risk: Risk, table: ExitTable, answers: npt.ArrayLike) -> Floats:
    """What the rows of a table lose by these answers, (rows, classes) -> (rows,)."""
    labels = None if table.labels is None else np.asarray(table.labels)
    early, full = np.asarray(answers), np.asarray(table.scores[:, -1])
    return risk.of(Answered(early, full, labels, table.problem_type))


RISKS: Registry[Risk] = Registry("risk")


def risk(
    name: str,
    words: str,
    problem_types: tuple[str, ...],
    *,
    lowest: float = 0.0,
    labelled: bool = False,
    whole: bool = False,
) -> Callable[[Callable[[Answered], Floats]], Callable[[Answered], Floats]]:
    """Register a function of answered rows as a risk, see `Risk`.

    Raises ConfigError for losses that may be below -1: divide them first.
    """
    if not -1 <= lowest <= 0:
        raise ConfigError(
            f"Risk '{name}': losses down to {lowest:g} are not from -1 to 1. Divide them first."
        )

    def add(losses: Callable[[Answered], Floats]) -> Callable[[Answered], Floats]:
        RISKS.register(name, Risk(name, words, losses, problem_types, lowest, labelled, whole))
        return losses

    return add


@risk("drop", "accuracy lost against full depth", (SINGLE,), lowest=-1, labelled=True, whole=True)
def drop(rows: Answered) -> Floats:
    """Wrong early minus wrong at full depth: -1, 0 or 1."""
    return _wrong(rows.early, rows) - _wrong(rows.full, rows)


@risk("disagreement", "answers other than those of full depth", (SINGLE, MULTI), whole=True)
def disagreement(rows: Answered) -> Floats:
    """1 where the class, or any label of a set, is not that of full depth."""
    kind = rows.problem_type
    other = predictions(rows.early, kind) != predictions(rows.full, kind)
    return (other.any(axis=1) if other.ndim == 2 else other).astype(np.float64)


@risk(
    "brier",
    "half the Brier score lost against full depth",
    (SINGLE, MULTI),
    lowest=-1,
    labelled=True,
)
def brier(rows: Answered) -> Floats:
    """Half the squared distance of probabilities from the truth; early minus full depth."""
    return _squared(rows.early, rows) - _squared(rows.full, rows)


@risk("brier_distance", "Brier distance from the probabilities of full depth", (SINGLE, MULTI))
def brier_distance(rows: Answered) -> Floats:
    """Half the squared distance of two distributions; of label sets the mean over labels."""
    early, full = _distribution(rows.early, rows), _distribution(rows.full, rows)
    distance = ((early - full) ** 2).sum(axis=-1) / 2
    return distance.mean(axis=1) if distance.ndim == 2 else distance


@risk("hellinger", "Hellinger distance from the probabilities of full depth", (SINGLE, MULTI))
def hellinger(rows: Answered) -> Floats:
    """Of two distributions; of label sets the mean over labels."""
    early, full = _distribution(rows.early, rows), _distribution(rows.full, rows)
    squared = ((np.sqrt(early) - np.sqrt(full)) ** 2).sum(axis=-1) / 2
    distance = np.sqrt(squared.clip(0, 1))
    return distance.mean(axis=1) if distance.ndim == 2 else distance


def _wrong(scores: npt.NDArray[np.float32], rows: Answered) -> Floats:
    return (predictions(scores, rows.problem_type) != rows.labels).astype(np.float64)


def _squared(scores: npt.NDArray[np.float32], rows: Answered) -> Floats:
    labels = np.asarray(rows.labels)
    if rows.problem_type == MULTI:
        return ((expit(scores.astype(np.float64)) - labels) ** 2).mean(axis=1)
    truth = np.eye(scores.shape[1])[labels.astype(np.int64)]
    return ((_distribution(scores, rows) - truth) ** 2).sum(axis=1) / 2


def _distribution(scores: npt.NDArray[np.float32], rows: Answered) -> Floats:
    """(rows, classes), or (rows, labels, 2) of label sets."""
    precise = scores.astype(np.float64)
    if rows.problem_type == MULTI:
        yes = expit(precise)
        return np.stack((1 - yes, yes), axis=-1)
    return softmax(precise, axis=-1)
