"""How far exits can be delayed, by method, on SST-2. Writes docs/results/attacks.md.

    python benchmarks/compare.py sst2      # makes the rows, the start and the learning rates
    python benchmarks/attacks.py           # trains each method once more, and attacks it

Methods are trained as in the comparison, seed 1: same rows, start and epochs, and the learning rate
that was chosen there; where a method was not compared, that of the start. Whatever is done is kept
in --work, so the same command goes on.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compare import DOCS, rows_of
from first_road import SHARED, STUDIES
from torch.nn.functional import normalize

from offramp.attacks import Attacked, AttackReport, attack
from offramp.attacks.figures import at_savings, budget_for, compare
from offramp.attacks.running import JSON as REPORT
from offramp.attacks.search import spots
from offramp.calibration import measure
from offramp.card import markdown_table
from offramp.comparison.cell import Work
from offramp.comparison.plan import PLAN, START, Cell, Grid, Plan, results
from offramp.methods import METHODS
from offramp.policies import Fixed, make_policy
from offramp.prediction import Predictor
from offramp.storage import Strict, read_document, whole_file, write_json
from offramp.table import ExitTable, replay
from offramp.training import train

SEED, ROWS, NEIGHBOURS = 1, 300, 4
TARGETS = (1.2, 2.5, 4.0)
"""Other savings at which each rule is read, beside twice."""
RULES = {
    "deebert": "entropy",
    "pabee": "patience",
    "elbert": "window",
    "palbert": "q_exit",
    "jei_dnn": "gated",
    "auto": "max_probability",
}
OWN_OBJECTIVE = {"pabee": "disagree", "elbert": "disagree", "palbert": "stay"}
"""Against rules that being uncertain does not hurt most."""
ATTACKS = {
    "embedding": "noise on the embedding, 0.1 standard deviations",
    "own": "the same noise against the method's own rule",
    "characters": "typing errors in a fifth of the words",
    "words": "other words for a fifth of the words",
}


def trained(method: str, comparison: Path, work: Path) -> Path:
    """The folder of a model, trained as the comparison did."""
    path = work / method
    if path.is_dir():
        return path
    plan, done = read_document(Plan, comparison / PLAN), results(comparison)
    grid = Grid(plan, (method,), (SEED,))
    start = grid.start_of(SEED, done, grid.tried(START, done))
    if start is None:
        raise SystemExit(f"{comparison} has no start: python benchmarks/compare.py sst2")
    cell = Cell(method, grid.rate_of(method, done, done) or start.rate, SEED)
    place = comparison / "cells" / start.cell.name / "model"
    run = Work(comparison, plan, cell, place, start.pooling, "cpu")
    kind = METHODS[method]
    pools = hasattr(kind.exits, "pooling") and kind.measures_pooling
    train(
        run.start,
        run.rows("train"),
        path,
        method=method,
        options=run.options,
        problem_type=plan.problem_type,
        max_length=plan.max_length,
        fine_tuned=True,
        **({"pooling": run.pooling} if pools else {}),
    )
    return path


def neighbours(model: Path, texts: Sequence[str], path: Path) -> Path:
    """For each word of the texts, the nearest in the model's own table of words, as synonyms."""
    if path.is_file():
        return path
    predictor = Predictor.load(model, "full", device="cpu")
    words = {
        word: number
        for word, number in predictor.processor.get_vocab().items()
        if word.isalpha() and len(word) > 2
    }
    names, numbers = list(words), torch.tensor(list(words.values()))
    table = predictor.model.stock.get_input_embeddings().weight.detach()[numbers]
    table = normalize(table - table.mean(dim=0), dim=1)
    known = {name: place for place, name in enumerate(names)}
    found = {}
    for word in sorted({spot.word.lower() for text in texts for spot in spots((text,))}):
        if word in known:
            near = (table @ table[known[word]]).topk(NEIGHBOURS + 1).indices.tolist()
            found[word] = [names[place] for place in near if names[place] != word][:NEIGHBOURS]
    write_json(path, found)
    return path


class Case(Strict):
    """What an attack did to a method's own rule, and to the same model leaving by entropy.

    Attributes:
        others: the method's own rule at other savings, each with the budget that they ask for.
        exits: score of each exit alone on the rows as they are.
        commonest: share of these that the method's own rule lets go at one layer.
    """

    report: AttackReport
    by_entropy: Attacked
    others: tuple[Attacked, ...]
    exits: tuple[float, ...]
    commonest: float

    @classmethod
    def read(cls, folder: Path) -> Case:
        report = read_document(AttackReport, folder / REPORT)
        name = report.attacks[0].name
        clean, after = (ExitTable.open(folder / "tables" / role) for role in ("clean", name))
        own = make_policy(report.policies[0].policy)

        def at(rule: str, target: float) -> Attacked:
            (policy,) = at_savings(clean, [rule], target)
            return compare(name, clean, after, policy, budget_for(clean, target))

        return cls(
            report=report,
            by_entropy=at("entropy", report.target_speedup),
            others=tuple(at(own.name, target) for target in TARGETS),
            exits=tuple(
                measure(clean, Fixed(layer=layer)).score or 0.0
                for layer in range(1, clean.depth + 1)
            ),
            commonest=max(replay(clean, own).histogram) / clean.rows,
        )


Found = dict[str, dict[str, Case]]


def attacked(method: str, kind: str, model: Path, rows: Any, synonyms: Path, folder: Path) -> None:
    """Attack a method, unless that was done before."""
    options: dict[str, Any] = {}
    if kind == "own":
        options["objective"] = OWN_OBJECTIVE[method]
    elif kind == "words":
        options["synonyms"] = synonyms
    if not (folder / REPORT).is_file():
        name = "embedding" if kind == "own" else kind
        policies, columns = [RULES[method]], {"text": "text", "label": "label"}
        attack(model, rows, folder, kinds=[name], policies=policies, max_rows=ROWS,
               seed=SEED, device="cpu", **columns, **options)  # fmt: skip


INTRO = """\
# Slow-down attacks

{doc}

{rows} dev rows of SST-2, drawn by hash; MiniLM-L6. Each method leaves by its own rule, whose bar
is the one whose cost comes nearest to half of the FLOPs on the rows as they are: a model that
never leaves early cannot be slowed. The budget is {depth} of {layers} layers for every row.
Figures are before → after the attack. *Efficacy* is 1 if all rows leave at the first exit and 0
if all run to the last; scores are accuracy x 100; *full* is full depth. *Within* is with the
budget on, *forced* the share of attacked rows that it made leave, and *most* the cost if every
row took all of it.

For synonyms stand the {neighbours} nearest neighbours of each word in the model's own table of
words, since no thesaurus is at hand: there are inflections and opposites among them, so meaning
may change and with it the right label. Both searches change at most a fifth of a row's words, but
always one. Noise is bounded by 0.1 standard deviations of the row's embedding, in 10 steps of its
gradient; no text can do just that, so it says what to be afraid of, not what will happen. It is
one seed, and a score of so few rows is known to about 4 points.
"""
OTHERS = """

## At other savings

Each method's own rule with its bar for other savings, or the nearest that it has, under the noise
on the embedding, and with the budget that these savings ask for:

"""
VERDICT = """
## Within a budget

In {kept} of {count} cases the cost of the attacked rows is at most what the budget allows
({most:.1%} of full depth at most); without it, it comes to {worst:.1%} and grows by a factor of
{factor:.2f} at most. A budget bounds cost and nothing else. Forced answers to attacked rows are
often wrong, and on the rows as they are it takes from rows that would have gone on: the first
number under *score within*.
"""
MODELS = """
## Who cannot be slowed, and why

A rule that lets nearly all rows go at one layer hardly looks at them, so nothing that is done to
a row moves it; and exits that know nothing make savings worthless before anybody attacks. Accuracy
of each exit on the rows as they are, and the largest share of rows that leave at one layer:

"""
BESIDE = """

The same attacked rows, and all models leaving by `entropy`, which tells a model that is hard to
move from a rule that does not look:

"""


def page(found: Found) -> str:
    every = [one for by in found.values() for one in by.values()]
    first = every[0].report
    text = INTRO.format(
        doc=str(__doc__).partition("\n")[2].strip("\n"),
        rows=first.rows,
        depth=first.max_depth,
        layers=first.depth,
        neighbours=NEIGHBOURS,
    )
    for kind, told in ATTACKS.items():
        if found[kind]:
            text += f"\n## {told[:1].upper()}{told[1:]}\n\n{_table(found[kind])}\n"
    rows = [row for o in every for row in (*o.report.policies, o.by_entropy, *o.others)]
    text += MODELS + _models(found) + BESIDE + _one_rule(found) + OTHERS + _others(found)
    return (
        text
        + "\n"
        + VERDICT.format(
            count=len(rows),
            kept=sum(row.within.attacked.cost <= row.within.most + 1e-12 for row in rows),
            most=max(row.within.most for row in rows),
            worst=max(row.attacked.cost for row in rows),
            factor=max(row.attacked.cost / row.clean.cost for row in rows),
        )
    )


HEAD = ("method", "rule", "efficacy", "exit layer", "cost", "score", "full", "queries", "forced",
        "cost within", "most", "score within")  # fmt: skip


def _table(cases: dict[str, Case]) -> str:
    lines = []
    for method, case in cases.items():
        ((row,), (tried,)) = case.report.policies, case.report.attacks
        rule = RULES[method]
        if tried.options["objective"] not in ("uniform", "even"):
            rule += f"; objective {tried.options['objective']}"
        within = row.within
        lines.append(
            (
                method,
                rule,
                *_moves(row),
                _change(case.report.full_score, tried.full_score),
                f"{tried.queries:.0f}",
                f"{within.attacked.forced:.0%}",
                f"{within.clean.cost:.1%} → {within.attacked.cost:.1%}",
                f"{within.most:.1%}",
                _change(within.clean.score, within.attacked.score),
            )
        )
    return markdown_table(HEAD, lines)


def _models(found: Found) -> str:
    first = found["embedding"]
    layers = range(1, len(next(iter(first.values())).exits) + 1)
    head = ("method", "rule", *(f"layer {layer}" for layer in layers), "at one layer")
    return markdown_table(
        head,
        [
            (
                name,
                RULES[name],
                *(f"{100 * one:.1f}" for one in case.exits),
                f"{case.commonest:.0%}",
            )
            for name, case in first.items()
        ],
    )


def _one_rule(found: Found) -> str:
    head = ("method", "attack", "efficacy", "exit layer", "cost", "score", "cost within", "most")
    lines = []
    for kind, cases in found.items():
        for method, case in cases.items():
            row = case.by_entropy
            within = f"{row.within.clean.cost:.1%} → {row.within.attacked.cost:.1%}"
            if kind != "own":
                lines.append((method, kind, *_moves(row), within, f"{row.within.most:.1%}"))
    return markdown_table(head, lines)


def _others(found: Found) -> str:
    head = ("method", "rule", "asked", "efficacy", "exit layer", "cost", "score", "cost within",
            "most")  # fmt: skip
    lines = []
    for method, case in found["embedding"].items():
        for target, row in zip(TARGETS, case.others, strict=True):
            within = f"{row.within.clean.cost:.1%} → {row.within.attacked.cost:.1%}"
            asked, most = f"{target:g}x", f"{row.within.most:.1%}"
            lines.append((method, RULES[method], asked, *_moves(row), within, most))
    return markdown_table(head, lines)


def _moves(row: Attacked) -> tuple[str, ...]:
    before, after = row.clean, row.attacked
    return (
        f"{before.efficacy:.2f} → {after.efficacy:.2f}",
        f"{before.exit_layer:.2f} → {after.exit_layer:.2f}",
        f"{before.cost:.1%} → {after.cost:.1%}",
        _change(before.score, after.score),
    )


def _change(before: float | None, after: float | None) -> str:
    return " → ".join("" if one is None else f"{100 * one:.1f}" for one in (before, after))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--compare", type=Path, default=Path("runs/compare/sst2"))
    parser.add_argument("--work", type=Path, default=Path("runs/attacks"))
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--page-only", action="store_true", help="from what is done")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    found: Found = {kind: {} for kind in ATTACKS}
    rows = rows_of(SHARED / "data" / "sst2" / STUDIES["sst2"].dev_file, "sst2")
    for kind in ATTACKS:
        for method in OWN_OBJECTIVE if kind == "own" else RULES:
            folder = given.work / "attacked" / f"{method}-{kind}"
            if not given.page_only:
                model = trained(method, given.compare, given.work)
                synonyms = neighbours(model, rows["text"][:], given.work / f"{method}.json")
                attacked(method, kind, model, rows, synonyms, folder)
                logging.info("%s, %s: done", method, kind)
            if (folder / REPORT).is_file():
                found[kind][method] = Case.read(folder)
    plain = {kind: {name: one.model_dump(mode="json") for name, one in by.items()}
             for kind, by in found.items()}  # fmt: skip
    (given.docs / "attacks").mkdir(parents=True, exist_ok=True)
    write_json(given.docs / "attacks" / "sst2.json", plain)
    with whole_file(given.docs / "attacks.md") as staged:
        staged.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
