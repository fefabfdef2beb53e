"""A method is a paper: a preset that names exits, objective and policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import Parameter, signature
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from offramp.errors import ConfigError
from offramp.exits import ExitKind
from offramp.metrics import REGRESSION
from offramp.objectives import Objective
from offramp.policies import POLICIES, Patience
from offramp.registry import Registry, nearest
from offramp.storage import parse_document

_FINITE = ConfigDict(allow_inf_nan=False)


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
        number_exits: the exits for regression, where they are others.
        number_policy: the exit rule for regression, where `policy` is not for numbers.
        problem_types: those it works for.
        why_not: why not for the others, in a sentence; where empty, the policy says it.
        measures_pooling: whether what exits pool is measured, as said; else it is part of the
            method.
        released: settings with which its authors' code trains, where that is not what the paper
            says; for whoever asks for `as_released`.
    """

    name: str
    paper: str
    exits: ExitKind
    objective: Callable[[], Objective]
    policy: str
    number_exits: ExitKind | None = None
    number_policy: str = Patience.name
    problem_types: tuple[str, ...] = (
        "single_label_classification",
        "multi_label_classification",
        "regression",
    )
    measures_pooling: bool = True
    why_not: str = ""
    released: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_released(self) -> bool:
        """Whether `as_released` changes anything: how it trains, or what its exits pool."""
        return bool(self.released) or (self.measures_pooling and hasattr(self.exits, "pooling"))

    def exits_for(self, problem_type: str) -> ExitKind:
        """The exits for a task."""
        other = self.number_exits if problem_type == REGRESSION else None
        return self.exits if other is None else other

    def policy_for(self, problem_type: str) -> str:
        """The exit rule for a task: `policy` or, where that reads probabilities and there are
        none, `number_policy`."""
        fits = problem_type in POLICIES[self.policy].problem_types
        return self.policy if fits or problem_type != REGRESSION else self.number_policy

    def check(self, problem_type: str) -> None:
        """Raise ConfigError, with the reason, where the method is not for a task."""
        if problem_type not in self.problem_types:
            fitting = [name for name in METHODS if problem_type in METHODS[name].problem_types]
            why = self.why_not or POLICIES[self.policy].why_not
            raise ConfigError(
                f"Method '{self.name}' does not do {problem_type}. {why + ' ' if why else ''}"
                f"Methods that do: {', '.join(fitting)}."
            )

    def with_settings(self, settings: Mapping[str, Any]) -> Method:
        """The method with other settings than the paper's.

        Args:
            settings: parameters of its exits or of its objective, by name.

        Raises:
            ConfigError: neither has such a parameter, or it does not take the value.
        """
        if not settings:
            return self
        exits, wanted = type(self.exits), _parameters(self.objective)
        fields = [name for name in exits.model_fields if name != "pooling"]
        for name in settings:
            if name not in (*fields, *wanted):
                known = [*fields, *wanted]
                raise ConfigError(
                    f"Method '{self.name}' has no setting '{name}'.{nearest(name, known)} "
                    f"It has: {', '.join(known) or 'none'}."
                )
        of_exits = {name: value for name, value in settings.items() if name in fields}
        of_loss = {name: value for name, value in settings.items() if name in wanted}
        return replace(
            self,
            exits=self._with(self.exits, of_exits),
            number_exits=self.number_exits and self._with(self.number_exits, of_exits),
            objective=partial(self.objective, **self._checked(of_loss, wanted)),
        )

    def _with(self, exits: ExitKind, settings: Mapping[str, Any]) -> ExitKind:
        whole = {**exits.model_dump(), **settings}
        return parse_document(type(exits), whole, f"Exits of method '{self.name}'")

    def _checked(self, given: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
        checked = {}
        for name, value in given.items():
            if isinstance(value, bool) and types[name] in (int, float):
                raise ConfigError(f"Method '{self.name}': setting '{name}' is a number.")
            try:
                checked[name] = TypeAdapter(types[name], config=_FINITE).validate_python(value)
            except ValidationError as problem:
                what = problem.errors()[0]["msg"]
                raise ConfigError(f"Method '{self.name}': setting '{name}': {what}.") from None
        return checked


def _parameters(objective: Callable[[], Objective]) -> dict[str, Any]:
    """Of what makes an objective, by name, with their types."""
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    try:
        found = signature(objective, eval_str=True).parameters.values()
    except NameError as problem:
        raise ConfigError(
            f"The types of the settings of {objective} are unknown: {problem}."
        ) from None
    return {
        one.name: Any if one.annotation is Parameter.empty else one.annotation
        for one in found
        if one.kind in named
    }


METHODS: Registry[Method] = Registry("method")
