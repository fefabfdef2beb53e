"""Leave when an exit is sure, or when the last few exits were at one (ELBERT, arXiv 2107.00175).

The paper's second stage is for two classes, of which it follows one probability s and asks
whether it stayed above 1/2 + margin or below 1/2 - margin. Here it follows the answer: its
probability p and its lead over the best other class, which is above 2 margin in the same case.
So it is defined for any number of classes; of a label set, the least sure label counts.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from offramp.exits.base import ExitOutput
from offramp.policies.base import POLICIES, Policy, State
from offramp.policies.confidence import Confidence, least, normalised_entropy, questions
from offramp.policies.history import LONGEST, answers, remember, same, unknown

Rule = Literal["bias_1", "bias_2", "bias_3", "entropy"]


@POLICIES.register("window")
class Window(Confidence):
    """Leave when the normalised entropy is below `threshold`, or else by the last exits.

    Args:
        rule: on the last `window` exits, which must all give the same answer with a lead above
            2 `margin`. `bias_1` asks no more; `bias_2` that the probability of the answer never
            falls; `bias_3` that it stays within `spread`. `entropy` has no such second stage.
        window: exits looked at, this one among them.
    """

    name = "window"
    searched = False
    threshold: float = Field(default=0.4, ge=0)
    rule: Rule = "bias_1"
    window: int = Field(default=8, ge=1, le=LONGEST)
    margin: float = Field(default=0.0, ge=0, lt=0.5)
    spread: float = Field(default=0.3, ge=0)

    @property
    def bar(self) -> float:
        return -self.threshold

    def with_bar(self, bar: float) -> Self:
        return self._with(threshold=max(-bar, 0.0))

    @classmethod
    def variants(cls, problem_type: str, depth: int) -> list[Policy]:
        """The paper's eight of 24 layers, as a third of the depth."""
        if problem_type not in cls.problem_types:
            return []
        window, multi_label = max(2, depth // 3), problem_type == "multi_label_classification"
        rules: tuple[Rule, ...] = ("bias_1", "bias_2", "bias_3")
        return [cls(rule=rule, window=window, multi_label=multi_label) for rule in rules]

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        asked = questions(output.scores, self.multi_label)
        probabilities = torch.softmax(asked, dim=-1)
        sure = least(-normalised_entropy(probabilities))
        if self.rule == "entropy":
            return sure, state
        state = self._remember(state, probabilities, answers(output.scores, self.multi_label))
        return torch.where(self._at_one(state), torch.inf, sure), state

    def _remember(self, state: State, probabilities: Tensor, answer: Tensor) -> State:
        top = probabilities.topk(2, dim=-1).values
        lead, top = least(top[..., 0] - top[..., 1]), least(top[..., 0])
        leads = state.get("leads", unknown(lead, self.window, -torch.inf))
        tops = state.get("tops", unknown(top, self.window, 0.0))
        if state:
            # an exit with another answer is as good as none
            leads = leads.masked_fill(~same(answer, state["answer"]).unsqueeze(1), -torch.inf)
        return {"answer": answer, "leads": remember(leads, lead), "tops": remember(tops, top)}

    def _at_one(self, state: State) -> Tensor:
        """Where the second stage lets a row leave, (rows,)."""
        tops = state["tops"]
        together = (state["leads"] > 2 * self.margin).all(dim=-1)
        if self.rule == "bias_2":
            together = together & (tops[:, 1:] >= tops[:, :-1]).all(dim=-1)
        if self.rule == "bias_3":
            together = together & (tops.amax(dim=-1) - tops.amin(dim=-1) <= self.spread)
        return together
