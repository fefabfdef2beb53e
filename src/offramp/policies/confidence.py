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

    def _probabilities(self, scores: Tensor) -> Tensor:
        """(rows, classes), or (rows, labels, 2) where each label is a yes/no question."""
        if self.multi_label:
            # not sigmoid: its vectorised and its scalar code differ in the last bit, so a row
            # would depend on its place in the batch
            scores = torch.stack((torch.zeros_like(scores), scores), dim=-1)
        return torch.softmax(scores, dim=-1)

    def _least_sure(self, evidence: Tensor) -> Tensor:
        return evidence.amin(dim=-1) if self.multi_label else evidence


@POLICIES.register("max_probability")
class MaxProbability(_Confidence):
    """Leave when the largest class probability is above `threshold` (Shallow-Deep, 2019)."""

    name = "max_probability"
    threshold: float = Field(default=0.9, ge=0)

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        best = self._probabilities(output.scores).amax(dim=-1)
        return self._least_sure(best), state


@POLICIES.register("margin")
class Margin(_Confidence):
    """Leave when the two largest class probabilities differ by more than `threshold`."""

    name = "margin"
    threshold: float = Field(default=0.8, ge=0)

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        top = self._probabilities(output.scores).topk(2, dim=-1).values
        return self._least_sure(top[..., 0] - top[..., 1]), state


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

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        probabilities = self._probabilities(output.scores)
        entropy = torch.special.entr(probabilities).sum(dim=-1).clamp_min(0)
        return self._least_sure(-entropy), state
