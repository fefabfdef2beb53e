"""Depths that do not look at the input: one layer for everyone, or all layers."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits.base import ExitOutput
from offramp.policies.base import NEVER, POLICIES, EvidencePolicy, Policy, State


@POLICIES.register("fixed")
class Fixed(EvidencePolicy):
    """Everyone leaves after `layer`: the honest baseline of every early exit."""

    name = "fixed"
    layer: int = Field(ge=1)

    @property
    def bar(self) -> float:
        return self.layer - 0.5

    def with_bar(self, bar: float) -> Self:
        return self._with(layer=max(1, int(bar // 1) + 1))

    @classmethod
    def variants(cls, problem_type: str, depth: int) -> list[Policy]:
        return [cls(layer=1)]

    def check(self, problem_type: str, depth: int) -> None:
        super().check(problem_type, depth)
        if self.layer > depth:
            raise ConfigError(
                f"Policy 'fixed' leaves after layer {self.layer}, but the model has {depth} "
                f"layers. Give a layer from 1 to {depth}."
            )

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        rows = output.scores.shape[0]
        return torch.full((rows,), float(layer), device=output.scores.device), state

    def reads(self, layer: int) -> bool:
        return layer >= self.layer


@POLICIES.register("full")
class Full(EvidencePolicy):
    """Nobody leaves early: every row is answered at full depth."""

    name = "full"

    @property
    def bar(self) -> float:
        return NEVER

    def with_bar(self, bar: float) -> Self:
        return self

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        rows = output.scores.shape[0]
        return torch.zeros(rows, device=output.scores.device), state

    def reads(self, layer: int) -> bool:
        return False
