"""Heads and gates by turns, on a frozen model.

Source: JEI-DNN, arXiv 2310.09163, sections 4.2 and 4.3. With L layers the exits after layers
1..L-1 have gates, g_l is a gate's signal, and P_l is the share of a row that leaves after
layer l.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.objectives.base import Clock, Objective, Stage, weighted_sum
from offramp.objectives.ponder import halting_masses
from offramp.objectives.task import row_losses, task_loss

WARM_UP, BY_TURNS = "heads", "turns"
TURNS = 10
"""Of both parts together at least, where a stage has so many steps."""
_LEAST = 1e-12


class Gated(Objective):
    """A warm-up of the heads, then gates and heads by turns.

    Gates learn to open from the exit on at which a row's loss plus `trade_off` times its cost
    is least, full depth included. Heads learn from the rows that would leave at them.

    Args:
        trade_off: what full depth costs, in the unit of the loss (lambda in the paper).
        costs: of leaving after layers 1..L, 1 for the last; l / L unless given. Shares of FLOPs
            are more exact where layers differ or exits are heavy.
        every: steps until the other part takes its turn; gates begin. In a short training they
            are fewer, so that each part has its turn `TURNS` / 2 times.
        floor: share of a head's weight that does not depend on the gates.
        simplex: P_l = g_l prod_(j<l) (1 - g_j), and gates learn the expected loss plus cost,
            sum_l P_l (loss_l + trade_off * cost_l), instead of targets. Otherwise, as in the
            paper, P_l = min(g_l, what the gates before have left).
        as_released: heads learn the plain mean of their losses, which is what the released
            weighting amounts to.

    Raises:
        ConfigError: `every` is below 1 or `floor` is not between 0 and 1.
    """

    def __init__(
        self,
        trade_off: float = 0.15,
        costs: Sequence[float] | None = None,
        every: int = 200,
        floor: float = 0.1,
        simplex: bool = False,
        as_released: bool = False,
    ) -> None:
        super().__init__()
        if every < 1 or not (0 <= floor <= 1 and trade_off >= 0):
            raise ConfigError(
                f"every is {every}, floor is {floor} and trade_off is {trade_off}. Give every 1 or "
                "more, a floor from 0 to 1, and a trade_off from 0."
            )
        self.trade_off, self.costs = trade_off, costs
        self.every, self.floor = every, floor
        self.simplex, self.as_released = simplex, as_released

    def stages(self) -> Sequence[Stage]:
        warm_up = Stage(WARM_UP, "exits", share=0.5)
        return (Stage("stock", "stock"), warm_up, Stage(BY_TURNS, "exits"))

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        labels, kind = batch["labels"], batch["problem_type"]
        if stage.name == "stock":
            return {"stock": task_loss(outputs[-1].scores, labels, kind)}
        if stage.name == WARM_UP:
            losses = [task_loss(output.scores, labels, kind) for output in outputs[:-1]]
            return {"heads": weighted_sum(losses, range(len(losses), 0, -1))}
        found = torch.stack([row_losses(o.scores, labels, kind) for o in outputs], dim=1)
        gates = torch.stack([output.signals["gate"].float() for output in outputs], dim=1)
        if self._turn(batch.get("clock", Clock())) % 2:
            return {"heads": self._of_heads(found, gates.detach())}
        return {"gates": self._of_gates(found.detach(), gates)}

    def _turn(self, clock: Clock) -> int:
        return clock.step // max(1, min(self.every, clock.steps // TURNS))

    def _of_heads(self, found: Tensor, gates: Tensor) -> Tensor:
        """Mean over rows and exits 1..L-1; each row's weights have mean 1, or that of the floor
        where all its gates are closed."""
        early = found[:, :-1]
        if self.as_released:
            return early.mean()
        masses = (halting_masses(gates) if self.simplex else capped_masses(gates))[:, :-1]
        shares = masses / masses.mean(dim=1, keepdim=True).clamp_min(_LEAST)
        return ((self.floor + (1 - self.floor) * shares) * early).mean()

    def _of_gates(self, found: Tensor, gates: Tensor) -> Tensor:
        price = self.price(found)
        if self.simplex:
            return (halting_masses(gates) * price).sum(dim=1).mean()
        return balanced_loss(gates[:, :-1], gate_targets(price))

    def price(self, found: Tensor) -> Tensor:
        """Losses (rows, layers) plus what it costs to come there.

        Raises ConfigError for costs that are not one per layer.
        """
        depth = found.shape[1]
        costs = self.costs
        if costs is None:
            costs = [layer / depth for layer in range(1, depth + 1)]
        if len(costs) != depth:
            raise ConfigError(
                f"costs has {len(costs)} numbers, the model {depth} layers. Give one per layer."
            )
        return found + self.trade_off * found.new_tensor(costs)


def capped_masses(gates: Tensor) -> Tensor:
    """P_l = max(0, min(g_l, 1 - sum_(j<l) g_j)), both (rows, layers); the last g is 1."""
    before = gates.cumsum(dim=1) - gates
    return torch.minimum(gates, 1 - before).clamp_min(0)


def gate_targets(price: Tensor) -> Tensor:
    """1 at the cheapest exit of a row and after it, (rows, layers) -> (rows, layers - 1)."""
    layers = torch.arange(price.shape[1] - 1, device=price.device)
    return (layers >= price.argmin(dim=1, keepdim=True)).float()


def balanced_loss(gates: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of gates (rows, gates), mean over rows and gates.

    Each gate's ones weigh as much as its zeros, as they come in the batch, within a factor of
    5: a batch with only one of the two still teaches.
    """
    ones = targets.sum(dim=0)
    weight = ((len(targets) - ones) / ones.clamp_min(1)).clamp(1 / 5, 5)
    opened, closed = (value.clamp_min(_LEAST).log() for value in (gates, 1 - gates))
    return -(weight * targets * opened + (1 - targets) * closed).mean()
