"""What the tests of the torch engine share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from offramp.engines import Answers, TorchEngine
from offramp.exits import ExitOutput
from offramp.policies import Policy, Rows
from offramp.testing import EchoModel, echo_batch


class TableModel(EchoModel):
    """Answers from a table of scores, (rows, layers, classes), by the row's id."""

    def __init__(self, table: Tensor) -> None:
        super().__init__(depth=table.shape[1])
        self.table = table

    def exit_at(self, layer: int) -> Callable[..., tuple[ExitOutput, Any]]:
        def read(hidden: Tensor, mask: Tensor | None, carry: Any = None) -> tuple[ExitOutput, Any]:
            ids = hidden[:, 0, 0].long()
            return ExitOutput(self.table[ids, layer - 1]), carry

        return read


def outputs_of(table: Tensor) -> list[ExitOutput]:
    return [ExitOutput(table[:, layer]) for layer in range(table.shape[1])]


def numbered(ids: list[int]) -> Rows:
    return Rows(torch.tensor(ids), torch.ones(len(ids), dtype=torch.long))


def run_table(
    table: Tensor, policy: Policy, ids: list[int] | None = None, **options: Any
) -> Answers:
    ids = list(range(len(table))) if ids is None else ids
    engine = TorchEngine(TableModel(table), **options)
    return engine.run(echo_batch(ids), policy, numbered(ids))


def same(one: Any, other: Any) -> bool:
    return (
        torch.equal(one.exit_layers, other.exit_layers)
        and torch.equal(one.bad, other.bad)
        and torch.equal(one.scores.nan_to_num(), other.scores.nan_to_num())
    )
