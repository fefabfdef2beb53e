"""Exits that look at all layers: the past ones as they were, the coming ones as they imagine them.

Source: GPFEE, NAACL 2021 ("A Global Past-Future Early Exit Method").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from offramp.exits.base import EXITS, ExitKind, ExitOutput, Exits, Host, start_anew
from offramp.exits.pooled import check_pooling, mean_of_tokens


@EXITS.register("imitating")
class ImitatingSpec(ExitKind):
    """Scores from the vectors z_1..z_i of the layers run and imitations of those to come.

    Each layer has a pooler of its own, z_i = tanh(P_i h + p_i). Exit i imagines
    tanh(M_k z_i + m_k) for k = i+1..L. All exits share one layer per k that turns a vector
    into 2 C numbers. The first C are summed over past and over future; a gate g of the last C
    of the past weighs the sums: 2 g past + (2 - 2 g) future. Between exits travel 2 C numbers.

    In training there are the signals `state`, (units, width), z_i, and `imitated`, (units,
    L - i, width); at full depth `state` is what the model's own head reads.

    Attributes:
        pooling: `cls` first token, `mean` of the real tokens.
        dropout: on the vectors, in training only.
    """

    kind = "imitating"
    pooling: Literal["cls", "mean"] = "cls"
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @property
    def reads(self) -> str:
        which = "the first token" if self.pooling == "cls" else "the mean of the tokens"
        return f"{which} of all layers so far, and what the coming ones may hold"

    def build(self, host: Host, num_scores: int) -> Exits:
        check_pooling(self.pooling, host)
        return ImitatingExits(self, host, num_scores)


class ImitatingExits(Exits):
    """The exits, and the layers they share.

    Args:
        spec: see `ImitatingSpec`.
        host: its pooler starts those of the exits, where the sizes agree.
        num_scores: classes or labels.
    """

    remembers = True

    def __init__(self, spec: ImitatingSpec, host: Host, num_scores: int) -> None:
        self.width = _pooled_width(host)
        super().__init__(
            {
                str(number): ImitatingExit(spec, number, host, self.width, self.combine)
                for number in range(1, host.depth)
            }
        )
        self.depth, self.num_scores = host.depth, num_scores
        self._pool, view = host.pool, host.view
        self._view: Callable[[Tensor], Tensor] | None = None if view is None else view.__call__
        self.future = nn.Linear(self.width, (host.depth - 1) * self.width)
        self.votes = nn.Linear(self.width, host.depth * 2 * num_scores)
        self.gate = nn.Linear(num_scores, num_scores)
        for linear in (self.future, self.votes, self.gate):
            start_anew(linear)

    def imagine(self, number: int, state: Tensor) -> Tensor:
        """Imitations of layers number+1..L from z_number, (rows, L - number, width)."""
        start = (number - 1) * self.width
        weight, bias = self.future.weight[start:], self.future.bias[start:]
        flat = torch.tanh(functional.linear(state, weight, bias))
        return flat.view(state.shape[0], self.depth - number, self.width)

    def vote(self, first: int, vectors: Tensor) -> Tensor:
        """Vectors of layers first, first+1, ... as (rows, layers, 2 C)."""
        layers, size = vectors.shape[1], 2 * self.num_scores
        weight = self.votes.weight.view(self.depth, size, self.width)[
            first - 1 : first - 1 + layers
        ]
        bias = self.votes.bias.view(self.depth, size)[first - 1 : first - 1 + layers]
        return torch.einsum("rkh,kch->rkc", vectors, weight) + bias

    def combine(
        self, number: int, state: Tensor, dropout: nn.Dropout, past: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, votes of the past up to this layer (rows, 2 C), and imitations."""
        imitated = self.imagine(number, state)
        seen = dropout(torch.cat((state.unsqueeze(1), imitated), dim=1))
        votes = self.vote(number, seen)
        here = votes[:, 0] if past is None else past + votes[:, 0]
        future = votes[:, 1:, : self.num_scores].sum(dim=1)
        scores, mood = here.split(self.num_scores, dim=-1)
        gate = torch.sigmoid(self.gate(torch.tanh(mood / number)))
        scores = 2 * gate * scores + (2 - 2 * gate) * future
        if self.training:
            # later exits train the votes of this layer, but the layer itself only by its own
            ahead = self.vote(number, seen[:, :1].detach())[:, 0]
            here = ahead if past is None else past + ahead
        return scores, here, imitated

    def full(self, scores: Tensor, hidden: Tensor, carry: Any) -> tuple[ExitOutput, Any]:
        if not self.training:
            return ExitOutput(scores), carry
        viewed = hidden if self._view is None else self._view(hidden)
        state = self._pool(viewed, (carry or {}).get("mask"))
        return ExitOutput(scores, {"state": state}), carry


class ImitatingExit(nn.Module):
    """One exit.

    Args:
        spec: see `ImitatingSpec`.
        number: of the layer it hangs on.
        host: the model.
        width: of all vectors.
        combine: `ImitatingExits.combine`.
    """

    def __init__(
        self,
        spec: ImitatingSpec,
        number: int,
        host: Host,
        width: int,
        combine: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self.spec, self.number = spec, number
        self._combine = combine
        view = host.view
        self._view: Callable[[Tensor], Tensor] | None = None if view is None else view.__call__
        self.dropout = nn.Dropout(spec.dropout)
        self.dense = nn.Linear(host.width(number), width)
        start_anew(self.dense)
        if host.pooler is not None and host.pooler.weight.shape == self.dense.weight.shape:
            self.dense.load_state_dict(host.pooler.state_dict())

    def forward(
        self, hidden: Tensor, mask: Tensor | None, carry: Any = None
    ) -> tuple[ExitOutput, Any]:
        state = torch.tanh(self.dense(self._pooled(hidden, mask)))
        past = None if carry is None else carry["past"]
        scores, past, imitated = self._combine(self.number, state, self.dropout, past)
        if not self.training:
            return ExitOutput(scores), {"past": past}
        kept = {} if mask is None else {"mask": mask}
        return ExitOutput(scores, {"state": state, "imitated": imitated}), {"past": past, **kept}

    def _pooled(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        if self._view is not None:
            hidden = self._view(hidden)
        return hidden[:, 0] if self.spec.pooling == "cls" else mean_of_tokens(hidden, mask)


def _pooled_width(host: Host) -> int:
    """Width of what the model's own head reads."""
    return host.width(host.depth) if host.pooler is None else host.pooler.out_features
