"""Leave by the probability of halting that exits give as the signal `halt`.

lambda_i is the probability of halting at exit i for a row that has come so far. PonderNet
(arXiv 2107.05407) draws; PALBERT (arXiv 2204.03276) leaves once it is likely enough that a draw
would have halted. They need no class probabilities, so any task will do.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field
from torch import Tensor

from offramp.exits.base import ExitOutput
from offramp.policies.base import POLICIES, EvidencePolicy, Policy, Rows, State, Step

_LOW = 0xFFFFFFFF


@POLICIES.register("q_exit")
class QExit(EvidencePolicy):
    """Leave when the probability of having halted, 1 - prod(1 - lambda_j), is above `q`."""

    name = "q_exit"
    signals = ("halt",)
    q: float = Field(default=0.5, ge=0)

    @property
    def bar(self) -> float:
        return self.q

    def with_bar(self, bar: float) -> Self:
        return self._with(q=max(bar, 0.0))

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        going = (1 - self.signal(output, "halt")) * state.get("going", 1)
        return 1 - going, {"going": going}


@POLICIES.register("sample")
class Sample(Policy):
    """Leave by a draw with probability lambda, fixed by (seed, row, layer) and nothing else.

    A row's draws are the same alone, in any batch, and in a replay.
    """

    name = "sample"
    signals = ("halt",)
    searched = False
    hashes_ids = True
    seed: int = Field(default=0, ge=0, le=_LOW)

    def start(self, rows: Rows) -> State:
        key = _mixed(torch.full_like(rows.ids, self.seed))
        key = _mixed(key ^ (rows.ids & _LOW))
        return {"key": _mixed(key ^ (rows.ids >> 32 & _LOW))}

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        # 24 bits are what a float32 holds: 0 <= draw < 1
        draw = (_mixed(state["key"] ^ layer) >> 8).float() / 2**24
        return Step(draw < self.signal(output, "halt"), output.scores, state)


def _mixed(number: Tensor) -> Tensor:
    """A permutation of 32-bit numbers whose every bit hangs on all bits; int64 in and out."""
    for _ in range(2):
        number = (number >> 16 ^ number) * 0x45D9F3B & _LOW
    return number >> 16 ^ number
