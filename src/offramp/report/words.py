"""Policies and prices in words."""

from __future__ import annotations

from collections.abc import Sequence

from offramp.calibration.sentences import short
from offramp.policies import Policy


def series_names(kinds: Sequence[Policy]) -> list[str]:
    """A name for each kind of policy; those of one name are told apart by what differs."""
    names = []
    for kind in kinds:
        alike = [other.to_dict() for other in kinds if other.name == kind.name]
        own = kind.to_dict()
        differs = {key: own[key] for key in own if any(other[key] != own[key] for other in alike)}
        names.append(" ".join([kind.name, *map(short, differs.values())]))
    return names


def money(value: float) -> str:
    """Four digits that count: '0.8985', '12,340'."""
    return f"{float(f'{value:.4g}'):,.10g}"
