"""The record between exits and everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


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
    """A module that answers at a layer.

    `carry` is memory handed from exit to exit (None where an exit needs none); it is a
    tensor or a dict of tensors whose first axis is the unit, so that rows can leave.
    """

    def __call__(
        self, hidden: Tensor, mask: Tensor | None, carry: Any = None
    ) -> tuple[ExitOutput, Any]:
        """hidden: (rows, tokens, width); mask: (rows, tokens), 1 = real, None = all real."""
        ...
