"""Leave where exits like this one, as sure as this, were right often enough.

Source: performance control, arXiv 2412.19325. `offramp.calibration.fit_bins` measures how often.
"""

from __future__ import annotations

from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from offramp.exits.base import ExitOutput
from offramp.policies.base import POLICIES, EvidencePolicy, Policy, State, of_exit
from offramp.policies.confidence import least, questions

Share = Annotated[float, Field(ge=0, le=1)]
Bins = Annotated[tuple[tuple[Share, ...], ...], Field(min_length=1)]


@POLICIES.register("binned")
class Binned(EvidencePolicy):
    """Leave when the accuracy of the bin that the exit's confidence falls in is above `target`.

    Confidence is the largest class probability (of a label set, that of its least sure label).
    Where accuracy was not measured it is taken to be the confidence, in ten equal bins.

    Args:
        target: accuracy wanted; as everywhere here it must be passed, where PCEE lets a bin leave
            that just reaches it.
        edges: between bins, for each exit before the last, or once for all exits; a confidence
            equal to an edge is in the bin below it.
        accuracy: of the bins, one more than edges.
    """

    name = "binned"
    problem_types = ("single_label_classification", "multi_label_classification")
    why_not = "A number has no class probabilities, and is neither right nor wrong."
    searched = False
    remembers = False
    target: float = Field(default=0.9, ge=0)
    edges: Bins = (tuple(tenth / 10 for tenth in range(1, 10)),)
    accuracy: Bins = (tuple(tenth / 20 for tenth in range(1, 20, 2)),)
    multi_label: bool = False

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if [len(one) + 1 for one in self.edges] != [len(one) for one in self.accuracy]:
            raise ValueError("each exit needs one accuracy more than edges")
        if any(list(one) != sorted(one) for one in self.edges):
            raise ValueError("edges must ascend")
        return self

    @property
    def bar(self) -> float:
        return self.target

    def with_bar(self, bar: float) -> Self:
        return self._with(target=max(bar, 0.0))

    @classmethod
    def variants(cls, problem_type: str, depth: int) -> list[Policy]:
        if problem_type not in cls.problem_types:
            return []
        return [cls(multi_label=problem_type == "multi_label_classification")]

    def check(self, problem_type: str, depth: int) -> None:
        super().check(problem_type, depth)
        self._check_per_exit("edges", self.edges, depth)

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        asked = questions(output.scores, self.multi_label)
        confidence = least(torch.softmax(asked, dim=-1).amax(dim=-1))
        edges = confidence.new_tensor(of_exit(self.edges, layer))
        accuracy = confidence.new_tensor(of_exit(self.accuracy, layer))
        return accuracy[torch.bucketize(confidence, edges)], state
