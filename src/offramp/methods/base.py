"""A method is a paper: a preset that names exits, objective and policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from offramp.errors import ConfigError
from offramp.exits import ExitKind
from offramp.metrics import REGRESSION
from offramp.objectives import Objective
from offramp.policies import POLICIES, Patience
from offramp.registry import Registry


@dataclass(frozen=True, slots=True)
class Method:
    """A preset on the three axes, with the paper's settings.

    Attributes:
        name: what users type.
        paper: title and source.
        exits: as the paper has them; the pooling is measured on the model at hand unless
            the user asks for the paper's (`as_released`).
        objective: makes the training loss.
        policy: name of the paper's exit rule, see `policy_for`.
        problem_types: those it works for.
        why_not: why not for the others, in a sentence; where empty, the policy says it.
        measures_pooling: whether what exits pool is measured, as said; else it is part of the
            method.
    """

    name: str
    paper: str
    exits: ExitKind
    objective: Callable[[], Objective]
    policy: str
    problem_types: tuple[str, ...] = (
        "single_label_classification",
        "multi_label_classification",
        "regression",
    )
    measures_pooling: bool = True
    why_not: str = ""

    def policy_for(self, problem_type: str) -> str:
        """The exit rule for a task: `policy` or, where that reads probabilities and there are
        none, `patience`."""
        fits = problem_type in POLICIES[self.policy].problem_types
        return self.policy if fits or problem_type != REGRESSION else Patience.name

    def check(self, problem_type: str) -> None:
        """Raise ConfigError, with the reason, where the method is not for a task."""
        if problem_type not in self.problem_types:
            fitting = [name for name in METHODS if problem_type in METHODS[name].problem_types]
            why = self.why_not or POLICIES[self.policy].why_not
            raise ConfigError(
                f"Method '{self.name}' does not do {problem_type}. {why + ' ' if why else ''}"
                f"Methods that do: {', '.join(fitting)}."
            )


METHODS: Registry[Method] = Registry("method")
