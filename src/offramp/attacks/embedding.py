"""Noise on the embedding that makes every exit uncertain.

DeepSloth (arXiv 2010.02432) changes the pixels of an image; here it is what the layers first see,
of tokens as of images. Nobody who sends texts can choose it freely. It is the strongest change of
its size that some steps along the gradient find, which need not be the strongest there is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor

from offramp.attacks.base import ATTACKS, Attack, Victim
from offramp.attacks.kept import Kept
from offramp.attacks.objectives import OBJECTIVES
from offramp.backbones import Batch, Flow
from offramp.engines import Engine, TorchEngine
from offramp.exits import ExitOutput

_STEP = 2.5
"""All steps together over the largest change: far enough to turn round once."""


@ATTACKS.register("embedding")
class Embedding(Attack):
    """Projected gradient steps on the output of the embedding, within a box.

    Args:
        eps: the most that a number changes, in standard deviations of the row's embedding.
        steps: gradients a row.
    """

    name = "embedding"
    reads = ("text", "image")
    objective: str = "uniform"
    eps: float = Field(default=0.1, gt=0)
    steps: int = Field(default=10, ge=1)

    def on(self, victim: Victim, rows: Dataset, kept: Kept) -> tuple[Dataset, Engine]:
        victim.queries += (self.steps + 2) * len(rows)
        return rows, AttackedEngine(victim, self)


class AttackedEngine(TorchEngine):
    """The torch engine whose `all_exits` are those of the changed rows, so that they are recorded
    like any others."""

    def __init__(self, victim: Victim, attack: Embedding) -> None:
        super().__init__(victim.model)
        self._victim, self._attack = victim, attack

    def all_exits(self, batch: Batch) -> tuple[ExitOutput, ...]:
        """What every exit says of rows whose embedding was changed."""
        with torch.no_grad():
            flow = self.backbone.embed(batch)
        found = self._changed(flow)
        with torch.no_grad():
            return self._run(flow, found)

    @torch.enable_grad()
    def _changed(self, flow: Flow) -> Tensor:
        """The best change of each row that a step came to, in the shape of the hidden state."""
        room = self._attack.eps * _spread(flow)
        change = best = torch.zeros_like(flow.hidden)
        highest = flow.hidden.new_full((len(best),), -torch.inf, dtype=torch.float32)
        for _ in range(self._attack.steps + 1):  # the last of them only looks
            change = change.detach().requires_grad_()
            score = self._score(self._run(flow, change))
            (slope,) = torch.autograd.grad(score.sum(), change)
            better = score.detach() > highest
            best = torch.where(_wide(better, best), change.detach(), best)
            highest = torch.maximum(highest, score.detach())
            step = change.detach() + slope.sign() * room * (_STEP / self._attack.steps)
            change = torch.maximum(torch.minimum(step, room), -room)
        return best

    def _score(self, outputs: Sequence[ExitOutput]) -> Tensor:
        measure = OBJECTIVES[self._attack.objective]
        return measure(outputs[:-1], self._victim.model.problem_type)

    def _run(self, flow: Flow, change: Tensor) -> tuple[ExitOutput, ...]:
        """All exits, as `MultiExitModel.all_exits` from here on."""
        outputs, carry = [], None
        flow = flow._replace(hidden=flow.hidden + change)
        for layer in range(1, self.model.depth + 1):
            flow = self.backbone.layer(layer, flow)
            output, carry = self.model.exit_at(layer)(flow.hidden, flow.mask, carry)
            outputs.append(output)
        return tuple(outputs)


def _spread(flow: Flow) -> Tensor:
    """Standard deviation of each row's embedding, 0 where a token is padding; it broadcasts over
    the hidden state."""
    hidden = flow.hidden.float()
    real = torch.ones_like(hidden)
    if flow.mask is not None and hidden.dim() == 3:
        real = flow.mask.float().unsqueeze(-1).expand_as(hidden)
    rest = tuple(range(1, hidden.dim()))
    count = real.sum(dim=rest, keepdim=True)
    mean = (hidden * real).sum(dim=rest, keepdim=True) / count
    variance = ((hidden - mean).square() * real).sum(dim=rest, keepdim=True) / count
    return (variance.sqrt() * real).to(flow.hidden.dtype)


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    """(rows,) so that it broadcasts over `like`."""
    return rows.view(-1, *[1] * (like.dim() - 1))
