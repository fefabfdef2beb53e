"""Policies in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from offramp.policies import Policy


def options_text(policy: Mapping[str, Any]) -> str:
    """'threshold 0.12', or nothing."""
    return ", ".join(
        f"{name} {_short(value)}"
        for name, value in policy.items()
        if name != "name" and value is not None and not isinstance(value, bool)
    )


def policy_text(policy: Mapping[str, Any]) -> str:
    """'entropy (threshold 0.12)'."""
    said = options_text(policy)
    return f"{policy['name']} ({said})" if said else str(policy["name"])


def series_names(kinds: Sequence[Policy]) -> list[str]:
    """A name for each kind of policy; those of one name are told apart by what differs."""
    names = []
    for kind in kinds:
        alike = [other.to_dict() for other in kinds if other.name == kind.name]
        own = kind.to_dict()
        differs = {key: own[key] for key in own if any(other[key] != own[key] for other in alike)}
        names.append(" ".join([kind.name, *map(_short, differs.values())]))
    return names


def money(value: float) -> str:
    """Four digits that count: '0.8985', '12,340'."""
    return f"{float(f'{value:.4g}'):,.10g}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
