"""Probabilities that are true: a temperature for each exit, and how far off an exit is without.

Guo et al., "On calibration of modern neural networks", arXiv 1706.04599.
"""

from __future__ import annotations

from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from scipy.special import softmax

from offramp.calibration.fitting import temperature_of
from offramp.calibration.risks import Risk
from offramp.errors import ConfigError, TableError
from offramp.metrics import MULTI, REGRESSION, predictions
from offramp.policies import EvidencePolicy, Policy
from offramp.policies.confidence import questions
from offramp.storage import Strict
from offramp.table import ExitTable, answer_matrix

Floats = npt.NDArray[np.float64]
BINS = 15


class Temperatures(Strict):
    """By which the scores of an exit are divided before they become probabilities.

    Attributes:
        values: by exit layer.
        rows: labelled rows that they were fitted on.
    """

    values: tuple[Annotated[float, Field(gt=0)], ...]
    rows: int = Field(ge=1)

    @classmethod
    def fit(cls, table: ExitTable, policy: Policy) -> Self:
        """Those that make the labels most likely, of what a policy answers after each layer.

        Where all answers are right, the smaller the likelier: how sure they may be cannot be told,
        and the temperature is 1.

        Args:
            table: labelled, with finite scores.

        Raises:
            ConfigError: numbers have no probabilities.
            TableError: there are no labels.
        """
        check(table)
        answers = _answers(table, policy)
        labels = np.asarray(table.labels).astype(np.int64)
        truth, values = torch.from_numpy(labels), []
        for place in range(table.depth):
            said = answers[:, place]
            known = (predictions(said, table.problem_type) != labels).any()
            asked = _asked(said, table.problem_type)
            values.append(temperature_of(asked, truth) if known else 1.0)
        return cls(values=tuple(values), rows=table.rows)


def check(table: ExitTable, risk: Risk | None = None) -> None:
    """Refuse a table that no temperature can be fitted on, and a risk of other probabilities."""
    if risk is not None and not risk.whole:
        raise ConfigError(
            f"Risk '{risk.name}' is of the probabilities that the model itself gives, which "
            "temperatures change. Leave one of the two out."
        )
    if table.problem_type == REGRESSION:
        raise ConfigError("Temperatures are for probabilities, which regression has none of.")
    if table.labels is None:
        raise TableError("Temperatures need labels, but the table has none.")


def calibration_errors(
    table: ExitTable, policy: Policy, temperatures: Temperatures | None = None
) -> tuple[float, ...] | None:
    """How far each exit's probabilities are from how often it is right, see `ece`.

    Of what a policy answers after each layer, whoever leaves there; None for regression and
    without labels.
    """
    if table.problem_type == REGRESSION or table.labels is None:
        return None
    answers, labels = _answers(table, policy), np.asarray(table.labels)
    values = temperatures.values if temperatures is not None else (1.0,) * table.depth
    found = []
    for place, temperature in enumerate(values):
        asked = _asked(answers[:, place] / temperature, table.problem_type).numpy()
        right = predictions(answers[:, place], table.problem_type) == labels
        found.append(ece(softmax(asked, axis=-1).max(axis=-1), right))
    return tuple(found)


def ece(confidence: npt.ArrayLike, right: npt.ArrayLike) -> float:
    """Expected calibration error: mean gap of confidence and accuracy, in bins of equal mass.

    Answers of one confidence share their accuracy, so that the order of rows says nothing.

    Args:
        confidence, right: of answers, of any one shape.
    """
    sure, true = np.ravel(confidence).astype(np.float64), np.ravel(right).astype(np.float64)
    _, ranks, counts = np.unique(sure, return_inverse=True, return_counts=True)
    gaps = np.bincount(ranks, weights=sure - true) / counts
    parts = np.array_split(gaps[np.sort(ranks)], min(BINS, len(sure)))
    return float(sum(abs(part.sum()) for part in parts) / len(sure))


def _answers(table: ExitTable, policy: Policy) -> npt.NDArray[np.float32]:
    """(rows, depth, classes); a rule without a bar answers with the exit's own scores."""
    return answer_matrix(table, policy) if isinstance(policy, EvidencePolicy) else table.scores


def _asked(scores: npt.NDArray[np.float32], problem_type: str) -> torch.Tensor:
    """Logits of what a row is asked, of a label set each label."""
    return questions(torch.from_numpy(scores.astype(np.float64)), problem_type == MULTI)
