"""What an engine is: it makes the layers that are not needed cost nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from offramp.backbones import Backbone, Batch
from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.policies import Policy, Rows


class Exitable(Protocol):
    """What an engine runs: layers, and an exit after each; `MultiExitModel` is one."""

    @property
    def backbone(self) -> Backbone: ...

    @property
    def depth(self) -> int: ...

    def exit_at(self, layer: int) -> Callable[..., tuple[ExitOutput, Any]]: ...

    def all_exits(self, batch: Batch) -> tuple[ExitOutput, ...]: ...


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a row may take: whoever has taken it is answered by the exit it has come to.

    Such an answer is forced: no policy chose it, and no certificate is about it. So nobody, not
    even who means harm, takes more. One layer runs in any case.

    Attributes:
        depth: layers.
        seconds: from when the first layer of a row's batch is begun; looked at after each layer,
            and on a GPU where it is asked who has left. For backends torch and inductor.

    Raises ConfigError for a budget of nothing.
    """

    depth: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        depth, seconds = self.depth, self.seconds
        # True is an int, and would be one layer or one second; numpy's integers are no `int`
        whole = isinstance(depth, int | np.integer) and not isinstance(depth, bool)
        if depth is not None and not (whole and depth >= 1):
            raise ConfigError(
                f"A depth of {depth!r} runs no layer. Give a whole number, 1 or more."
            )
        number = isinstance(seconds, int | float | np.number) and not isinstance(seconds, bool)
        if seconds is not None and not (number and 0 < seconds < math.inf):
            raise ConfigError(f"{seconds!r} seconds are no time. Give a finite number above 0.")

    def deepest(self, depth: int) -> int:
        """The last layer that runs in a model of so many."""
        return depth if self.depth is None else min(self.depth, depth)

    def within(self, other: Budget) -> Budget:
        """What is left of this one by another: the lesser of both."""
        depths = [each.depth for each in (self, other) if each.depth is not None]
        seconds = [each.seconds for each in (self, other) if each.seconds is not None]
        return Budget(min(depths, default=None), min(seconds, default=None))

    def deadline(self) -> float:
        """Of what begins now, on the clock `time.perf_counter`."""
        return math.inf if self.seconds is None else time.perf_counter() + self.seconds


UNLIMITED = Budget()


@dataclass(frozen=True, slots=True)
class Answers:
    """Results of a batch, in the order of its rows.

    Attributes:
        scores: (rows, classes) fp32, from the exit that answered.
        exit_layers: (rows,) int64, 1-based.
        bad: (rows,) bool, rows whose scores were NaN or infinite; their scores mean nothing.
        forced: (rows,) bool, rows that left because of their budget; None stands for no row.
    """

    scores: Tensor
    exit_layers: Tensor
    bad: Tensor
    forced: Tensor | None = None


NO_CLOCK = (
    "Backend {} runs a batch in one call, without a clock. Give a budget of depth, or use backend "
    "torch."
)
"""What an engine of one call says of a budget of seconds."""


class RowAnswer(NamedTuple):
    """What one row of a stream was answered with; the scores of a bad row mean nothing."""

    scores: Tensor  # (classes,) fp32
    exit_layer: int
    bad: bool
    forced: bool = False


class Engine(Protocol):
    """Runs batches under a policy; safe to share between threads."""

    name: str
    """The backend: `torch`, `onnx` ..."""

    @property
    def dtype(self) -> str:
        """What its layers compute in: `float32`, `bfloat16`, `float16`, `int8` or `int7`."""
        ...

    def run(
        self,
        batch: Batch,
        policy: Policy,
        rows: Rows | None = None,
        budget: Budget = UNLIMITED,
    ) -> Answers:
        """Answer every row; each leaves at its layer, and within its budget."""
        ...

    def all_exits(self, batch: Batch) -> tuple[ExitOutput, ...]:
        """Run every layer and every exit."""
        ...


def rows_of(batch: Batch) -> Rows:
    """Default row ids (the position in the batch) and lengths of a batch."""
    leaf = next(iter(batch.values()))
    count, device = len(leaf), leaf.device
    mask = batch.get("attention_mask")
    if mask is not None:
        lengths = mask.sum(dim=1)
    else:
        length = leaf.shape[1] if "input_ids" in batch else 1  # an image is one unit
        lengths = torch.full((count,), length, device=device)
    return Rows(torch.arange(count, device=device), lengths)
