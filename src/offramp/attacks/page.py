"""A report of attacks as Markdown, and its table for the command line."""

from __future__ import annotations

from collections.abc import Iterator

from offramp.attacks.document import AttackReport, Tried
from offramp.attacks.figures import Attacked
from offramp.calibration.sentences import policy_text
from offramp.card import escaped, markdown_table

HEAD = (
    "policy",
    "efficacy",
    "exit layer",
    "cost",
    "score",
    "forced",
    "cost within",
    "score within",
)
HOW_TO_READ = """\
Before → after the attack. **Efficacy**: 1 if all rows leave at the first exit, 0 if all run to the
last. **Cost**: executed FLOPs as a share of full depth. The last three columns are with the depth
budget on: the share of attacked rows that it made leave; the cost of the attacked rows and, in
brackets, the most that the budget allows; the scores."""


def to_markdown(report: AttackReport) -> str:
    """The whole report; it begins with a heading of the first level."""
    return "\n\n".join(_parts(report)) + "\n"


def _parts(report: AttackReport) -> Iterator[str]:
    yield "# Attacks on early exits"
    yield summary(report)
    for one in report.attacks:
        yield f"## {one.name}"
        yield told(one, report.metric)
        rows = [cells(row) for row in report.policies if row.attack == one.name]
        yield markdown_table(HEAD, [[escaped(name), *others] for name, *others in rows])
    yield HOW_TO_READ


def summary(report: AttackReport) -> str:
    """What was done, in two sentences."""
    full = ""
    if report.full_score is not None:
        full = f" Full depth scores {report.metric} {report.full_score:.4f} on them."
    return (
        f"{report.rows:,} rows; policies set as near as they go to a cost reduction of "
        f"{report.target_speedup:g}x on them; "
        f"budget: {report.max_depth} of {report.depth} layers.{full}"
    )


def told(one: Tried, metric: str | None) -> str:
    """What an attack did, in a sentence or two."""
    shown = {name: value for name, value in one.options.items() if name != "name"}
    options = ", ".join(f"{name} {value}" for name, value in shown.items())
    words = "" if one.words_changed is None else f" {one.words_changed:.1f} words changed a row."
    score = "" if one.full_score is None else f" Full depth then: {metric} {one.full_score:.4f}."
    return f"{options}; {one.queries:.0f} queries a row.{words}{score}"


def cells(row: Attacked) -> list[str]:
    """A line of the table under `HEAD`."""
    before, after, within = row.clean, row.attacked, row.within
    name = policy_text(row.policy)
    return [
        f"{row.point}: {name}" if row.point else name,
        _change(before.efficacy, after.efficacy, ".2f"),
        _change(before.exit_layer, after.exit_layer, ".2f"),
        _change(before.cost, after.cost, ".1%"),
        _change(before.score, after.score, ".3f"),
        f"{within.attacked.forced:.0%}",
        f"{within.attacked.cost:.1%} ({within.most:.1%})",
        _change(within.clean.score, within.attacked.score, ".3f"),
    ]


def _change(before: float | None, after: float | None, form: str) -> str:
    if before is None or after is None:
        return ""
    return f"{before:{form}} → {after:{form}}"
