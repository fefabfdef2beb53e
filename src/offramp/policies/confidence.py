"""Leave when one exit is sure: maximum probability, margin, entropy.

Multi-label scores are independent yes/no questions, so a row is as sure as its least sure
label. Softmax is shifted by the largest logit and entropies are clamped at 0, so saturated
logits leave at the first exit instead of turning into NaN.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field
from torch import Tensor

from offramp.exits.base import ExitOutput
from offramp.policies.base import POLICIES, EvidencePolicy, Policy, State


class _Confidence(EvidencePolicy):
    problem_types = ("single_label_classification", "multi_label_classification")
    multi_label: bool = False
    threshold: float = Field(ge=0)

    @property
    def bar(self) -> float:
        return self.threshold

    def with_bar(self, bar: float) -> Self:
        return self._with(threshold=max(bar, 0.0))

    @classmethod
    def variants(cls, problem_type: str, depth: int) -> list[Policy]:
        if problem_type not in cls.problem_types:
            return []
        options = {"multi_label": problem_type == "multi_label_classification"}
        return [cls.model_validate(options)]

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        if not self.multi_label:
            return self._sureness(torch.softmax(output.scores, dim=-1)), state
        # each label is a yes/no question; not sigmoid: its vectorised and its scalar code
        # differ in the last bit, so a row would depend on its place in the batch
        questions = torch.stack((torch.zeros_like(output.scores), output.scores), dim=-1)
        return self._sureness(torch.softmax(questions, dim=-1)).amin(dim=-1), state

    def _sureness(self, probabilities: Tensor) -> Tensor:
        """(..., classes) -> (...), larger where the answer is clearer."""
        raise NotImplementedError


@POLICIES.register("max_probability")
class MaxProbability(_Confidence):
    """Leave when the largest class probability is above `threshold` (Shallow-Deep, 2019)."""

    name = "max_probability"
    threshold: float = Field(default=0.9, ge=0)

    def _sureness(self, probabilities: Tensor) -> Tensor:
        return probabilities.amax(dim=-1)


@POLICIES.register("margin")
class Margin(_Confidence):
    """Leave when the two largest class probabilities differ by more than `threshold`."""

    name = "margin"
    threshold: float = Field(default=0.8, ge=0)

    def _sureness(self, probabilities: Tensor) -> Tensor:
        top = probabilities.topk(2, dim=-1).values
        return top[..., 0] - top[..., 1]


@POLICIES.register("entropy")
class Entropy(_Confidence):
    """Leave when the entropy of the class probabilities, in nats, is below `threshold`.

    Source: DeeBERT, arXiv 2004.12993, section 3.3. Evidence is minus the entropy.
    """

    name = "entropy"
    threshold: float = Field(default=0.1, ge=0)

    @property
    def bar(self) -> float:
        return -self.threshold

    def with_bar(self, bar: float) -> Self:
        return self._with(threshold=max(-bar, 0.0))

    def _sureness(self, probabilities: Tensor) -> Tensor:
        return -torch.special.entr(probabilities).sum(dim=-1).clamp_min(0)
