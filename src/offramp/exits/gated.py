"""Pooled exits, each with a gate that reads how sure its exit is.

Source: JEI-DNN, arXiv 2310.09163, section 4. A gate sees four numbers and no features, and
sends no gradient to its exit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import ConfigError
from offramp.exits.base import EXITS, ExitOutput, Exits, Host
from offramp.exits.pooled import PooledExit, PooledKind, check_pooling


@EXITS.register("gated")
class GatedSpec(PooledKind):
    """A pooled exit per layer with a gate, a linear layer on `sureness` of the exit's scores.

    Signal `gate`, (units,): the gate's sigmoid; 1 at full depth. For classification with one
    answer: the gate reads one softmax.
    """

    kind = "gated"

    def build(self, host: Host, num_scores: int) -> Exits:
        check_pooling(self.pooling, host)
        if num_scores < 2:
            raise ConfigError(
                "Exits of kind 'gated' read class probabilities, and a model with one score has "
                "none. Use exits of kind 'pooled' or 'halting'."
            )
        made = {n: GatedExit(self, host.width(n), num_scores, host) for n in range(1, host.depth)}
        return GatedExits({str(layer): exit for layer, exit in made.items()})


class GatedExit(PooledExit):
    """A `PooledExit` with a gate."""

    def __init__(self, spec: GatedSpec, width: int, num_scores: int, host: Host) -> None:
        super().__init__(spec, width, num_scores, host)
        self.gate = nn.Linear(4, 1)
        nn.init.normal_(self.gate.weight, std=0.02)
        nn.init.zeros_(self.gate.bias)

    def read(self, pooled: Tensor, carry: Any = None) -> tuple[ExitOutput, Any]:
        scores = self.score(self.feature(pooled))
        seen = sureness(scores.detach().float()).to(self.gate.weight.dtype)
        gate = self.gate(seen).squeeze(-1).float().sigmoid()
        return ExitOutput(scores, {"gate": gate}), carry


class GatedExits(Exits):
    """Everyone who comes as far as full depth leaves there."""

    def full_signals(self, scores: Tensor) -> Mapping[str, Tensor]:
        return {"gate": scores.new_ones(scores.shape[0]).float()}


def sureness(scores: Tensor) -> Tensor:
    """What a gate reads of scores (rows, classes), (rows, 4).

    Largest probability, entropy in nats, largest minus second largest probability, and the
    entropy of the squared probabilities, made to add up to 1.
    """
    probabilities = torch.softmax(scores, dim=-1)
    top = probabilities.topk(2, dim=-1).values
    squares = probabilities.square()
    sharpened = squares / squares.sum(dim=-1, keepdim=True)
    entropy, other = (torch.special.entr(p).sum(dim=-1) for p in (probabilities, sharpened))
    return torch.stack((top[:, 0], entropy, top[:, 0] - top[:, 1], other), dim=-1)
