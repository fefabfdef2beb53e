"""The model's own head after every layer, and one net that says when to halt.

Source: PonderNet, arXiv 2107.05407, section 2; PALBERT, arXiv 2204.03276, whose net also sees
the layer before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from offramp.exits.base import EXITS, ExitKind, ExitOutput, Exits, Host, Widened, start_anew


@EXITS.register("halting")
class HaltingSpec(ExitKind):
    """The model's own head on z_i, its pooled vector after layer i, and one net for all layers.

    Where layers differ in width, z_i is made as wide as the head wants it, see `Widened`.

    The net gives the signal `halt`, (units,): the probability of halting at layer i for a row
    that has come this far; 1 at full depth.

    Attributes:
        input: of the net: `current` z_i; `difference` z_i - z_(i-1); `both` z_i beside z_(i-1).
            z_0 is 0.
        layers: 1 is a linear layer; n > 1 puts n linear layers with tanh before it.
        dropout: before the net, in training only.
        start: the probability of halting at every layer before anything is learnt. With that of
            the prior the net begins at the prior; with one half, a good last layer drives it to
            0 in the first updates, where its sigmoid passes no gradient on.
    """

    kind = "halting"
    own_answers = False
    # as in PALBERT's code
    from_nothing = False
    input: Literal["current", "difference", "both"] = "current"
    layers: int = Field(default=1, ge=1, le=16)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    start: float = Field(default=0.5, gt=0, lt=1)

    @property
    def reads(self) -> str:
        return "what the model's own head reads"

    def build(self, host: Host, num_scores: int) -> Exits:
        made = HaltingExits({"shared": HaltingExit(self, host)})
        made.remembers = self.input != "current"
        return made


class HaltingExit(nn.Module):
    """One exit for all layers; it remembers the layer before in `carry`, (rows, width).

    Args:
        spec: see `HaltingSpec`.
        host: its own pooling and head answer.
    """

    def __init__(self, spec: HaltingSpec, host: Host) -> None:
        super().__init__()
        self.spec = spec
        self._pool, self._answer = host.pool, host.answer
        view = host.view
        self._view: Callable[[Tensor], Tensor] | None = None if view is None else view.__call__
        self.widened = Widened(host)
        self._widens = len(self.widened) > 0  # to ask the module costs more than a small exit
        width = self.widened.width
        size = 2 * width if spec.input == "both" else width
        hidden = spec.layers if spec.layers > 1 else 0
        deep = [part for _ in range(hidden) for part in (nn.Linear(size, size), nn.Tanh())]
        self.dropout = nn.Dropout(spec.dropout)
        last = nn.Linear(size, 1)
        self.net = nn.Sequential(*deep, last)
        start_anew(self)
        nn.init.constant_(last.bias, math.log(spec.start / (1 - spec.start)))

    def forward(
        self, hidden: Tensor, mask: Tensor | None, carry: Any = None
    ) -> tuple[ExitOutput, Any]:
        pooled = self._pool(hidden if self._view is None else self._view(hidden), mask)
        pooled = self.widened(pooled) if self._widens else pooled
        logit = self.net(self.dropout(self._seen(pooled, carry))).squeeze(-1)
        output = ExitOutput(self._answer(pooled), {"halt": logit.float().sigmoid()})
        return output, None if self.spec.input == "current" else pooled

    def _seen(self, pooled: Tensor, before: Tensor | None) -> Tensor:
        """What the net reads of this layer and the one before."""
        if self.spec.input == "current":
            return pooled
        before = torch.zeros_like(pooled) if before is None else before
        if self.spec.input == "difference":
            return pooled - before
        return torch.cat((pooled, before), dim=-1)


class HaltingExits(Exits):
    """The same exit after every layer."""

    def at(self, layer: int) -> HaltingExit:
        return self["shared"]  # type: ignore[return-value]

    def full_signals(self, scores: Tensor) -> Mapping[str, Tensor]:
        return {"halt": scores.new_ones(scores.shape[0]).float()}
