"""Exits that pool the tokens to one vector and answer with a linear layer.

Which pooling is right differs by model: early layers of a sentence encoder keep their
content in the mean of the tokens, a fine-tuned ALBERT moves it to [CLS]. The default learns
where to look (measured: docs/results/defaults.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from offramp.exits.base import ExitOutput
from offramp.storage import Strict

Pooling = Literal["cls", "pooler", "mean", "attention"]
POOLINGS: tuple[Pooling, ...] = ("cls", "pooler", "mean", "attention")


class ExitSpec(Strict):
    """What hangs off layers 1..L-1; the exit after layer L is always the model's own head.

    Attributes:
        pooling: `cls` first token, `pooler` the model's own pooler (shared by all exits),
            `mean` of the real tokens, `attention` learned weights that start as the mean.
        hidden: an own dense layer with tanh before the linear one (DeeBERT's pooler).
        dropout: before the linear layer, in training only.
    """

    pooling: Pooling = "attention"
    hidden: bool = False
    dropout: float = Field(default=0.1, ge=0, lt=1)


class PooledExit(nn.Module):
    """Pool the backbone's view of a state, optionally a dense layer with tanh, dropout, linear.

    Args:
        spec: see `ExitSpec`.
        width: of the hidden state it reads.
        num_scores: classes, labels, or 1 for regression.
        pooler: the backbone's `pool`; only used with pooling `pooler`, never owned.
        view: the backbone's, what is read of a state; never owned.
    """

    def __init__(
        self,
        spec: ExitSpec,
        width: int,
        num_scores: int,
        pooler: Callable[[Tensor, Tensor | None], Tensor],
        view: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self._pooler = pooler
        self._view: Callable[[Tensor], Tensor] | None = None if view is None else view.__call__
        if spec.pooling == "attention":
            self.query = nn.Linear(width, 1, bias=False)
            self.first = nn.Parameter(torch.zeros(1))
        self.dense = nn.Linear(width, width) if spec.hidden else None
        self.dropout = nn.Dropout(spec.dropout)
        self.classifier = nn.Linear(width, num_scores)

    def pool(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """(rows, tokens, width) -> (rows, width)."""
        if self.spec.pooling == "cls":
            first = hidden.select(1, 0)
            return first if self._view is None else self._view(first)
        if self._view is not None:
            hidden = self._view(hidden)
        if self.spec.pooling == "pooler":
            return self._pooler(hidden, mask)
        if self.spec.pooling == "mean":
            return mean_of_tokens(hidden, mask)
        return self._attend(hidden, mask)

    def _attend(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        logits = self.query(hidden).squeeze(-1)
        logits = torch.cat((logits[:, :1] + self.first, logits[:, 1:]), dim=1)
        if mask is not None:
            logits = logits.masked_fill(mask == 0, torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, dim=-1)
        return (weights.unsqueeze(1) @ hidden).squeeze(1)

    def answer(self, pooled: Tensor) -> Tensor:
        """(rows, width) -> scores (rows, num_scores)."""
        if self.dense is not None:
            pooled = torch.tanh(self.dense(pooled))
        if self.training:
            pooled = self.dropout(pooled)
        # `forward` because a module's call costs more than this small product itself
        return self.classifier.forward(pooled)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, carry: Any = None
    ) -> tuple[ExitOutput, Any]:
        return ExitOutput(self.answer(self.pool(hidden, mask))), carry


def mean_of_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens, (rows, width)."""
    if mask is None:
        return hidden.mean(dim=1)
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    # summed in fp32 at least: in fp16 a sum of tokens overflows, in bf16 their number is rounded
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = (hidden * weights).sum(dim=1, dtype=wide)
    return (total / weights.sum(dim=1, dtype=wide).clamp_min(1)).to(hidden.dtype)
