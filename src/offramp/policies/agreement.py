"""Patience about probabilities instead of answers.

F-PABEE counts exits that say nearly what the one before said; the released code measures the
entropy of the mean instead of the Jensen-Shannon divergence, and compares with an exit that is
yet to come. PCEE-BERT (Findings of NAACL 2022) counts exits that are sure.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from offramp.exits.base import ExitOutput
from offramp.policies.base import POLICIES, EvidencePolicy, Policy, State
from offramp.policies.confidence import Confidence, least, normalised_entropy, questions
from offramp.policies.history import LONGEST, remember, unknown

_MULTI_LABEL = "multi_label_classification"


@POLICIES.register("agreement")
class Agreement(EvidencePolicy):
    """Leave when `patience` exits in a row differ from the one before by less than `threshold`.

    Exits differ by a divergence of their class probabilities, in nats; label sets by the sum of
    those of their labels; regression scores by the absolute difference, which is `patience` with
    a tolerance.

    Args:
        divergence: of the exit before, p, and this one, q: `js` Jensen-Shannon; `kl` KL(p || q);
            `reverse_kl` KL(q || p); `symmetric_kl` the mean of both.
    """

    name = "agreement"
    searched = False
    threshold: float = Field(default=0.01, ge=0)
    patience: int = Field(default=2, ge=1, le=LONGEST)
    divergence: Literal["js", "kl", "reverse_kl", "symmetric_kl"] = "js"
    multi_label: bool = False

    @property
    def bar(self) -> float:
        return -self.threshold

    def with_bar(self, bar: float) -> Self:
        return self._with(threshold=max(-bar, 0.0))

    @classmethod
    def variants(cls, problem_type: str, depth: int) -> list[Policy]:
        longest, multi_label = min(3, depth - 1), problem_type == _MULTI_LABEL
        return [cls(patience=n, multi_label=multi_label) for n in range(1, longest + 1)]

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        scores = output.scores
        if not state:
            changes = unknown(scores, self.patience, torch.inf)
        else:
            changes = remember(state["changes"], self._change(state["scores"], scores))
        return -changes.amax(dim=-1), {"changes": changes, "scores": scores}

    def _change(self, before: Tensor, now: Tensor) -> Tensor:
        if now.shape[-1] == 1 and not self.multi_label:
            return (now - before).abs().squeeze(-1)
        asked = (questions(scores, self.multi_label) for scores in (before, now))
        p, q = (torch.softmax(logits, dim=-1) for logits in asked)
        apart = self._divergence(p, q)
        return apart.sum(dim=-1) if self.multi_label else apart

    def _divergence(self, p: Tensor, q: Tensor) -> Tensor:
        if self.divergence == "kl":
            return kl(p, q)
        if self.divergence == "reverse_kl":
            return kl(q, p)
        if self.divergence == "symmetric_kl":
            return (kl(p, q) + kl(q, p)) / 2
        # not p / ((p + q) / 2): half of the smallest number is 0
        return (_mean_log(p, 2 * p / (p + q)) + _mean_log(q, 2 * q / (p + q))) / 2


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats, (..., classes) -> (...); inf where q rules out what p allows."""
    return _mean_log(p, p / q)


def _mean_log(p: Tensor, ratio: Tensor) -> Tensor:
    """Sum of p log ratio, at least 0; classes with p = 0 do not count."""
    return torch.special.xlogy(p, torch.where(p > 0, ratio, 1)).sum(dim=-1).clamp_min(0)


@POLICIES.register("confident_patience")
class ConfidentPatience(Confidence):
    """Leave when the last `patience` exits each have a normalised entropy below `threshold`.

    Of a label set, the entropy of its least sure label. The exits need not agree.
    """

    name = "confident_patience"
    searched = False
    threshold: float = Field(default=0.2, ge=0)
    patience: int = Field(default=2, ge=1, le=LONGEST)

    @property
    def bar(self) -> float:
        return -self.threshold

    def with_bar(self, bar: float) -> Self:
        return self._with(threshold=max(-bar, 0.0))

    @classmethod
    def variants(cls, problem_type: str, depth: int) -> list[Policy]:
        if problem_type not in cls.problem_types:
            return []
        longest, multi_label = min(3, depth - 1), problem_type == _MULTI_LABEL
        return [cls(patience=n, multi_label=multi_label) for n in range(1, longest + 1)]

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        asked = questions(output.scores, self.multi_label)
        sure = least(-normalised_entropy(torch.softmax(asked, dim=-1)))
        recent = state.get("sure", unknown(sure, self.patience, -torch.inf))
        recent = remember(recent, sure)
        return recent.amin(dim=-1), {"sure": recent}
