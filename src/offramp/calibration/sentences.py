"""Policies in words, and what a search says to its user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from offramp.calibration.certificate import Certificate
from offramp.calibration.conformal import Sets
from offramp.calibration.judge import Outcome
from offramp.calibration.target import Target
from offramp.policies import PerExit, Policy

FEW_ROWS = 50


def choice(target: Target, chosen: Outcome, baseline: Sequence[Outcome]) -> list[str]:
    """The choice with its figures, and what leaving at one fixed layer would have given."""
    lines = [f"Chosen for a {target}: {_describe(chosen)}."]
    affordable = [outcome for outcome in baseline if outcome.cost <= chosen.cost]
    if affordable:
        best = min(affordable, key=lambda outcome: outcome.loss)
        lines.append(f"For comparison, everyone leaving at one layer: {_describe(best)}.")
    return lines


def refusal(target: Target, best: Outcome | None, tried: Sequence[Outcome]) -> list[str]:
    """Why the point is full depth.

    Args:
        best: what met the target best, if anything did.
    """
    lines = [
        f"Early exit will not pay for this model at this target ({target}); "
        "the point is full depth."
    ]
    if best is None:
        cheapest = min(tried, key=lambda outcome: (outcome.cost, outcome.loss))
        lines.append(f"No candidate meets it; the cheapest is {_describe(cheapest)}.")
        return lines
    lines.append(f"The best candidate that meets it is {_describe(best)}.")
    cheaper = [outcome for outcome in tried if outcome.cost < best.cost]
    if cheaper:
        nearest = min(cheaper, key=lambda outcome: outcome.loss)
        lines.append(f"The best that costs less is {_describe(nearest)}.")
    return lines


def promise(target: Target, chosen: Outcome, certificate: Certificate) -> list[str]:
    """What is promised, and what it was chosen for."""
    hangs_on = certificate.hangs_on()
    said = [f"Chosen for a {target}: {_describe(chosen)}.", certificate.words()]
    return said if hangs_on is None else [*said, hangs_on]


def no_promise(
    target: Target, certificate: Certificate, needed: int | None, sets: bool = False
) -> list[str]:
    """Why the point is full depth, and how many rows might change that.

    Args:
        needed: rows of the proof; 0 where none would do, None where there is nothing to prove.
        sets: half of the rows given serve these.
    """
    rows, hangs_on = certificate.rows, certificate.hangs_on()
    head = f"No early exit is certified for a {target} with {rows:,} rows; the point is full depth."
    if needed is None:
        why = "No policy saves 5%, whatever it loses."
    elif not needed:
        why = "What rows lose is too near the limit; allow more, or train better exits."
    elif needed <= rows:
        why = f"About {needed:,} rows of the proof can do, but do not always: give more."
    else:
        why = f"It would take about {needed:,} rows for the proof alone, and more to be safe"
        why += "; sets take as many again." if sets else "."
    return [head, why] if hangs_on is None else [head, why, hangs_on]


def proof(
    searched: int, proven: int, excluded: int, repeated: int = 0, sets: Sets | None = None
) -> list[str]:
    """What the promise rests on.

    Args:
        repeated: rows of the proof that have the input of another.
    """
    lines = [f"Searched on {searched:,} rows, proven on {proven:,} others; figures are of these."]
    if excluded:
        lines.append(
            f"{excluded} rows with NaN or infinite scores were left out; nothing is promised for "
            "such rows."
        )
    if repeated:
        lines.append(
            f"{repeated} rows of the proof repeat the input of another. If a row was recorded "
            "twice, drop one of the two: the proof counts both."
        )
    return [*lines, *_of_sets(sets)]


def cautions(rows: int, excluded: int, sets: Sets | None = None) -> list[str]:
    """What the figures rest on."""
    lines = []
    if excluded:
        lines.append(f"{excluded} rows with NaN or infinite scores were left out.")
    if rows < FEW_ROWS:
        lines.append(f"{rows} rows are too few to choose on; use at least {FEW_ROWS}.")
    return [
        *lines,
        *_of_sets(sets),
        f"This is a choice on {rows} rows, not a guarantee for others.",
    ]


def _of_sets(sets: Sets | None) -> list[str]:
    if sets is None:
        return []
    return [
        f"{sets.rows} other rows say how large sets must be to hold the right class for "
        f"{sets.share:g} of rows: {sets.size:.2f} classes on average."
    ]


def _describe(outcome: Outcome) -> str:
    """'entropy 0.12: cost reduction 1.90x, accuracy 0.9210 (full depth 0.9280), ...'."""
    text = f"{_name(outcome.policy)}: cost reduction {outcome.cost_reduction:.2f}x, "
    if outcome.score is not None:
        text += f"{outcome.metric} {outcome.score:.4f} (full depth {outcome.full_score:.4f}), "
    return text + f"disagreement {outcome.disagreement:.4f}"


def _name(policy: Policy) -> str:
    """'patience 3', 'entropy 0.12', 'averaged margin 0.3 scores exit'."""
    words = [policy.name]
    for _, value in policy:
        if isinstance(value, Policy):
            words.append(value.name if isinstance(policy, PerExit) else _name(value))
        elif type(value) in (int, float, str):
            words.append(f"{value:g}" if type(value) is not str else value)
    return " ".join(words)


def options_text(policy: Mapping[str, Any]) -> str:
    """'threshold 0.12', or nothing; fitted numbers, which are many, are left out."""
    if policy["name"] == PerExit.name:  # what it looks at has a bar that is not looked at
        return f"{policy['policy']['name']}, a bar for each exit"
    return ", ".join(
        f"{name} {short(value)}"
        for name, value in policy.items()
        if name != "name" and value is not None and not isinstance(value, bool | list | tuple)
    )


def policy_text(policy: Mapping[str, Any]) -> str:
    """'entropy (threshold 0.12)'."""
    said = options_text(policy)
    return f"{policy['name']} ({said})" if said else str(policy["name"])


def short(value: Any) -> str:
    """Four digits of a number that has them."""
    if isinstance(value, Mapping):
        return policy_text(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
