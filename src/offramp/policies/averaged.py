"""Answer with the average of all exits so far, under any other policy.

The average of scores is, but for a constant per row, that of log-probabilities: a product of
experts (Product Anytime, arXiv 2306.02652, without its ReLU). That of probabilities is a mixture.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import field_serializer, field_validator
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits.base import ExitOutput
from offramp.policies.base import (
    POLICIES,
    EvidencePolicy,
    Policy,
    Rows,
    State,
    has_one_bar,
    make_policy,
)
from offramp.policies.confidence import MaxProbability, questions
from offramp.policies.patience import Patience

_MULTI_LABEL = "multi_label_classification"
_INNER = "inner."


@POLICIES.register("averaged")
class Averaged(EvidencePolicy):
    """Leave as `policy` says, with the average of this exit and all before as the answer.

    It looks at every exit, whatever `policy` reads.

    Args:
        policy: any other, by name or with its options.
        average: of `scores` or, for classification, of `probabilities`.
        decide_on: what `policy` looks at: each `exit`, or the `average` so far.
    """

    name = "averaged"
    searched = False
    policy: Policy
    average: Literal["scores", "probabilities"] = "scores"
    decide_on: Literal["exit", "average"] = "exit"
    multi_label: bool = False

    @field_validator("policy", mode="before")
    @classmethod
    def _build(cls, policy: Any) -> Policy:
        made = make_policy(policy)
        if isinstance(made, Averaged):
            raise ValueError("an average of averages; name the policy inside")
        return made

    @field_serializer("policy")
    def _as_document(self, policy: Policy) -> dict[str, Any]:
        return policy.to_dict()

    @property
    def needs(self) -> tuple[str, ...]:
        return self.policy.needs

    @property
    def bar(self) -> float:
        # of a rule that has not one bar it only knows whether a row leaves
        return self.policy.bar if has_one_bar(self.policy) else 0.5

    @property
    def takes_bars(self) -> bool:
        return has_one_bar(self.policy)

    def with_bar(self, bar: float) -> Self:
        if not has_one_bar(self.policy):
            return self
        return self._with(policy=self.policy.with_bar(bar))

    @classmethod
    def variants(cls, problem_type: str, depth: int) -> list[Policy]:
        inner = Patience if problem_type == "regression" else MaxProbability
        multi_label = problem_type == _MULTI_LABEL
        found = inner.variants(problem_type, depth)
        return [cls(policy=policy, multi_label=multi_label) for policy in found]

    def check(self, problem_type: str, depth: int) -> None:
        super().check(problem_type, depth)
        self.policy.check(problem_type, depth)
        if problem_type == "regression" and self.average == "probabilities":
            raise ConfigError(
                "Policy 'averaged' cannot average probabilities for regression, where there are "
                "none. Set average='scores'."
            )

    def start(self, rows: Rows) -> State:
        return _wrapped(self.policy.start(rows))

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        inner = {n.removeprefix(_INNER): leaf for n, leaf in state.items() if n[:6] == _INNER}
        mean = self._mean(state, layer, output.scores)
        if self.decide_on == "average":
            output = ExitOutput(self._as_scores(mean), output.signals)
        evidence, inner = self._evidence(inner, layer, output)
        return evidence, {"mean": mean, **_wrapped(inner)}

    def answer(self, state: State, output: ExitOutput) -> Tensor:
        return self._as_scores(state["mean"])

    def _evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        policy = self.policy
        if not policy.reads(layer):
            return output.scores.new_full(output.scores.shape[:1], -torch.inf), state
        if has_one_bar(policy):
            return policy.evidence(state, layer, output)
        leave, _, state = policy.step(state, layer, output)
        return leave.float(), state

    def _mean(self, state: State, layer: int, scores: Tensor) -> Tensor:
        """Of the scores (rows, classes), or of the probabilities of what a row is asked."""
        here = scores
        if self.average == "probabilities":
            here = torch.softmax(questions(scores, self.multi_label), dim=-1)
        mean = state.get("mean", here)
        return mean + (here - mean) / layer

    def _as_scores(self, mean: Tensor) -> Tensor:
        """Scores whose softmax, or sigmoid, is the average."""
        if self.average == "scores":
            return mean
        logs = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        return logs[..., 1] - logs[..., 0] if self.multi_label else logs


def _wrapped(state: State) -> State:
    return {f"{_INNER}{name}": leaf for name, leaf in state.items()}
