"""Numbers that some policies take from a table: how often an exit is right, and how sure.

What an exit should have said is the label, or the answer at full depth where there are none.
Numbers fitted on the rows that a point is then chosen on flatter that point a little more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits.base import ExitOutput
from offramp.metrics import MULTI, REGRESSION, predictions
from offramp.policies import Binned, MaxProbability, Policy, Tempered
from offramp.policies.confidence import questions
from offramp.table import ExitTable, require_role
from offramp.table.store import Array

BINS = 20
_SHARPEST = 100.0  # of 1 / temperature, where all rows are right


def fit_bins(table: ExitTable, bins: int = BINS) -> Binned:
    """`binned` with the accuracy of each exit by its confidence, in bins of equally many rows.

    Args:
        table: role `tune` or `calibrate`; rows with NaN or infinite scores do not count.
        bins: at most, for each exit; equal confidences share one.

    Raises:
        ConfigError: the table is of a regression task.
        TableError: the role forbids it.
    """
    multi_label = _check(table, Binned)
    confidence, right = _confidence(table, multi_label)
    edges, accuracy = [], []
    for layer in _early(table):
        inner = np.quantile(confidence[:, layer], np.linspace(0, 1, bins + 1)[1:-1])
        cuts = np.unique(inner.astype(np.float32))
        place = np.searchsorted(cuts, confidence[:, layer])
        rows = np.bincount(place, minlength=len(cuts) + 1)
        hits = np.bincount(place, weights=right[:, layer], minlength=len(cuts) + 1)
        edges.append(tuple(cuts.tolist()))
        accuracy.append(tuple((hits / rows.clip(1)).tolist()))
    return Binned(edges=tuple(edges), accuracy=tuple(accuracy), multi_label=multi_label)


def fit_temperatures(table: ExitTable) -> Tempered:
    """`tempered` with the temperature of each exit that makes the truth most likely.

    Args:
        table: role `tune` or `calibrate`; its rows with NaN or infinite scores do not count.

    Raises:
        ConfigError: the table is of a regression task.
        TableError: the role forbids it.
    """
    multi_label = _check(table, Tempered)
    scores, truth = _rows(table)
    logits = [
        questions(torch.from_numpy(scores[:, n]).double(), multi_label) for n in _early(table)
    ]
    temperatures = [temperature_of(asked, torch.from_numpy(truth)) for asked in logits]
    return Tempered(temperatures=tuple(temperatures), multi_label=multi_label)


def temperature_of(logits: Tensor, truth: Tensor) -> float:
    """The temperature of least cross-entropy, by bisection.

    Cross-entropy is convex in b = 1 / temperature, with slope E[logit] - true logit.
    """
    true = logits.gather(-1, truth.unsqueeze(-1)).squeeze(-1)
    low, high = 1 / _SHARPEST, _SHARPEST
    for _ in range(30):
        middle = (low * high) ** 0.5
        expected = (torch.softmax(middle * logits, dim=-1) * logits).sum(dim=-1)
        if (expected - true).mean() > 0:
            high = middle
        else:
            low = middle
    return float(np.float32((low * high) ** -0.5))


FITS: dict[str, Callable[[ExitTable], Policy]] = {
    Binned.name: fit_bins,
    Tempered.name: fit_temperatures,
}
"""Where a search by name starts from numbers of the table itself."""


def _confidence(table: ExitTable, multi_label: bool) -> tuple[Array, Array]:
    """How sure each exit is of its answer, and whether that is right; (rows, depth) each."""
    scores, truth = _rows(table)
    right = predictions(scores, table.problem_type) == truth[:, None]
    rule = MaxProbability(multi_label=multi_label)
    outputs = [ExitOutput(torch.from_numpy(scores[:, layer])) for layer in range(table.depth)]
    sure = [rule.evidence({}, 1, output)[0].numpy() for output in outputs]
    return np.stack(sure, axis=1), right.all(axis=-1) if multi_label else right


def _rows(table: ExitTable) -> tuple[Array, Array]:
    """Finite scores (rows, depth, classes), and the answers wanted as int64."""
    fine = np.isfinite(table.scores).all(axis=(1, 2))
    scores = np.ascontiguousarray(table.scores[fine])
    if table.labels is not None:
        return scores, table.labels[fine].astype(np.int64)
    return scores, predictions(scores[:, -1], table.problem_type).astype(np.int64)


def _early(table: ExitTable) -> range:
    """Places of the exits before the last, one at least."""
    return range(max(1, table.depth - 1))


def _check(table: ExitTable, kind: type[Policy]) -> bool:
    """Whether the task is multi-label. Raises if the policy or the role forbids a fit."""
    require_role(table, ("tune", "calibrate"), f"fit policy '{kind.name}'")
    if table.problem_type == REGRESSION:
        raise ConfigError(f"Policy '{kind.name}' is not for regression. {kind.why_not}")
    return table.problem_type == MULTI
