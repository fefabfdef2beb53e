"""Leave on the size of the scores, not only on their differences.

With x = T logsumexp(f / T) of the scores f, normalised energy is 1 / (1 + exp(x)) (COSEE, arXiv
2412.13236). CAP (arXiv 2506.17249) is the last of softmax(f, alpha * nsp), which is
1 / (1 + exp(x - alpha * nsp)) at T = 1: energy, shifted by how far the row's feature lies
outside the space of the classes.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field
from torch import Tensor

from offramp.exits.base import ExitOutput
from offramp.policies.base import POLICIES, EvidencePolicy, State


class _Below(EvidencePolicy):
    """Leave when a number in 0..1 is below the threshold; evidence is minus that number."""

    problem_types = ("single_label_classification",)
    why_not = "Energy is high where any label is likely, and says nothing of a sure 'none'."
    threshold: float = Field(default=0.1, ge=0)

    @property
    def bar(self) -> float:
        return -self.threshold

    def with_bar(self, bar: float) -> Self:
        return self._with(threshold=max(-bar, 0.0))


@POLICIES.register("energy")
class Energy(_Below):
    """Leave when the normalised energy is below `threshold`.

    For two classes whose scores add up to 0 it orders rows as the largest probability does;
    training has to give the sum a meaning, as COSEE's does.
    """

    name = "energy"
    remembers = False
    searched = False
    temperature: float = Field(default=1.0, gt=0)

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        return -_sigmoid_minus(_size(output.scores, self.temperature)), state


@POLICIES.register("cap")
class Cap(_Below):
    """Leave when CAP is below `threshold`; reads the signal `nsp`.

    Args:
        alpha: weight of `nsp`; at 0 this is `energy`.
    """

    name = "cap"
    remembers = False
    signals = ("nsp",)
    alpha: float = Field(default=0.1, ge=0)

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        size = _size(output.scores, 1.0) - self.alpha * self.signal(output, "nsp")
        return -_sigmoid_minus(size), state


def _size(scores: Tensor, temperature: float) -> Tensor:
    """T logsumexp(scores / T), (rows, classes) -> (rows,).

    Through log_softmax, which works row by row: its vectorised and its scalar code agree.
    """
    largest = torch.log_softmax(scores / temperature, dim=-1).amax(dim=-1)
    return scores.amax(dim=-1) - temperature * largest


def _sigmoid_minus(size: Tensor) -> Tensor:
    """1 / (1 + exp(size)), row by row."""
    return torch.softmax(torch.stack((size, torch.zeros_like(size)), dim=-1), dim=-1)[:, 1]
