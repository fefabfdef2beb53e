"""A leaderboard as Markdown, for a README or a page of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

from offramp.card import escaped, markdown_table
from offramp.comparison.board import (
    AREA,
    AT,
    CHEAPEST,
    COLUMNS,
    AtTarget,
    Board,
    Difference,
    Figure,
    MethodRow,
    PolicyRow,
)
from offramp.comparison.words import remarks
from offramp.metrics import METRICS

_NONE = "-"
Show = Callable[[float], str]


def to_markdown(board: Board) -> str:
    """The whole leaderboard; it begins with a heading of the second level."""
    return "\n\n".join(_parts(board)) + "\n"


def _parts(board: Board) -> Iterator[str]:
    show = _shower(board.metric)
    yield f"## {_text(board.title)}"
    yield "\n".join(f"- {_text(name)}: {_text(fact)}" for name, fact in _facts(board, show))
    yield markdown_table(_head(board), [_cells(board, row, show) for row in board.methods])
    yield _how_to_read(board)
    if len(board.methods) > 1 or board.plain:
        yield _folded("All differences", *_all_differences(board, show))
    for row in board.methods:
        yield _folded(f"{row.name}: all policies", _policies(row, show))
    if board.missing:
        rows = [(_text(one.method), str(one.seed), _text(one.why)) for one in board.missing]
        yield "What is missing:\n\n" + markdown_table(("method", "seed", "why"), rows)


def _facts(board: Board, show: Show) -> Iterator[tuple[str, str]]:
    yield from board.facts.items()
    unit = " x 100" if _bounded(board.metric) else ""
    yield "score", f"{board.metric}{unit}, on {board.test_rows} test rows"
    yield "seeds", ", ".join(map(str, board.seeds))
    yield "commonest answer for every row", show(board.guess)
    if board.plain:
        yield "plain fine-tune at full depth", _interval(board.plain, show)


def _head(board: Board) -> list[str]:
    return [
        "method",
        "policy",
        "area",
        "full depth",
        *(f"{name}x" for name in AT),
        f"area, minus {_text(board.reference)}",
        "area, minus its own fixed",
        "AUROC",
        "training",
        "parameters added",
    ]


def _cells(board: Board, row: MethodRow, show: Show) -> list[str]:
    best, remarked = row.row, remarks(board, row)
    return [
        _text(row.name) + (f" ({remarked})" if remarked else ""),
        _text(row.chosen),
        _interval(best.area, show),
        _interval(row.full_score, show),
        *(_target(at, show) + _other_family(row, at) for at in row.at),
        *(_maybe_difference(found.get(AREA), show) for found in (row.against, row.against_fixed)),
        _auroc(best),
        _NONE if row.times_plain is None else f"{row.times_plain:.2f}x",
        f"{row.parameters_added:,}",
    ]


def _how_to_read(board: Board) -> str:
    reference = _text(board.reference)
    return (
        "Every method is judged by the family of policies that had the largest area on `tune`, and "
        "at a cost reduction by that of the best score there on `tune`, named where it is another; "
        f"area is the mean score over costs from {CHEAPEST:g} to 1 of full depth, where scores "
        "between two thresholds are those of a mixture of both, and 2x is half the cost: first "
        "the score on this curve, then that of the threshold which `tune` chose, with the cost "
        "reduction that it came to on test. "
        "Brackets hold 95 % intervals over rows, which are drawn again, and seeds, by Student's t; "
        f"differences from {reference} are paired, and p is Holm's, corrected for the number of "
        "methods. *Fixed*: its own exits where all rows leave at one and the same. "
        "AUROC is the mean over exits of how well what the policy looks at tells right from "
        "wrong answers, and training is the time of the plain fine-tune times so much."
    )


def _all_differences(board: Board, show: Show) -> Iterator[str]:
    against = [(row.name, row.against) for row in board.methods if row.against]
    if against:
        yield f"From {_text(board.reference)}, each with the family that `tune` chose:"
        yield _table_of_differences(COLUMNS, against, show)
    plain = [(row.name, row.against_plain) for row in board.methods if row.against_plain]
    if plain:
        yield "From the plain fine-tune at full depth:"
        yield _table_of_differences(("full", *AT), plain, show)

    fixed = [(row.name, row.against_fixed) for row in board.methods if row.against_fixed]
    if fixed:
        yield "From their own exits where all rows leave at one and the same (`fixed`):"
        yield _table_of_differences(COLUMNS, fixed, show)


def _table_of_differences(
    columns: Sequence[str], rows: Sequence[tuple[str, dict[str, Difference]]], show: Show
) -> str:
    head = ["method", *({"full": "full depth"}.get(one, one) for one in columns[:1])]
    cells = [
        [_text(name), *(_maybe_difference(found.get(one), show) for one in columns)]
        for name, found in rows
    ]
    return markdown_table([*head, *(f"{one}x" for one in columns[1:])], cells)


def _policies(row: MethodRow, show: Show) -> str:
    head = ["policy", "area", "area on `tune`", *(f"{name}x" for name in AT), "AUROC"]
    cells = [
        [
            _named(policy.name, row),
            _interval(policy.area, show),
            show(policy.tune_area),
            *(_target(at, show) for at in policy.at),
            _auroc(policy),
        ]
        for policy in sorted(row.policies, key=lambda one: -one.tune_area)
    ]
    table, exits = markdown_table(head, cells), row.row.auroc
    if not any(exits):
        return table
    shown = ", ".join(_NONE if one is None else f"{one:.3f}" for one in exits)
    return f"{table}\n\nAUROC of the chosen one, exit by exit: {shown}."


def _named(policy: str, row: MethodRow) -> str:
    marks = [mark for mark, name in (("chosen", row.chosen), ("own", row.own)) if name == policy]
    return _text(policy) + (f" ({', '.join(marks)})" if marks else "")


def _target(at: AtTarget, show: Show) -> str:
    """'84.1 (83.9 at 2.07x)'."""
    if not at.readings:
        return show(at.score.value)
    score = fmean(reading.score for reading in at.readings)
    return f"{show(at.score.value)} ({show(score)} at {at.cost_reduction:.2f}x)"


def _other_family(row: MethodRow, at: AtTarget) -> str:
    """', patience' where that and not the method's family was chosen for the target."""
    family = row.family_at(at.target)
    return "" if family == row.chosen else f", {_text(family)}"


def _auroc(policy: PolicyRow) -> str:
    return _NONE if policy.mean_auroc is None else f"{policy.mean_auroc:.3f}"


def _interval(figure: Figure, show: Show) -> str:
    return f"{show(figure.value)} [{show(figure.low)}, {show(figure.high)}]"


def _difference(found: Difference, show: Show) -> str:
    p = "p < 0.001" if found.p_holm < 0.001 else f"p = {found.p_holm:.3f}"
    signed = [
        f"{'+' if one > 0 else ''}{show(one)}" for one in (found.value, found.low, found.high)
    ]
    return f"{signed[0]} [{signed[1]}, {signed[2]}], {p}"


def _maybe_difference(found: Difference | None, show: Show) -> str:
    """A dash where there is none: `fixed` itself was chosen, the reference is not held against
    itself, or there is no common seed."""
    return _NONE if found is None else _difference(found, show)


def _shower(metric: str) -> Show:
    """Hundredths with one digit for metrics whose best is 1, else four digits."""
    if not _bounded(metric):
        return lambda value: f"{value:.4g}"
    # + 0 turns the minus of -0.0 away
    return lambda value: f"{round(100 * value, 1) + 0:.1f}"


def _bounded(metric: str) -> bool:
    return metric in METRICS and METRICS[metric].bounded


def _folded(summary: str, *parts: str) -> str:
    return "\n\n".join((f"<details><summary>{_text(summary)}</summary>", *parts, "</details>"))


def _text(text: str) -> str:
    """Plain text, of which no more than single words are cut."""
    return " ".join(escaped(word) for word in text.split())
