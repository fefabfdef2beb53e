"""What several commands print alike: policies, outcomes, speeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from offramp.cli import console

if TYPE_CHECKING:
    from offramp.calibration import Outcome
    from offramp.calibration.conformal import Covered
    from offramp.evaluation import Speed
    from offramp.evaluation.scoring import Promised


def policy_text(policy: Mapping[str, Any]) -> str:
    """'entropy (threshold 0.12)'."""
    from offramp.calibration.sentences import policy_text

    return policy_text(policy)


def outcome_facts(outcome: Outcome, problem_type: str) -> dict[str, str]:
    """Scores, cost and disagreement of a policy."""
    facts = {}
    if outcome.score is not None and outcome.full_score is not None:
        facts["full depth"] = f"{outcome.metric} {outcome.full_score:.4f}"
        facts["at the point"] = f"{outcome.metric} {outcome.score:.4f}"
    if problem_type == "regression":
        said = f"{outcome.disagreement:.4f} standard deviations from full depth"
    else:
        said = f"{outcome.disagreement:.2%} of the answers differ from full depth"
    return {
        **facts,
        "disagreement": said,
        "cost": f"{outcome.cost:.1%} of the FLOPs of full depth",
        "cost reduction": f"{outcome.cost_reduction:.2f}x",
    }


def sets_facts(sets: Covered | None) -> dict[str, str]:
    """How often sets of classes hold the right one."""
    if sets is None:
        return {}
    return {
        "sets": f"hold the right class for {sets.covered:.1%} of rows (asked: {sets.asked:.4g}), "
        f"{sets.size:.2f} classes on average"
    }


def promise_facts(promised: Promised | None) -> dict[str, str]:
    """What the point promises, beside what the rows given lose."""
    if promised is None:
        return {}
    from offramp.calibration.certificate import percent

    loss = "not known" if promised.loss is None else f"{promised.loss:.2%}"
    here = f"{loss} in the rows given here"
    return {"promised": f"at most {percent(promised.limit)}; {here}", "promise": promised.claim}


def speed_facts(speed: Speed) -> dict[str, str]:
    """Wall clock, beside what the cost would allow."""
    low, high = speed.interval
    slower = ", slower than full depth" if high < 1 else ""
    return {
        "speed-up": f"{speed.speed_up:.2f}x measured{slower} "
        f"(95 % interval {low:.2f} to {high:.2f})",
        "ideal": f"{speed.ideal:.2f}x on these rows; {speed.realised_share:.0%} of it is realised",
        "timed": f"{speed.rows} rows, {speed.passes} interleaved passes; full depth "
        f"({speed.full_is}) {_seconds(speed.full_seconds)}, early exit "
        f"{_seconds(speed.early_seconds)}",
    }


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def speed_json(speed: Speed | None) -> dict[str, Any] | None:
    """The figures of a speed, ready for JSON."""
    if speed is None:
        return None
    from dataclasses import asdict

    return {**asdict(speed), "ideal": speed.ideal, "realised_share": speed.realised_share}


def show_histogram(counts: tuple[int, ...]) -> None:
    console.say("", "Where rows leave:")
    console.histogram(counts)
