"""A bar of its own for each exit, under any other policy's evidence."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, field_serializer, field_validator
from torch import Tensor

from offramp.exits.base import ExitOutput
from offramp.policies.base import (
    NEVER,
    POLICIES,
    EvidencePolicy,
    Policy,
    Rows,
    State,
    Step,
    has_one_bar,
    make_policy,
    of_exit,
)
from offramp.policies.confidence import MaxProbability
from offramp.policies.fixed import Fixed, Full
from offramp.policies.patience import Patience


@POLICIES.register("per_exit")
class PerExit(EvidencePolicy):
    """Leave where the evidence of `policy` is above the bar of the exit.

    `offramp.calibration.per_exit_path` finds bars that go well together. Its own evidence is yes
    or no, so there is nothing to sweep.

    Args:
        policy: one with a bar, which is not looked at, by name or with its options.
        bars: one for each exit before the last, or one for all; at None nobody leaves, and the
            exit is not evaluated, unless `policy` remembers what exits say.
    """

    name = "per_exit"
    searched = False
    policy: EvidencePolicy = MaxProbability()
    bars: tuple[float | None, ...] = Field(default=(0.9,), min_length=1)

    @field_validator("policy", mode="before")
    @classmethod
    def _build(cls, policy: Any) -> EvidencePolicy:
        made = make_policy(policy)
        if has_one_bar(made) and not isinstance(made, Fixed | Full):  # these say nothing of an exit
            return made
        raise ValueError(f"'{made.name}' does not leave by evidence above one bar")

    @field_serializer("policy")
    def _as_document(self, policy: EvidencePolicy) -> dict[str, Any]:
        return policy.to_dict()

    @property
    def needs(self) -> tuple[str, ...]:
        return self.policy.needs

    @property
    def bar(self) -> float:
        return 0.5

    def bar_at(self, layer: int) -> float:
        bar = of_exit(self.bars, layer)
        return NEVER if bar is None else bar

    def without_bars(self) -> Self:
        return self._with(policy=self.policy.without_bars(), bars=(None,))

    def with_bar(self, bar: float) -> Self:
        return self

    @classmethod
    def variants(cls, problem_type: str, depth: int) -> list[Policy]:
        inner = Patience if problem_type == "regression" else MaxProbability
        starts = inner.variants(problem_type, depth)
        bars = [(one, one.bar) for one in starts if isinstance(one, EvidencePolicy)]
        return [cls(policy=one, bars=(bar,)) for one, bar in bars]

    def check(self, problem_type: str, depth: int) -> None:
        super().check(problem_type, depth)
        self.policy.check(problem_type, depth)
        self._check_per_exit("bars", self.bars, depth)

    def reads(self, layer: int) -> bool:
        """Not where nobody leaves, unless what is said there counts later."""
        wanted = self.policy.remembers or of_exit(self.bars, layer) is not None
        return wanted and self.policy.reads(layer)

    def start(self, rows: Rows) -> State:
        return self.policy.start(rows)

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        evidence, state = self.policy.evidence(state, layer, output)
        return (evidence > self.bar_at(layer)).float(), state

    def step_at(self, bar: float | Tensor, state: State, layer: int, output: ExitOutput) -> Step:
        return self.policy.step_at(bar, state, layer, output)

    def answer(self, state: State, output: ExitOutput) -> Tensor:
        return self.policy.answer(state, output)
