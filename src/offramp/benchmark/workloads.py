"""Which rows run together, and where they leave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, PrivateAttr, SerializeAsAny
from torch import Tensor

from offramp.engines import plan_batches, windows
from offramp.engines.batching import MAX_TOKENS, WINDOW
from offramp.exits import ExitOutput
from offramp.model import MultiExitModel
from offramp.policies import EvidencePolicy, Fixed, MaxProbability, Patience, Rows, State

LATENCY_ROWS = 32
_GOLDEN = 0.6180339887
"""Multiples of it, without their whole part, lie evenly however many there are."""
_TABLE = "forced.table"
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


def numbered(lengths: npt.NDArray[np.int64], batches: Sequence[Places]) -> list[Rows]:
    """The rows of batches, numbered from 0 on, short batches and their short rows first.

    Forced rows leave by their numbers, evenly among neighbours: depth and length then have little
    to do with each other. A few rows that are short and deep by chance cost more than their work.
    """
    of_batch = [lengths[list(places)] for places in batches]
    first, found = 0, {}
    for number in sorted(range(len(of_batch)), key=lambda number: of_batch[number].mean()):
        here = of_batch[number]
        ids = first + np.argsort(np.argsort(here, kind="stable"), kind="stable")
        found[number] = Rows(torch.from_numpy(ids), torch.from_numpy(here))
        first += len(here)
    return [found[number] for number in range(len(of_batch))]


class Forced(EvidencePolicy):
    """Runs another policy in full and overrides only its decision to leave.

    The exit layers of rows are uniform over the widest range of layers whose mean is `middle`. That
    is the bar, so one graph serves all depths. A row's layer depends on its id alone, and any few
    neighbours have about the same mean.

    Args:
        middle: the mean exit layer.
        depth: of the model.
        rows: ids are 0 to rows - 1.
        inner: the policy that does the work; its evidence is finite.
    """

    name = "forced"
    middle: float = Field(ge=1)
    depth: int = Field(ge=1)
    rows: int = Field(ge=1)
    inner: SerializeAsAny[EvidencePolicy]
    _table: Tensor = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        self._table = _highest_means(self.rows, self.depth)

    @property
    def bar(self) -> float:
        return self.middle

    def with_bar(self, bar: float) -> Forced:
        return self._with(middle=max(1.0, bar))

    def start(self, rows: Rows) -> State:
        table = self._table.to(rows.ids.device).index_select(0, rows.ids)
        return {**self.inner.start(rows), _TABLE: table}

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        own, table = dict(state), state[_TABLE]
        del own[_TABLE]  # a policy may ask whether it has a state
        found, own = self.inner.evidence(own, layer, output)
        # added times nothing, lest an optimiser finds the policy's work to be of no use
        evidence = table.select(1, layer - 1).add(found, alpha=0.0)
        return evidence, {**own, _TABLE: table}


def _highest_means(rows: int, depth: int) -> Tensor:
    """Up to which mean a row leaves after layer 1, 2, ..., (rows, depth).

    With x uniform in (0, 2 mean - 1) where the mean is in the first half, else in
    (2 mean - 1 - depth, depth), rows leave after the first layer above their x.
    """
    places = (np.arange(1, rows + 1) * _GOLDEN % 1.0).clip(1e-4, 1 - 1e-4)[:, None]
    layers = np.arange(1, depth + 1)
    early = (layers / places + 1) / 2
    late = depth + 0.5 - (depth - layers) / (2 * (1 - places))
    return torch.from_numpy(np.where(layers <= depth * places, early, late)).float()


def forced_policies(model: MultiExitModel, shares: Sequence[float], rows: int) -> list[Forced]:
    """For mean exit depths as shares of all layers, each in (0, 1]."""
    depth, inner = model.depth, _working(model)
    middles = [max(1.0, share * depth) for share in shares]
    return [Forced(middle=middle, depth=depth, rows=rows, inner=inner) for middle in middles]


def _working(model: MultiExitModel) -> EvidencePolicy:
    """A policy of usual cost, where there is one for the task."""
    if model.problem_type == "single_label_classification":
        return MaxProbability(threshold=1.0)
    if model.problem_type == "multi_label_classification":
        return Patience(multi_label=True)
    return Fixed(layer=1)
