"""Exits that pool the tokens to one vector and answer with a linear layer.

Which pooling is right differs by model: early layers of a sentence encoder keep their
content in the mean of the tokens, a fine-tuned ALBERT moves it to [CLS]. The default learns
where to look (measured: docs/results/defaults.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from offramp.errors import ConfigError
from offramp.exits.base import EXITS, ExitKind, ExitOutput, Exits, Host, Pooling, start_anew

_READS = {
    "cls": "the first token",
    "pooler": "what the model's own pooler makes of the tokens",
    "mean": "the mean of the tokens",
    "attention": "a learned mean of the tokens",
}


class PooledKind(ExitKind):
    """Exits that read one pooled vector: what all such kinds can be told.

    Attributes:
        pooling: `cls` first token, `pooler` the model's own pooler (shared by all exits),
            `mean` of the real tokens, `attention` learned weights that start as the mean.
        hidden: an own dense layer with tanh before the linear one (DeeBERT's pooler).
        dropout: before the linear layer, in training only.
    """

    pooling: Pooling = "attention"
    hidden: bool = False
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @property
    def cacheable(self) -> bool:
        return self.pooling != "attention"

    @property
    def rescalable(self) -> bool:
        return True

    @property
    def reads(self) -> str:
        return _READS[self.pooling] + (
            ", through a dense layer of their own" if self.hidden else ""
        )


@EXITS.register("pooled")
class ExitSpec(PooledKind):
    """An own linear layer on the pooled tokens.

    Attributes:
        pooling: `cls` first token, `pooler` the model's own pooler (shared by all exits),
            `mean` of the real tokens, `attention` learned weights that start as the mean.
        hidden: an own dense layer with tanh before the linear one (DeeBERT's pooler).
        dropout: before the linear layer, in training only.
    """

    kind = "pooled"

    def build(self, host: Host, num_scores: int) -> Exits:
        check_pooling(self.pooling, host)
        made = {n: PooledExit(self, host.width(n), num_scores, host) for n in range(1, host.depth)}
        return Exits({str(layer): exit for layer, exit in made.items()})


def check_pooling(pooling: Pooling, host: Host) -> None:
    """Refuse a pooling that makes no sense for the states of a model. Raises ConfigError."""
    if pooling not in host.poolings:
        raise ConfigError(
            f"Pooling '{pooling}' makes no sense for this model. "
            f"Poolings: {', '.join(host.poolings)}."
        )


class PooledExit(nn.Module):
    """Pool the backbone's view of a state, optionally a dense layer with tanh, dropout, linear.

    Args:
        spec: see `PooledKind`.
        width: of the hidden state it reads.
        num_scores: classes, labels, or 1 for regression.
        host: its `pool` is used with pooling `pooler`, its pooler starts a dense layer.
    """

    def __init__(self, spec: PooledKind, width: int, num_scores: int, host: Host) -> None:
        super().__init__()
        self.spec = spec
        self._pooler = host.pool
        view = host.view
        self._view: Callable[[Tensor], Tensor] | None = None if view is None else view.__call__
        if spec.pooling == "attention":
            self.query = nn.Linear(width, 1, bias=False)
            self.first = nn.Parameter(torch.zeros(1))
        self.dense = nn.Linear(width, width) if spec.hidden else None
        self.dropout = nn.Dropout(spec.dropout)
        self.classifier = nn.Linear(width, num_scores)
        start_anew(self)
        if self.dense is not None and host.pooler is not None:
            self.dense.load_state_dict(host.pooler.state_dict())
        if spec.pooling == "attention":
            nn.init.zeros_(self.query.weight)

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
        logits = self._asked(hidden)
        if torch.is_inference_mode_enabled():
            logits.select(2, 0).add_(self.first)  # in place, where nobody asks for gradients
        else:
            # a sum, which a graph says in fewer steps than to cut off the first and join it again
            is_first = torch.arange(hidden.shape[1], device=hidden.device) == 0
            logits = logits + self.first * is_first.to(logits.dtype)
        if mask is not None:
            padded, lowest = mask.unsqueeze(1) == 0, torch.finfo(logits.dtype).min
            if torch.compiler.is_exporting():  # worked out once, and then a sum for each layer
                logits = logits + torch.where(padded, lowest, logits.new_zeros(()))
            else:
                logits = logits.masked_fill(padded, lowest)
        return torch.bmm(torch.softmax(logits, dim=-1), hidden).squeeze(1)

    def _asked(self, hidden: Tensor) -> Tensor:
        """The query of every token, (rows, 1, tokens)."""
        plain = self._plain("query")
        if plain is not None and torch.compiler.is_exporting():
            # runtimes turn the tokens within the product, but not what it makes of them
            return plain[0] @ hidden.transpose(1, 2)
        return self._product("query", hidden).transpose(1, 2)

    def _product(self, name: str, values: Tensor) -> Tensor:
        """What a linear layer makes of values: to call a module, or to ask it for its weights, may
        cost more than so small a product itself."""
        plain = self._plain(name)
        return getattr(self, name)(values) if plain is None else functional.linear(values, *plain)

    def _plain(self, name: str) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of a linear layer; None of one pruned, normed, adapted or watched."""
        layer = self._modules[name]
        if type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks):
            own = layer._parameters
            weight = own.get("weight")
            if weight is not None and "bias" in own and "forward" not in layer.__dict__:
                return weight, own["bias"]
        return None

    def feature(self, pooled: Tensor) -> Tensor:
        """What the linear layer reads, (rows, width)."""
        return pooled if self.dense is None else torch.tanh(self.dense(pooled))

    def score(self, feature: Tensor) -> Tensor:
        """(rows, width) -> scores (rows, num_scores)."""
        if self.training:
            feature = self.dropout(feature)
        return self._product("classifier", feature)

    def read(self, pooled: Tensor, carry: Any = None) -> tuple[ExitOutput, Any]:
        """What the exit says of pooled vectors, (rows, width); kinds with signals override this."""
        return ExitOutput(self.score(self.feature(pooled))), carry

    def forward(
        self, hidden: Tensor, mask: Tensor | None, carry: Any = None
    ) -> tuple[ExitOutput, Any]:
        return self.read(self.pool(hidden, mask), carry)


def mean_of_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens, (rows, width)."""
    if mask is None:
        return hidden.mean(dim=1)
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    # summed in fp32 at least: in fp16 a sum of tokens overflows, in bf16 their number is rounded
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = (hidden * weights).sum(dim=1, dtype=wide)
    return (total / weights.sum(dim=1, dtype=wide).clamp_min(1)).to(hidden.dtype)
