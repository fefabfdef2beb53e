"""What the results of a method depend on beside the plan, and how long it is trained."""

from __future__ import annotations

import json
from typing import Any

from offramp.methods import METHODS, Method
from offramp.objectives import Objective
from offramp.storage import fingerprint


def share_of(method: str) -> float:
    """Of the epochs asked for, what the stages after a fine-tune take, all together."""
    objective = METHODS[method].objective()
    objective.fine_tuned = True
    return sum(stage.share for stage in objective.ahead())


def recipe(method: str, problem_type: str) -> str | None:
    """A fingerprint of what a task gets of a method, exits, objective and policy.

    None for what is no method of METHODS.
    """
    if method not in METHODS:
        return None
    made = METHODS[method]
    exits, policy = made.exits_for(problem_type), made.policy_for(problem_type)
    parts = exits.to_dict(), _settings(made.objective()), policy
    return fingerprint(json.dumps(parts, sort_keys=True))


def trained_alike(one: str, other: str) -> bool:
    """Whether two methods differ in their policy alone, so one training serves both."""
    if one not in METHODS or other not in METHODS:
        return one == other
    a, b = METHODS[one], METHODS[other]
    return _trained(a) == _trained(b)


def _trained(method: Method) -> tuple[Any, ...]:
    exits = [
        None if one is None else (type(one), one.to_dict())
        for one in (method.exits, method.number_exits)
    ]
    return *exits, method.measures_pooling, method.objective


def _settings(objective: Objective) -> dict[str, Any]:
    """Class and plain attributes of an objective and its parts, by their place in it."""
    return {
        place: {"class": type(part).__name__, **_plain(vars(part))}
        for place, part in objective.named_modules()
    }


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """What can be written down; `training` is torch's, whatever the method."""
    return {
        name: value
        for name, value in attributes.items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))
