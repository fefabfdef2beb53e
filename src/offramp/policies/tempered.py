"""Leave on how sure an exit is after temperature scaling.

Source: Guo et al., arXiv 1706.04599. One temperature for each exit, so that one threshold means
the same at every exit; `offramp.calibration.fit_temperatures` fits them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from offramp.exits.base import ExitOutput
from offramp.policies.base import POLICIES, State, of_exit
from offramp.policies.confidence import Confidence, lead, least, normalised_entropy, questions

Temperature = Annotated[float, Field(gt=0)]


@POLICIES.register("tempered")
class Tempered(Confidence):
    """Leave when softmax(scores / temperature) is sure enough: above `threshold`.

    Args:
        temperatures: one for each exit before the last, or one for all.
        measure: `probability`, the largest; `margin`, its lead; `certainty`, 1 - the normalised
            entropy.
    """

    name = "tempered"
    remembers = False
    searched = False
    threshold: float = Field(default=0.9, ge=0)
    temperatures: tuple[Temperature, ...] = Field(default=(1.0,), min_length=1)
    measure: Literal["probability", "margin", "certainty"] = "probability"

    def check(self, problem_type: str, depth: int) -> None:
        super().check(problem_type, depth)
        self._check_per_exit("temperatures", self.temperatures, depth)

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        asked = questions(output.scores / of_exit(self.temperatures, layer), self.multi_label)
        return least(self._sureness(torch.softmax(asked, dim=-1))), state

    def _sureness(self, probabilities: Tensor) -> Tensor:
        if self.measure == "certainty":
            return 1 - normalised_entropy(probabilities)
        return lead(probabilities) if self.measure == "margin" else probabilities.amax(dim=-1)
