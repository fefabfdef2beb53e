"""The papers' relative claims, from the tables of benchmarks/compare.py: yes, no or undecided.

    python benchmarks/claims.py [SET ...] [--work runs/compare] [--page-only]

Writes docs/results/claims/<set>.json for the sets found there, and docs/results/claims.md from
all JSON files that lie there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from claims_page import interval, write_page
from claims_study import (
    ABOVE_ALL,
    UNDECIDED,
    Answered,
    Answers,
    Column,
    Part,
    Study,
    above_all,
    apart,
    at_equal_cost,
    at_equal_coverage,
    ece,
)

from offramp.comparison import statistics
from offramp.comparison.plan import PLAIN, PLAN
from offramp.methods import METHODS
from offramp.storage import write_document

DOCS = Path(__file__).parents[1] / "docs" / "results"
EQUAL_COST = (1.5, 2.0, 3.0)
ABOVE_ALL_AT = (2.0, 3.0, 4.0)
BY = ("paper", "tune")
TRAINED = "jei_dnn_simplex"  # of gates.py, which only those who train it need
GATES = {
    "paper": ("jei_dnn", "gated"),
    "simplex": ("jei_dnn", "gated simplex"),
    "trained": (TRAINED, "gated simplex"),
}
"""How gates are trained and read: the method, and the family that reads them."""
THRESHOLD = "max_probability"
OLDER = (
    "sdn",
    "deebert",
    "pabee",
    "fastbert",
    "elbert",
    "pondernet",
    "palbert",
    "romebert",
    "berxit",
    "f_pabee",
    "pcee_bert",
    "gpfee",
    "jei_dnn",
)


@dataclass(frozen=True)
class Claim:
    """A claim.

    Attributes:
        needs: methods without which there is no answer.
        parts: what decides it, and what belongs to it.
    """

    needs: tuple[str, ...]
    parts: Callable[[Study], Iterator[Part]]


def pabee_against_itself(study: Study) -> Iterator[Part]:
    yield from _patient(study, study.full("pabee"))


def pabee_against_plain(study: Study) -> Iterator[Part]:
    yield from _patient(study, study.full(PLAIN))


def _patient(study: Study, full: Column) -> Iterator[Part]:
    """PABEE at 1.5x on the curve, and by the threshold that reached it on `tune`."""
    for by in BY:
        family = study.family("pabee", by)
        curve = study.curve("pabee", family)
        note = f"`{family}`"
        scores, reductions = study.reached("pabee", family, 1.5)
        others = {}
        if scores.keys() & full.keys():
            label = f"thresholds that reached 1.5x on tune, {between(reductions)} on test"
            others[label] = study.figure(apart(scores, full))
        column = apart(curve.at(1.5), full)
        yield study.part("1.5x", by, "at least level", column, note=note, others=others)


def elbert_and_pabee(study: Study) -> Iterator[Part]:
    yield from _at_equal_cost(study, "elbert", "pabee", EQUAL_COST)


def palbert_and_pabee(study: Study) -> Iterator[Part]:
    yield from _at_equal_cost(study, "palbert", "pabee", (2.0,))


def _at_equal_cost(
    study: Study, one: str, other: str, targets: tuple[float, ...]
) -> Iterator[Part]:
    for by in BY:
        names = [study.family(method, by) for method in (one, other)]
        note = f"`{names[0]}`, `{names[1]}`"
        mine, theirs = study.curve(one, names[0]), study.curve(other, names[1])
        yield study.part("area", by, "at least level", apart(mine.area(), theirs.area()), note=note)
        for target in targets:
            column = apart(mine.at(target), theirs.at(target))
            yield study.part(f"{target:g}x", by, "at least level", column, note=note)


def students_and_teacher(study: Study) -> Iterator[Part]:
    for by in BY:
        family = study.family("fastbert", by)
        column = apart(study.curve("fastbert", family).at(2.0), study.full("fastbert"))
        yield study.part("2x", by, "within 1 point", column, note=f"`{family}`")


def early_exits(study: Study) -> Iterator[Part]:
    """Exits of the first half alone; the mean decides."""
    half = study.depth // 2
    gaps = apart(study.exits("romebert"), study.exits("deebert"))
    others = {
        f"exit {layer + 1}": study.figure({seed: gap[:, layer] for seed, gap in gaps.items()})
        for layer in range(half)
    }
    mean = {seed: gap[:, :half].mean(axis=1) for seed, gap in gaps.items()}
    yield study.part(f"mean of exits 1-{half}", "", "far above", mean, others=others)


def last_exit(study: Study) -> Iterator[Part]:
    mine = study.full("romebert")
    for other in (PLAIN, "deebert"):
        column = apart(mine, study.full(other))
        yield study.part(f"full depth, against {other}", "", "at least level", column)


def q_exit_and_sampling(study: Study) -> Iterator[Part]:
    """At the cost of drawing; PALBERT's exits decide."""
    for method in ("palbert", "pondernet"):
        if method in study.runs:
            costs, scores = study.drawn(method)
            column = apart(study.curve(method, "q_exit").at_costs(costs), scores)
            reductions = [float(1 / cost[0]) for cost in costs.values()]
            part = study.part(
                f"on {method}'s exits",
                "",
                "at least level",
                column,
                decides=method == "palbert",
                note=f"sampling is at {between(reductions)}",
            )
            yield part if max(reductions) > 1 else part.model_copy(update={"answer": UNDECIDED})


def gates_and_thresholds(study: Study) -> Iterator[Part]:
    for by, method, family in _gates(study):
        theirs, mine = study.curve(method, THRESHOLD), study.curve(method, family)
        yield study.part("area", by, "at least level", apart(mine.area(), theirs.area()))
        for target in EQUAL_COST:
            column = apart(mine.at(target), theirs.at(target))
            yield study.part(f"{target:g}x", by, "at least level", column)


def calibration(study: Study) -> Iterator[Part]:
    """How much smaller the calibration error is under gates than under thresholds."""

    def errors(found: Mapping[int, Answered]) -> Column:
        return {seed: ece(one.confidence, one.right, study.counts) for seed, one in found.items()}

    for by, theirs, mine in _near_2x(study):
        part = study.part(
            "ECE near 2x, less by",
            by,
            "above",
            apart(errors(theirs), errors(mine)),
            others={
                "gates": study.figure(errors(mine)),
                "thresholds": study.figure(errors(theirs)),
            },
            note=_costs(mine, theirs),
        )
        answer = at_equal_cost(part.answer, _reductions(mine), _reductions(theirs))
        yield part.model_copy(update={"answer": answer})


def conformal(study: Study) -> Iterator[Part]:
    """How many classes fewer a set of 90 % holds under gates than under thresholds."""

    def sizes(found: Mapping[int, Answered]) -> Column:
        return study.mean({seed: one.sizes for seed, one in found.items()})

    def covered(found: Mapping[int, Answered]) -> Column:
        return study.mean({seed: one.covered for seed, one in found.items()})

    for by, theirs, mine in _near_2x(study):
        shares = [study.figure(covered(found)).value for found in (mine, theirs)]
        more = study.figure(apart(covered(mine), covered(theirs)))
        part = study.part(
            "set size near 2x, less by",
            by,
            "above",
            apart(sizes(theirs), sizes(mine)),
            unit="classes",
            others={"gates": study.figure(sizes(mine)), "thresholds": study.figure(sizes(theirs))},
            note=f"{_costs(mine, theirs)}; covered: {shares[0]:.1%} and {shares[1]:.1%}, "
            f"apart by {interval(more, 'points')}",
        )
        answer = at_equal_cost(part.answer, _reductions(mine), _reductions(theirs))
        yield part.model_copy(update={"answer": at_equal_coverage(answer, more)})


def _near_2x(study: Study) -> Iterator[tuple[str, dict[int, Answered], dict[int, Answered]]]:
    for by, method, family in _gates(study):
        yield by, study.answered(method, THRESHOLD, 2.0), study.answered(method, family, 2.0)


def _gates(study: Study) -> Iterator[tuple[str, str, str]]:
    return ((by, *of) for by, of in GATES.items() if of[0] in study.runs)


def _costs(mine: Mapping[int, Answered], theirs: Mapping[int, Answered]) -> str:
    of = [between(_reductions(found)) for found in (mine, theirs)]
    return f"gates at {of[0]}, thresholds at {of[1]}"


def _reductions(found: Mapping[int, Answered]) -> list[float]:
    return [one.cost_reduction for one in found.values()]


def newest(method: str) -> Callable[[Study], Iterator[Part]]:
    """One of the newest against all older ones that were run."""

    def parts(study: Study) -> Iterator[Part]:
        for by in BY:
            for target in ABOVE_ALL_AT:
                yield _against_older(study, method, by, target)

    return parts


def _against_older(study: Study, method: str, by: str, target: float) -> Part:
    families = {one: study.family(one, by) for one in (*OLDER, method) if one in study.runs}
    columns = {one: study.curve(one, family).at(target) for one, family in families.items()}
    mine = columns.pop(method)
    gaps = {one: gap for one, theirs in columns.items() if (gap := apart(mine, theirs))}
    found = statistics.differences({one: study.pooled(gap) for one, gap in gaps.items()})
    best = max(found, key=lambda one: study.tune_area(one, families[one]))
    absent = [one for one in OLDER if one not in found]
    return Part(
        name=f"{target:g}x, against {best}",
        by=by,
        rule=ABOVE_ALL,
        answer=above_all(found.values()),
        figure=study.figure(gaps[best]),
        seeds=tuple(gaps[best]),
        others={f"{one} (`{families[one]}`)": gap for one, gap in found.items()},
        note=f"`{families[method]}`" + (f"; not run: {', '.join(absent)}" if absent else ""),
    )


CLAIMS = {
    "1a": Claim(("pabee",), pabee_against_itself),
    "1b": Claim(("pabee", PLAIN), pabee_against_plain),
    "2": Claim(("elbert", "pabee"), elbert_and_pabee),
    "3": Claim(("fastbert",), students_and_teacher),
    "4a": Claim(("romebert", "deebert"), early_exits),
    "4b": Claim(("romebert", "deebert", PLAIN), last_exit),
    "5a": Claim(("palbert",), q_exit_and_sampling),
    "5b": Claim(("palbert", "pabee"), palbert_and_pabee),
    "6a": Claim(("jei_dnn",), gates_and_thresholds),
    "6b": Claim(("jei_dnn",), calibration),
    "6c": Claim(("jei_dnn",), conformal),
    "7a": Claim(("cosee", "pabee"), newest("cosee")),
    "7b": Claim(("cap", "pabee"), newest("cap")),
}


def between(values: list[float]) -> str:
    """The range of cost reductions over seeds."""
    ends = sorted({f"{value:.2f}" for value in values}, key=float)
    return f"{ends[0]}x" if len(ends) == 1 else f"{ends[0]}-{ends[-1]}x"


def why_missing(study: Study, claim: Claim) -> str:
    """Why a study has no answer, or nothing."""
    unfit = [
        name
        for name in claim.needs
        if name in METHODS and study.problem_type not in METHODS[name].problem_types
    ]
    if unfit:
        return "not for this task: " + ", ".join(unfit)
    absent = [name for name in claim.needs if name not in study.runs]
    if absent:
        return "not run: " + ", ".join(absent)
    seeds = [{run.seed for run in study.runs[name]} for name in claim.needs]
    return "" if set.intersection(*seeds) else "no seed in common yet"


def answers_of(folder: Path) -> Answers | None:
    """What a study says; None where nothing is done there yet."""
    study = Study(folder, (PLAIN, "cosee", "cap", *OLDER, TRAINED))
    if not study.runs:
        return None
    missing = {key: why for key, claim in CLAIMS.items() if (why := why_missing(study, claim))}
    claims = {key: tuple(one.parts(study)) for key, one in CLAIMS.items() if key not in missing}
    answered = {seed for parts in claims.values() for part in parts for seed in part.seeds}
    return Answers(
        title=folder.name,
        metric=study.ground.metric.name,
        depth=study.depth,
        test_rows=len(study.ground.rows),
        seeds=tuple(sorted(answered)),  # a plain fine-tune may have had more
        learned=study.learned(PLAIN) if PLAIN in study.runs else None,
        claims=claims,
        missing=missing,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="SET", help="all that are found, if none")
    parser.add_argument("--work", type=Path, default=Path("runs/compare"))
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--page-only", action="store_true", help="from the JSON files there")
    given = parser.parse_args()
    place = given.docs / "claims"
    place.mkdir(parents=True, exist_ok=True)
    folders = (
        [] if given.page_only else sorted(file.parent for file in given.work.glob(f"*/{PLAN}"))
    )
    for folder in folders:
        if given.names and folder.name not in given.names:
            continue
        found = answers_of(folder)
        if found is None:
            print(f"{folder.name}: nothing is done yet", file=sys.stderr)
        else:
            write_document(place / f"{folder.name}.json", found)
            print(f"{folder.name}: {len(found.claims)} claims of {len(CLAIMS)}", flush=True)
    write_page(place, given.docs / "claims.md")


if __name__ == "__main__":
    main()
