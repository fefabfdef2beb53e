"""Which rows run together, and where they leave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.engines import plan_batches, windows
from offramp.engines.batching import MAX_TOKENS, WINDOW
from offramp.model import MultiExitModel
from offramp.policies import MaxProbability, Patience, Policy
from offramp.testing import Scripted

LATENCY_ROWS = 32
STREAM, STREAM_BATCH = "stream", 32
Places = Sequence[int]


@dataclass(frozen=True)
class Work:
    """Batches of places in the rows.

    Attributes:
        plain: as runtimes without offramp get them.
        ours: as offramp gets them; but for the stream these are the same.
    """

    name: str
    batch_size: int | None
    plain: Sequence[Places]
    ours: Sequence[Places]

    @property
    def rows(self) -> int:
        return sum(map(len, self.plain))


def plan_work(lengths: npt.NDArray[np.int64], sizes: Iterable[int]) -> list[Work]:
    """Latency where 1 is among the sizes, the other batch sizes, and the stream.

    Batches of one size hold rows of neighbouring lengths, the same for everyone. In the stream,
    plain runtimes take rows as they arrive; ours reads ahead and sorts by length, as
    `predict_file` does.
    """
    works = []
    for size in sizes:
        batches = _spread(lengths) if size == 1 else _neighbours(lengths, size)
        works.append(Work(f"batch {size}", size, batches, batches))
    return [*works, _stream(lengths)]


def _spread(lengths: npt.NDArray[np.int64]) -> list[Places]:
    """Single rows of all lengths, short and long ones in turn."""
    order = np.argsort(lengths, kind="stable")
    chosen = np.linspace(0, len(order) - 1, min(LATENCY_ROWS, len(order))).round().astype(int)
    mixed = np.random.default_rng(0).permutation(order[chosen])
    return [[place] for place in mixed.tolist()]


def _neighbours(lengths: npt.NDArray[np.int64], size: int) -> list[Places]:
    order = np.argsort(lengths, kind="stable").tolist()
    # rows that fill no batch would be timed as a smaller one
    return [order[first : first + size] for first in range(0, len(order) - size + 1, size)]


def _stream(lengths: npt.NDArray[np.int64]) -> Work:
    places = range(len(lengths))
    plain = list(windows(places, STREAM_BATCH))
    ours: list[Places] = []
    for window in windows(places, STREAM_BATCH * WINDOW):
        taken = np.array(window)
        planned = plan_batches(lengths[taken], STREAM_BATCH, MAX_TOKENS)
        ours += [taken[batch].tolist() for batch in planned]
    return Work(STREAM, None, plain, ours)


def forced_policy(model: MultiExitModel, share: float, rows: int) -> Scripted:
    """Rows leave at layers all around `share` of the depth, which is their mean.

    Exits and a policy run at every layer, and only its decision is overridden: by the row's
    number, 0 to rows - 1.
    """
    depth = model.depth
    twice = min(max(2, round(2 * share * depth)), 2 * depth)
    first, last = max(1, twice - depth), min(depth, twice - 1)
    draw = np.random.default_rng(0)
    # each round has all of them once, so few rows have the same mean as many
    rounds = [draw.permutation(np.arange(first, last + 1)) for _ in range(rows)]
    layers = np.concatenate(rounds)[:rows]
    return Scripted(layers=tuple(layers.tolist()), inner=_working(model))


def _working(model: MultiExitModel) -> Policy:
    """A policy of usual cost."""
    if model.problem_type == "single_label_classification":
        return MaxProbability(threshold=1.0)
    found: Any = Patience.variants(model.problem_type, model.depth)
    return found[0] if found else Patience(tolerance=0.0)
