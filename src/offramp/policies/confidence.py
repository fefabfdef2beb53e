"""Leave when one exit is sure: maximum probability, margin, entropy.

Multi-label scores are independent yes/no questions, so a row is as sure as its least sure
label. Softmax is shifted by the largest logit and entropies are clamped at 0, so saturated
logits leave at the first exit instead of turning into NaN.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from pydantic import Field
from torch import Tensor

from offramp.exits.base import ExitOutput
from offramp.policies.base import POLICIES, EvidencePolicy, Policy, State


def questions(scores: Tensor, multi_label: bool) -> Tensor:
    """Logits of what a row is asked: (rows, classes), or (rows, labels, 2) with no and yes.

    Not sigmoid: its vectorised and its scalar code differ in the last bit, so a row would
    depend on its place in the batch.
    """
    return torch.stack((torch.zeros_like(scores), scores), dim=-1) if multi_label else scores


def least(sureness: Tensor) -> Tensor:
    """(rows,) stays, (rows, labels) becomes that of the least sure label."""
    return sureness if sureness.dim() == 1 else sureness.amin(dim=-1)


def lead(probabilities: Tensor) -> Tensor:
    """Of the largest over the next, (..., classes) -> (...)."""
    top = probabilities.topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def entropy_of(probabilities: Tensor) -> Tensor:
    """Entropy in nats, (..., classes) -> (...)."""
    return torch.special.entr(probabilities).sum(dim=-1).clamp_min(0)


def normalised_entropy(probabilities: Tensor) -> Tensor:
    """Entropy as a share of its largest value, ln C; (..., classes) -> (...)."""
    return entropy_of(probabilities) / math.log(probabilities.shape[-1])


class Confidence(EvidencePolicy):
    """What rules on the class probabilities of one exit share."""

    problem_types = ("single_label_classification", "multi_label_classification")
    why_not = "A number has no class probabilities to be sure of."
    remembers = False
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
        if not self.multi_label:  # what follows would be the same, with two calls more
            return self._sureness(torch.softmax(output.scores, dim=-1)), state
        asked = questions(output.scores, self.multi_label)
        return least(self._sureness(torch.softmax(asked, dim=-1))), state

    def _sureness(self, probabilities: Tensor) -> Tensor:
        """(..., classes) -> (...), larger where the answer is clearer."""
        raise NotImplementedError


@POLICIES.register("max_probability")
class MaxProbability(Confidence):
    """Leave when the largest class probability is above `threshold` (Shallow-Deep, 2019)."""

    name = "max_probability"
    threshold: float = Field(default=0.9, ge=0)

    def _sureness(self, probabilities: Tensor) -> Tensor:
        return probabilities.amax(dim=-1)


@POLICIES.register("margin")
class Margin(Confidence):
    """Leave when the two largest class probabilities differ by more than `threshold`."""

    name = "margin"
    threshold: float = Field(default=0.8, ge=0)

    def _sureness(self, probabilities: Tensor) -> Tensor:
        return lead(probabilities)


@POLICIES.register("entropy")
class Entropy(Confidence):
    """Leave when the entropy of the class probabilities is below `threshold`.

    Source: DeeBERT, arXiv 2004.12993, section 3.3. Evidence is minus the entropy.

    Args:
        threshold: in nats.
        normalised: entropy and threshold are a share of the largest entropy there is, ln C nats
            for C classes: the "speed" of FastBERT, arXiv 2004.02178, equation 7.
    """

    name = "entropy"
    threshold: float = Field(default=0.1, ge=0)
    normalised: bool = False

    @property
    def bar(self) -> float:
        return -self.threshold

    def with_bar(self, bar: float) -> Self:
        return self._with(threshold=max(-bar, 0.0))

    def _sureness(self, probabilities: Tensor) -> Tensor:
        if self.normalised:
            return -normalised_entropy(probabilities)
        return -entropy_of(probabilities)
