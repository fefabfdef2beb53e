"""Small students that attend to all tokens before they answer (FastBERT)."""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from offramp.exits.base import EXITS, ExitKind, ExitOutput, Exits, Host, start_anew
from offramp.exits.pooled import mean_of_tokens


@EXITS.register("student")
class StudentSpec(ExitKind):
    """Every token squeezed to a few numbers, one attention over them, a hidden layer.

    Source: FastBERT, arXiv 2004.02178, section 3.2. The released code lets every token ask and
    reads the first answer alone; here only the first token asks, which is the same at a
    fraction of the cost. A map of pixels has no first token: there their mean asks.

    Attributes:
        width: of a squeezed token and of the hidden layer.
        heads: of the attention; they share `width`.
        dropout: of the attention's weights, in training only.
    """

    kind = "student"
    width: int = Field(default=128, ge=1)
    heads: int = Field(default=2, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} cannot share width={self.width} evenly")
        return self

    @property
    def reads(self) -> str:
        return "all tokens, through an attention of their own"

    def build(self, host: Host, num_scores: int) -> Exits:
        made = {n: StudentExit(self, host.width(n), num_scores, host) for n in range(1, host.depth)}
        return Exits({str(layer): exit for layer, exit in made.items()})


class StudentExit(nn.Module):
    """tanh, attention without residual, tanh, linear.

    Args:
        spec: see `StudentSpec`.
        width: of the hidden state it reads.
        num_scores: classes, labels, or 1 for regression.
        host: its `view` is read; without pooling `cls` the mean of the tokens asks.
    """

    def __init__(self, spec: StudentSpec, width: int, num_scores: int, host: Host) -> None:
        super().__init__()
        self.spec = spec
        self._view = None if host.view is None else host.view.__call__
        self._first_asks = "cls" in host.poolings
        self.squeeze = nn.Linear(width, spec.width)
        self.query = nn.Linear(spec.width, spec.width)
        # a bias here would add the same to every token's logit, which softmax takes out again
        self.key = nn.Linear(spec.width, spec.width, bias=False)
        self.value = nn.Linear(spec.width, spec.width)
        self.out = nn.Linear(spec.width, spec.width)
        self.dropout = nn.Dropout(spec.dropout)
        self.dense = nn.Linear(spec.width, spec.width)
        self.classifier = nn.Linear(spec.width, num_scores)
        start_anew(self)

    def pool(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """(rows, tokens, width) -> (rows, spec.width)."""
        if self._view is not None:
            hidden = self._view(hidden)
        tokens = torch.tanh(self.squeeze(hidden))
        asks = tokens[:, 0] if self._first_asks else mean_of_tokens(tokens, mask)
        return self.out(self._attend(asks, tokens, mask))

    def _attend(self, asks: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The answer to one question per row.

        Keys and values are linear, so their weights are applied to one vector per head instead
        of to every token.
        """
        heads, size = self.spec.heads, self.spec.width // self.spec.heads
        questions = self.query(asks).unflatten(1, (heads, size))
        keys, values = (part.weight.unflatten(0, (heads, size)) for part in (self.key, self.value))
        sought = torch.einsum("rhs,hsw->rhw", questions, keys)
        logits = sought @ tokens.transpose(1, 2) / size**0.5
        if mask is not None:
            logits = logits.masked_fill(mask.unsqueeze(1) == 0, torch.finfo(logits.dtype).min)
        weights = self.dropout(torch.softmax(logits, dim=-1))
        found = torch.einsum("rhw,hsw->rhs", weights @ tokens, values)
        # dropout leaves weights that do not add up to 1
        bias = weights.sum(dim=-1, keepdim=True) * self.value.bias.unflatten(0, (heads, size))
        return (found + bias).flatten(1)

    def answer(self, pooled: Tensor) -> Tensor:
        """(rows, spec.width) -> scores (rows, num_scores)."""
        return self.classifier(torch.tanh(self.dense(pooled)))

    def forward(
        self, hidden: Tensor, mask: Tensor | None, carry: Any = None
    ) -> tuple[ExitOutput, Any]:
        return ExitOutput(self.answer(self.pool(hidden, mask))), carry
