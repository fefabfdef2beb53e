"""Exits that also say how probable it is that they are right.

Source: BERxiT, EACL 2021, section 3.3: one linear layer for all exits ("learning to exit").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from offramp.exits.base import EXITS, ExitOutput, Exits, Host, start_anew
from offramp.exits.pooled import PooledExit, PooledKind, check_pooling


@EXITS.register("learned")
class LearnedSpec(PooledKind):
    """Pooled exits with a learned signal `correct`, (units,), in 0..1; 1 at full depth.

    It is the sigmoid of a linear layer on the vector that the exit's own linear layer reads.
    For classes and label sets it is the probability of being right; for regression it is 1
    minus the expected |tanh(score - label)|, by `auto` in spreads of the labels. It has to be
    trained, see `Alternating`.

    Attributes:
        correctness: `shared` one linear layer for all exits (BERxiT), `own` one for each; so it is
            where what exits pool differs in width.
    """

    kind = "learned"
    correctness: Literal["shared", "own"] = "shared"

    @property
    def rescalable(self) -> bool:
        return self.hidden  # else what judges reads the pooled vector too

    def build(self, host: Host, num_scores: int) -> Exits:
        check_pooling(self.pooling, host)
        widths = [host.width(number) for number in range(1, host.depth)]
        one = self.correctness == "shared" and len(set(widths)) == 1
        shared = _new_judge(widths[0]) if one else None
        made: dict[str, nn.Module] = {
            str(number): LearnedExit(self, width, num_scores, host, shared)
            for number, width in enumerate(widths, start=1)
        }
        return LearnedExits(made if shared is None else {**made, "correctness": shared})


def _new_judge(width: int) -> nn.Linear:
    judge = nn.Linear(width, 1)
    start_anew(judge)
    return judge


class LearnedExit(PooledExit):
    """A pooled exit that judges itself.

    Args:
        spec: see `LearnedSpec`.
        width: of the hidden state it reads.
        num_scores: classes, labels, or 1 for regression.
        host: see `PooledExit`.
        shared: what judges, if it belongs to all exits.
    """

    def __init__(
        self,
        spec: PooledKind,
        width: int,
        num_scores: int,
        host: Host,
        shared: nn.Linear | None = None,
    ) -> None:
        super().__init__(spec, width, num_scores, host)
        if shared is None:
            self.correctness = shared = _new_judge(width)
        # a bound method, so that what is shared is not registered here as well
        self._judge: Callable[[Tensor], Tensor] = shared.forward

    def read(self, pooled: Tensor, carry: Any = None) -> tuple[ExitOutput, Any]:
        feature = self.feature(pooled)
        correct = torch.sigmoid(self._judge(feature).squeeze(-1).float())
        return ExitOutput(self.score(feature), {"correct": correct}), carry


class LearnedExits(Exits):
    """The exits, and what judges them all if that is shared."""

    def full_signals(self, scores: Tensor) -> Mapping[str, Tensor]:
        return {"correct": scores.new_ones(scores.shape[0]).float()}
