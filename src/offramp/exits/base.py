"""What an exit is, the record between exits and everything else, and kinds of exits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from offramp.errors import ConfigError
from offramp.registry import Registry
from offramp.storage import Strict, parse_document

Pooling = Literal["cls", "pooler", "mean", "attention"]
POOLINGS: tuple[Pooling, ...] = ("cls", "pooler", "mean", "attention")


@dataclass(frozen=True, slots=True)
class ExitOutput:
    """What one exit says about a set of units.

    Attributes:
        scores: raw scores (logits), shape (units, classes), or (units, 1) for regression.
        signals: named extras a policy may read, shape (units,) or (units, k).
    """

    scores: Tensor
    signals: Mapping[str, Tensor] = field(default_factory=dict)


class Exit(Protocol):
    """What answers at a layer.

    `carry` is memory handed from exit to exit (None where an exit needs none); it is a
    tensor or a dict of tensors whose first axis is the unit, so that rows can leave.
    """

    def __call__(
        self, hidden: Tensor, mask: Tensor | None, carry: Any = None
    ) -> tuple[ExitOutput, Any]:
        """hidden: (rows, tokens, width); mask: (rows, tokens), 1 = real, None = all real."""
        ...


class Host(Protocol):
    """What exits may know of the model they hang on; every `Backbone` is one.

    Exits call its modules and never own them: they are the stock model's.
    """

    depth: int
    poolings: tuple[Pooling, ...]
    pooler: nn.Linear | None
    view: nn.Module | None

    def width(self, number: int) -> int: ...
    def pool(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor: ...
    def answer(self, pooled: Tensor) -> Tensor: ...
    def head(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor: ...


class Exits(nn.ModuleDict):
    """The exits of a model, by the number of their layer, and what they share."""

    remembers = False
    """Exits hand memory on that they all need, so that none before the one asked is skipped."""

    def at(self, layer: int) -> Exit:
        """The exit after `layer`, 1..L-1."""
        return self[str(layer)]

    def full(self, scores: Tensor, hidden: Tensor, carry: Any) -> tuple[ExitOutput, Any]:
        """What is said at full depth beside the stock model's own scores.

        Policies read the same signals there as at an earlier exit.
        """
        return ExitOutput(scores, self.full_signals(scores)), carry

    def full_signals(self, scores: Tensor) -> Mapping[str, Tensor]:
        """Those signals of full depth that follow from its scores, (units, classes)."""
        return {}


class ExitKind(Strict):
    """A kind of exits with its settings: what hangs off layers 1..L-1.

    The exit after layer L is always the stock model's own head. A kind is one file; it is
    registered in `EXITS` under its `kind`.
    """

    kind: ClassVar[str]
    own_answers: ClassVar[bool] = True
    """Exits answer with weights of their own. Where they do not, the model must be trained with
    them and `attach` has nothing to teach."""
    from_nothing: ClassVar[bool] = True
    """Its weights start from nothing and take `head_learning_rate`; else they learn at the rate of
    the model that they belong to."""

    @property
    def cacheable(self) -> bool:
        """Each exit answers from one vector that its training does not change: it has `pool` and
        `read`, as `PooledExit` has. Where the model is frozen the vectors are computed once."""
        return False

    @property
    def rescalable(self) -> bool:
        """Mean and spread of what an exit pools can move into weights of its own, so that it can
        be fitted on standardised vectors."""
        return False

    @property
    def reads(self) -> str:
        """What an exit reads, in words."""
        return self.kind

    def build(self, host: Host, num_scores: int) -> Exits:
        """New exits for a model with `num_scores` classes, labels, or 1 for regression."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.model_dump(mode="json")}


EXITS: Registry[type[ExitKind]] = Registry("exits")


def parse_exits(document: Mapping[str, Any], source: str) -> ExitKind:
    """A kind of exits from JSON data. Raises ConfigError that names `source`."""
    settings = dict(document)
    kind = settings.pop("kind", "pooled")
    if not isinstance(kind, str):
        raise ConfigError(f"{source}: key 'kind' must be one of: {', '.join(EXITS)}.")
    return parse_document(EXITS[kind], settings, source)


class Widened(nn.ModuleDict):
    """Pooled vectors as wide as those that the model's own head reads.

    For each other width of its layers there is a linear layer, shared by all layers of that
    width. Where all have one width there is none, and vectors stay as they are.
    """

    def __init__(self, host: Host) -> None:
        self.width = host.width(host.depth)
        others = {host.width(layer) for layer in range(1, host.depth)} - {self.width}
        super().__init__({str(one): nn.Linear(one, self.width) for one in sorted(others)})

    def forward(self, pooled: Tensor) -> Tensor:
        """(rows, any width) -> (rows, width)."""
        width = str(pooled.shape[-1])
        return self[width](pooled) if width in self else pooled


def start_anew(module: nn.Module) -> nn.Module:
    """Draw the linear layers of a module as transformers does: small weights, no bias."""
    for linear in (part for part in module.modules() if isinstance(part, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    return module
