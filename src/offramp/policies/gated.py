"""Leave by the gate that exits give as the signal `gate` (JEI-DNN, arXiv 2310.09163)."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from offramp.exits.base import ExitOutput
from offramp.policies.base import POLICIES, EvidencePolicy, Policy, State


@POLICIES.register("gated")
class Gated(EvidencePolicy):
    """Leave when the probability of leaving here, if one has come so far, is above `threshold`.

    Args:
        threshold: the paper's is 0.5.
        masses: how gates g_1, g_2, ... become the probability P_i of leaving at exit i.
            `cut`: the paper's P_i = min(g_i, what earlier gates left of 1), so the condition
            is g_i / (1 - sum of earlier gates). `simplex`: P_i = g_i times the probability of
            not having left, so the condition is g_i itself.
    """

    name = "gated"
    signals = ("gate",)
    threshold: float = Field(default=0.5, ge=0)
    masses: Literal["cut", "simplex"] = "cut"

    @property
    def bar(self) -> float:
        return self.threshold

    def with_bar(self, bar: float) -> Self:
        return self._with(threshold=max(bar, 0.0))

    @classmethod
    def variants(cls, problem_type: str, depth: int) -> list[Policy]:
        """Exits may have been trained for either."""
        fits = problem_type in cls.problem_types
        return [cls(), cls(masses="simplex")] if fits else []

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        gate = self.signal(output, "gate")
        if self.masses == "simplex":
            return gate, state
        left = state.get("left", torch.ones_like(gate))
        # where nothing is left there is no mass, not 0 / 0
        leaving = torch.where(left > 0, (gate / left).clamp(max=1), 0)
        return leaving, {"left": (left - gate).clamp_min(0)}
