"""Leave when the exit believes that it is right, by the signal `correct`."""

from __future__ import annotations

from typing import Self

from pydantic import Field
from torch import Tensor

from offramp.exits.base import ExitOutput
from offramp.policies.base import POLICIES, EvidencePolicy, State


@POLICIES.register("learned")
class Learned(EvidencePolicy):
    """Leave when the learned probability of being right is above `threshold`.

    BERxiT (EACL 2021) learns the uncertainty u = 1 - `correct` and leaves when u is below a
    threshold; for regression u is the expected error, so any task will do.
    """

    name = "learned"
    signals = ("correct",)
    remembers = False
    threshold: float = Field(default=0.9, ge=0)

    @property
    def bar(self) -> float:
        return self.threshold

    def with_bar(self, bar: float) -> Self:
        return self._with(threshold=max(bar, 0.0))

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        return self.signal(output, "correct"), state
