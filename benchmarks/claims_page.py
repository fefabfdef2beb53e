"""docs/results/claims.md from the JSON files of claims.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from claims_study import ALPHA, BINS, EQUAL, NO, UNDECIDED, YES, Answers, Part, joined

from offramp.comparison.board import Difference, Figure
from offramp.storage import read_document, whole_file

PREFACE = """# Do the papers' claims hold here?

What papers on early exit say of themselves against others, asked again in one house: every method
from the same fine-tuned start, on the same rows, with equal epochs and learning rates, by the
studies of `offramp compare` (compare-\\*.md say how each set was run). Made by

    python benchmarks/compare.py SET        (each set of the table below)
    python benchmarks/claims.py             (claims/<set>.json, and this page from these)

Policies and thresholds are chosen on tune, and read on test only. Each method leaves by the policy
of its paper (where that is not for the task: `max_probability`, or `patience` for numbers), and in
a second row by the family of policies that did best on tune, by area, also where it is read at a
cost reduction. *Equal cost* is the same share of full-depth FLOPs: the area under score over cost
from 0.2 to 1, or the curve at a cost reduction, straight between two thresholds as by tossing a
coin for each row. Cost reduction is counted FLOPs, not time.

## How it is decided

All figures are differences, paired by row and seed, in points (hundredths of the set's score), with
95 % intervals over rows, which are drawn again, and seeds, by Student's t. An answer comes from the
interval alone:

- *at least level*: **yes** if its lower end is above -0.5 points; **no**, if not yes, where its
  upper end is at or below 0;
- *above*: yes if the lower end is above 0, no if the upper end is at or below 0;
- *far above*: the same with 2 points for 0; *within 1 point*: the same with -1;
- *above all*: yes if every difference is above 0 after Holm's correction for their number
  (p < 0.05), no if one is below 0 so;
- **undecided**: neither; also where the plain fine-tune is not clearly above the commonest answer:
  little was learned.

A claim of several parts is yes if all parts are, no if one part is. Nothing but *above all* is
corrected for the number of comparisons, so among many parts a *no* near 0 may be chance. An answer
from one seed stands in brackets: it holds for the models that were trained. The rules were written
down before the studies were done."""


class Words(NamedTuple):
    row: str
    details: str


WORDS = {
    "1a": Words(
        "PABEE at 1.5x >= its own full depth",
        "Patience at 1.5x against the same model at full depth. Beside the curve at exactly 1.5x "
        "stand the thresholds that tune chose for 1.5x, at the cost that they have.",
    ),
    "1b": Words(
        "PABEE at 1.5x >= the plain fine-tune",
        "The same against a model fine-tuned as long without exits, at full depth: this is the "
        "comparison of PABEE's authors.",
    ),
    "2": Words(
        "ELBERT >= PABEE at equal cost",
        "Confidence and window on a shared exit against patience: the area, and three costs.",
    ),
    "3": Words(
        "FastBERT's students within 1 point of the teacher at 2x",
        "The score at 2x minus that of its own full depth, the teacher: the drop with its sign.",
    ),
    "4a": Words(
        "RomeBERT's early exits far above DeeBERT's",
        "Each exit of the first half alone, for all rows, whatever a policy would do; their mean "
        "decides. Of uspto_50k see 4b.",
    ),
    "4b": Words(
        "RomeBERT's last exit stays",
        "Full depth of RomeBERT against the plain fine-tune and against DeeBERT. On uspto_50k its "
        "training failed: full depth falls from 97 % to 75, 36 and 30 %, so what the page says of "
        "it there, early exits included, is no answer to the paper.",
    ),
    "5a": Words(
        "Q-exit >= sampling",
        "On the same exits: Q-exit's curve at the cost of drawing where to leave (mean over 8 "
        "draws), minus its score. PALBERT's exits decide; PonderNet's stand beside them. Where "
        "drawing saves nothing with any seed there is nothing to tell apart: undecided.",
    ),
    "5b": Words(
        "PALBERT >= PABEE",
        "Q-exit against patience: the area, and 2x. [PALBERT](../methods/palbert.md) says why it "
        "does so little on small models in few epochs.",
    ),
    "6a": Words(
        "JEI-DNN's gates >= thresholds at equal cost",
        "On the same exits: gates, trained as in the paper and read with its masses or as a proper "
        "simplex, or trained as one, too (`PYTHONPATH=benchmarks python benchmarks/compare.py SET "
        "--plugins gates --methods jei_dnn_simplex --docs ELSEWHERE`), against a threshold on the "
        "largest probability (`max_probability`). The paper trains a model for each trade-off of "
        "cost and error; here one is trained, and the bar of its gates is moved.",
    ),
    "6b": Words(
        "JEI-DNN's gates are better calibrated",
        f"Expected calibration error ({BINS} bins of equal mass) of the answers given near 2x: "
        "that of thresholds minus that of gates. Both leave at the bar nearest 2x on half of tune; "
        f"where their cost reductions are more than {EQUAL - 1:.0%} apart, it is undecided.",
    ),
    "6c": Words(
        "JEI-DNN's gates give smaller conformal sets",
        f"Sets of {100 * (1 - ALPHA):.0f} % coverage for rows as they leave near 2x, with a limit "
        "per exit: classes in a set under thresholds minus under gates. Bars come from one half "
        "of tune, limits from the other. In the last column stands the share of test rows whose "
        "set held the right class; smaller sets that clearly cover less, and larger ones that "
        "clearly cover more (the interval of the difference is without 0), leave it undecided, as "
        "unequal costs do.",
    ),
    "7a": Words(
        "COSEE above all older ones at 2x, 3x and 4x",
        "Against every older method that was run, by Holm over these; the figure is the difference "
        "from the one of the largest area on tune. Sets without a line for 4x were not asked for "
        "it, nor was SDN among the older ones there.",
    ),
    "7b": Words(
        "CAP above all older ones at 2x, 3x and 4x",
        "As for COSEE.",
    ),
}
BY = {
    "": "",
    "paper": "the paper's policy",
    "tune": "policy chosen on tune",
    "simplex": "gates as a simplex",
    "trained": "gates trained as a simplex",
}


class Cell(NamedTuple):
    """A claim on one set, by one policy."""

    answer: str
    part: Part
    alone: bool


def write_page(place: Path, page: Path) -> None:
    """Write the page from all JSON files in a folder."""
    every = [read_document(Answers, file) for file in sorted(place.glob("*.json"))]
    lines = [PREFACE, "\n## The answers\n", *answers(every)]
    for key, words in WORDS.items():
        lines += [f"\n## {key}. {words.row}\n", f"{words.details}\n", *details(key, every)]
    with whole_file(page) as file:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def answers(every: Sequence[Answers]) -> Iterator[str]:
    """Claims by set."""
    yield "| claim | by | " + " | ".join(one.title for one in every) + " |"
    yield "|---" * (2 + len(every)) + "|"
    for key, words in WORDS.items():
        for by in policies(key, every):
            cells = [short(key, by, one) for one in every]
            yield f"| {key}. {words.row} | {BY[by]} | " + " | ".join(cells) + " |"
    yield "\nSeeds, test rows, score: " + "; ".join(
        f"{one.title} {', '.join(map(str, one.seeds)) or 'none'}, {one.test_rows:,}, {one.metric}"
        for one in every
    )


def policies(key: str, every: Sequence[Answers]) -> list[str]:
    """By whose policies a claim was answered."""
    found = {part.by: None for one in every for part in one.claims.get(key, ())}
    return list(found) or [""]


def short(key: str, by: str, one: Answers) -> str:
    if key not in one.claims:
        return one.missing.get(key, "not run")
    cell = conclude([part for part in one.claims[key] if part.by == by], one.learned)
    if cell is None:
        return "not run"
    few = len(cell.part.seeds) < 2
    answer = f"({cell.answer})" if few else f"**{cell.answer}**"
    where = "" if cell.alone else f", {cell.part.name}"
    return f"{answer} {interval(cell.part.figure, cell.part.unit)}{where}" + (
        ", little learned" if one.learned is False else ""
    )


def conclude(parts: Sequence[Part], learned: bool | None) -> Cell | None:
    """The answer of a claim, and the first part that it hangs on."""
    deciding = [part for part in parts if part.decides]
    if not deciding:
        return None
    answer = joined(part.answer for part in deciding)
    part = next(part for part in deciding if part.answer == answer)
    return Cell(UNDECIDED if learned is False else answer, part, len(deciding) == 1)


def details(key: str, every: Sequence[Answers]) -> Iterator[str]:
    """All parts of a claim, and how the answers fall."""
    there = [one for one in every if key in one.claims]
    for by in policies(key, there) if there else ():
        found = [conclude([p for p in one.claims[key] if p.by == by], one.learned) for one in there]
        said = Counter(cell.answer for cell in found if cell is not None)
        counts = ", ".join(f"{said[answer]} {answer}" for answer in (YES, NO, UNDECIDED))
        yield f"- {BY[by] or 'all'}: {counts}."
    absent = [f"{one.title} ({one.missing[key]})" for one in every if key in one.missing]
    if absent:
        yield f"- no answer: {'; '.join(absent)}."
    if not there:
        return
    yield "\n| set | by | what | rule | difference | answer | seeds | beside it |"
    yield "|---" * 8 + "|"
    for one in there:
        for part in one.claims[key]:
            yield f"| {one.title} | " + " | ".join(row(part)) + " |"


def row(part: Part) -> list[str]:
    return [
        BY[part.by],
        part.name,
        part.rule,
        interval(part.figure, part.unit),
        part.answer if part.decides else f"({part.answer}, decides nothing)",
        ", ".join(map(str, part.seeds)),
        "; ".join([part.note] * bool(part.note) + list(beside(part.others, part))),
    ]


def beside(others: Mapping[str, Figure], part: Part) -> Iterator[str]:
    for name, figure in others.items():
        corrected = f", Holm {figure.p_holm:.2g}" if isinstance(figure, Difference) else ""
        yield f"{name} {interval(figure, part.unit)}{corrected}"


def interval(figure: Figure, unit: str) -> str:
    """A number with its interval, in points or classes."""
    scale, places = (100, 1) if unit == "points" else (1, 2)
    ends = [
        round(scale * one, places) + 0.0 for one in (figure.value, figure.low, figure.high)
    ]  # no -0.0
    value, low, high = (f"{end:+.{places}f}" for end in ends)
    return f"{value} [{low}, {high}]"
