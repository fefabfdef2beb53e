"""What an engine is: it makes the layers that are not needed cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from offramp.backbones import Backbone, Batch
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
class Answers:
    """Results of a batch, in the order of its rows.

    Attributes:
        scores: (rows, classes) fp32, from the exit that answered.
        exit_layers: (rows,) int64, 1-based.
        bad: (rows,) bool, rows whose scores were NaN or infinite; their scores mean nothing.
    """

    scores: Tensor
    exit_layers: Tensor
    bad: Tensor


class RowAnswer(NamedTuple):
    """What one row of a stream was answered with; the scores of a bad row mean nothing."""

    scores: Tensor  # (classes,) fp32
    exit_layer: int
    bad: bool


class Engine(Protocol):
    """Runs batches under a policy; safe to share between threads."""

    name: str
    """The backend: `torch`, `onnx` ..."""

    @property
    def dtype(self) -> str:
        """What its layers compute in: `float32`, `bfloat16`, `float16` or `int8`."""
        ...

    def run(self, batch: Batch, policy: Policy, rows: Rows | None = None) -> Answers:
        """Answer every row; each leaves at its layer."""
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
