"""The expected loss under a learnt halting distribution, held to a geometric prior.

Source: PonderNet, arXiv 2107.05407, section 2.2. With lambda_i the probability of halting at
layer i for a row that has come this far, p_i = lambda_i prod_(j<i) (1 - lambda_j), and p_L is
what is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.objectives.base import Objective, Stage
from offramp.objectives.task import row_losses

Tail = Literal["spread", "last"]
HALTED = 0.05
"""As released, a row counts as halted once less than this is left of its distribution."""
_LEAST = 1e-30


class Ponder(Objective):
    """sum_i p_i * loss_i + beta * KL(p || prior), mean over rows.

    Args:
        beta: weight of the divergence.
        prior: parameter of the geometric prior; 1 / prior is the depth it expects.
        tail: what the prior has beyond the last layer: `spread` over all layers, or all on the
            `last` one.
        as_released: PALBERT's code instead, but that the last layer halts for certain here as
            well: KL(prior || p); once less than 0.05 is left of a row's p, its later p_i are
            0.05 / L, so that p no longer adds up to 1; layers that no row of the batch reaches
            add no loss.

    Raises:
        ConfigError: beta is negative, or the prior is not between 0 and 1.
    """

    def __init__(
        self,
        beta: float = 0.01,
        prior: float = 0.2,
        tail: Tail = "spread",
        as_released: bool = False,
    ) -> None:
        super().__init__()
        if not (0 <= beta < math.inf and 0 < prior < 1):
            raise ConfigError(
                f"beta is {beta} and prior is {prior}. Give a beta of at least 0 and a prior "
                "between 0 and 1; its inverse is the depth that you expect."
            )
        self.beta, self.prior, self.tail = beta, prior, tail
        self.as_released = as_released

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        labels, kind = batch["labels"], batch["problem_type"]
        found = torch.stack([row_losses(o.scores, labels, kind) for o in outputs], dim=1)
        halts = torch.stack([output.signals["halt"].float() for output in outputs], dim=1)
        masses = halting_masses(halts)
        prior = geometric_prior(self.prior, len(outputs), self.tail).to(masses.device)
        if not self.as_released:
            task = (masses * found).sum(dim=1).mean()
            return {"task": task, "prior": self.beta * divergence(masses, prior).mean()}
        running = masses.detach().cumsum(dim=1) - masses.detach() <= 1 - HALTED
        masses = torch.where(running, masses, HALTED / len(outputs))
        task = (masses * found * running.any(dim=0)).sum(dim=1).mean()
        return {"task": task, "prior": self.beta * divergence(prior, masses).mean()}


def halting_masses(halts: Tensor) -> Tensor:
    """p_i from lambda_i, both (rows, layers); rows add up to 1, whatever the last lambda is."""
    stays = torch.cumprod(1 - halts[:, :-1], dim=1)
    left = torch.cat((torch.ones_like(halts[:, :1]), stays), dim=1)
    return torch.cat((left[:, :-1] * halts[:, :-1], left[:, -1:]), dim=1)


def geometric_prior(rate: float, depth: int, tail: Tail) -> Tensor:
    """rate * (1 - rate)^(i-1) for layers i = 1..depth, made to add up to 1, (depth,)."""
    prior = rate * (1 - rate) ** torch.arange(depth)
    if tail == "spread":
        return prior / prior.sum()
    prior[-1] = (1 - rate) ** (depth - 1)
    return prior


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """KL(one || other) = sum_i one_i (log one_i - log other_i) over the last axis."""
    logs = one.clamp_min(_LEAST).log() - other.clamp_min(_LEAST).log()
    return (one * logs).sum(dim=-1)
