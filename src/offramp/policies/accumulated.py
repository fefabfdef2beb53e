"""Leave when the sureness of exits with the same answer adds up (BEEM, arXiv 2502.00745)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from offramp.exits.base import ExitOutput
from offramp.policies.base import POLICIES, State, of_exit
from offramp.policies.confidence import Confidence, least, questions
from offramp.policies.history import answers, same

Weight = Annotated[float, Field(ge=0)]


@POLICIES.register("accumulated")
class Accumulated(Confidence):
    """Leave when S_i is above `threshold`.

    S_i = w_i c_i, plus S_(i-1) while the answer is that of the exit before, where c_i is the
    largest class probability (of a label set, that of its least sure label).

    Args:
        weights: w_i. `depth` is i, as deeper exits deserve more trust; `equal` is 1; else one
            number for each exit before the last.
    """

    name = "accumulated"
    searched = False
    threshold: float = Field(default=10.0, ge=0)
    weights: Literal["depth", "equal"] | Annotated[tuple[Weight, ...], Field(min_length=1)] = (
        "depth"
    )

    def check(self, problem_type: str, depth: int) -> None:
        super().check(problem_type, depth)
        if not isinstance(self.weights, str):
            self._check_per_exit("weights", self.weights, depth)

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        asked = questions(output.scores, self.multi_label)
        here = self._weight(layer) * least(torch.softmax(asked, dim=-1).amax(dim=-1))
        answer = answers(output.scores, self.multi_label)
        if state:
            here = here + state["sum"] * same(answer, state["answer"])
        return here, {"sum": here, "answer": answer}

    def _weight(self, layer: int) -> float:
        if isinstance(self.weights, str):
            return float(layer) if self.weights == "depth" else 1.0
        return float(of_exit(self.weights, layer))
