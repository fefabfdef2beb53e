"""Are promises kept, and what do they cost? Writes docs/results/certificates.md.

    python benchmarks/compare.py sst2; ... sick; ... uspto_50k      # makes the exit tables
    python benchmarks/certificates.py [sst2 sick uspto_50k simulated] [--draws 1000]

`simulated` is a population of 100,000 rows of which 12 exits get surer, some rows sooner than
others; each draw is a table of its own of these. On the other sets:

Policies are searched on the tune rows of `auto`, seed 1: the usual ones, and everything at once
(`--policy all`, for two of the risks). Its test rows are the population, so that the true risk of
every policy is known; rows to prove on are drawn from them with replacement. A draw is *broken* if
the risk that was promised is exceeded by the policy that was chosen. A set that has been measured
with as many draws is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from compare import DOCS
from scipy.optimize import brentq
from scipy.stats import binomtest
from tqdm import tqdm

from offramp import ExitTable
from offramp.calibration import RISKS, measure
from offramp.calibration.certifying import exact_test
from offramp.calibration.frontier import ALL, applicable, explore
from offramp.calibration.judge import Judge
from offramp.calibration.proving import losses_under, path_of, prove
from offramp.storage import write_json

Floats = npt.NDArray[np.float64]
SIMULATED = "simulated"
SETS = ("sst2", "sick", "uspto_50k", SIMULATED)
LIMITS, CONFIDENCES, ROWS = (0.01, 0.02, 0.05), (0.9, 0.95), (250, 500, 1000, 5000)
Setting = tuple[float, int, float]
"""Limit, rows, confidence."""
SETTINGS: Sequence[Setting] = tuple(product(LIMITS, ROWS, CONFIDENCES))
QUESTIONS: Sequence[Setting] = ((0.05, 500, 0.95), (0.02, 1000, 0.9))
"""What was asked."""
_STRONGEST = 50.0
GRID = 200
"""Steps from a loss of 0 to one of 1, where the sums of many are counted."""
USUAL = ("brier", "disagreement", "drop", "hellinger")
"""Risks that are promised."""
EVERYTHING = ("drop", "disagreement")
"""Risks for which everything is searched as well."""
PROCEDURES = {
    "plain choice": None,
    "fixed sequence": ("fixed_sequence", None),
    "fixed sequence, bets": ("fixed_sequence", "betting"),
    "Holm": ("holm", None),
    "Bonferroni": ("bonferroni", None),
    "in expectation": ("expectation", None),
}


def cell_of(work: Path, name: str) -> Path:
    """The run of `auto`, or of what became it, with the first seed."""
    for method in ("auto", "v-fast-simple"):
        found = sorted((work / name / "cells").glob(f"{method}-0*-seed1"))
        chosen = [
            one for one in found if (one.parent / one.name.replace("seed1", "seed2")).is_dir()
        ]
        if chosen or len(found) == 1:
            return (chosen or found)[0]
    raise SystemExit(f"{work / name} has no run of auto: python benchmarks/compare.py {name}")


def tables_of(work: Path, name: str) -> tuple[ExitTable, ExitTable, str]:
    """Rows to search on, the population, and where they are from."""
    if name == SIMULATED:
        return simulated(2000, seed=1), simulated(100_000, seed=2), name
    cell = cell_of(work, name)
    return ExitTable.open(cell / "tune"), ExitTable.open(cell / "test"), cell.name


def simulated(rows: int, seed: int, depth: int = 12, classes: int = 3) -> ExitTable:
    """Exits that get surer and better, some rows sooner than others."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, classes, rows)
    growth = np.linspace(0.3, 4, depth)[:, None] * random.uniform(0.3, 1.5, (rows, 1, 1))
    noise = random.normal(size=(rows, depth, classes)).cumsum(axis=1)
    noise /= np.sqrt(np.arange(1, depth + 1))[:, None]  # neighbours err alike
    scores = np.eye(classes)[truth][:, None] * growth + noise
    return ExitTable.from_arrays(scores, problem_type="single_label_classification", labels=truth)


def measured(search: ExitTable, pool: ExitTable, draws: int) -> Iterator[dict[str, Any]]:
    for risk, specs in [(name, "usual") for name in USUAL] + [(name, ALL) for name in EVERYTHING]:
        judge = Judge(search, risk=RISKS[risk])
        tried = explore(judge, [*([ALL] if specs == ALL else applicable(search)), "full"])
        for limit in LIMITS:
            path = [one for one in path_of(tried, limit) if one.cost < 1 / 1.05]
            if not path:
                continue  # nothing saves 5%, so there is nothing to promise
            policies = [one.policy for one in path]
            losses = np.stack([losses_under(pool, one, RISKS[risk]) for one in policies], axis=1)
            costs = np.array([measure(pool, one).cost for one in policies])
            for setting in SETTINGS:
                if setting[0] == limit:
                    facts = {"risk": risk, "search": specs, "tried": len(tried), "path": len(path)}
                    yield facts | cell(losses, costs, risk, setting, draws)


def cell(losses: Floats, costs: Floats, risk: str, setting: Setting, draws: int) -> dict[str, Any]:
    """What the procedures do in one setting, and what the best of any could."""
    limit, rows, confidence = setting
    true = losses.mean(axis=0) <= limit
    found: dict[str, Any] = {"limit": limit, "rows": rows, "confidence": confidence}
    found["best"] = float(costs[true].min()) if true.any() else 1.0
    if setting in QUESTIONS:
        found["ceiling"] = ceiling(losses, costs, limit, confidence, rows)
    return found | drawn(losses, costs, risk, limit, rows, confidence, draws)


def drawn(
    losses: Floats,
    costs: Floats,
    risk: str,
    limit: float,
    rows: int,
    confidence: float,
    draws: int,
) -> dict[str, Any]:
    """Share of draws broken, share that leave early, and mean cost, of each procedure."""
    exact = exact_test(RISKS[risk]) or "betting"
    true, rng = losses.mean(axis=0), np.random.default_rng(0)
    places: dict[str, list[int | None]] = {name: [] for name in PROCEDURES}
    for _ in range(draws):
        some = losses[rng.integers(0, len(losses), rows)]
        for name, how in PROCEDURES.items():
            if how is None:
                within = np.flatnonzero(some.mean(axis=0) <= limit)
                place = int(within[np.argmin(costs[within])]) if len(within) else None
            else:
                test: Any = how[1] or exact
                place = prove(some, limit, confidence, how[0], test).place  # type: ignore[arg-type]
            places[name].append(place)
    return {
        "outcomes": {
            name: {
                "broken": sum(one is not None and true[one] > limit for one in found) / draws,
                "leaves": sum(one is not None for one in found) / draws,
                "cost": float(np.mean([1.0 if one is None else costs[one] for one in found])),
                # conformal risk control bounds this, not the share of broken draws
                "risk": float(np.mean([0.0 if one is None else true[one] for one in found])),
            }
            for name, found in places.items()
        }
    }


def ceiling(losses: Floats, costs: Floats, limit: float, confidence: float, rows: int) -> float:
    """No procedure that chooses from this path, by independent draws of rows alone, and keeps its
    promise on every population, has a lower mean cost on this one.

    It may choose the k-th candidate or a faster one in no more draws than in which the most
    powerful test (Neyman and Pearson) tells these rows from others of which all these candidates
    lose too much. Taken are the others that exponential weights make.

    Args:
        losses: of the population, (rows, candidates), from the safest to the fastest.
        costs: (candidates,), shares of full depth.
        rows: to prove on.
    """
    costs = np.minimum.accumulate(np.minimum(costs, 1.0))
    rising = np.ascontiguousarray(losses.T)
    chances = [chance(rising[k:], limit, 1 - confidence, rows) for k in range(len(costs))]
    return float(1 + np.diff(costs, prepend=1.0) @ chances)


def chance(losses: Floats, limit: float, alpha: float, rows: int) -> float:
    """That any of these candidates, (candidates, rows), can be chosen, at most."""
    means = losses.mean(axis=1)
    if means.min() > limit:
        return alpha
    safest = np.rint(losses[means.argmin()] * GRID)

    def lacking(strength: float) -> float:
        weights = np.exp(strength * (safest - safest.max()) / GRID)
        return float((losses @ weights / weights.sum()).min() - limit)

    if lacking(_STRONGEST) < 0:
        return 1.0
    strength = brentq(lacking, 0, _STRONGEST, rtol=1e-6)
    weights = np.exp(strength * (safest - safest.max()) / GRID)
    values, places = np.unique(safest, return_inverse=True)
    step = np.gcd.reduce((values - values[0]).astype(int)) or 1
    places = ((values[places] - values[0]) / step).astype(int)
    here = of_sums(np.bincount(places) / len(places), rows)
    there = of_sums(np.bincount(places, weights) / weights.sum(), rows)
    below = np.cumsum(there)
    last = int(np.searchsorted(below, alpha))
    part = (alpha - (below[last] - there[last])) / there[last]  # at the edge it draws lots
    return float(min(here[:last].sum() + part * here[last], 1.0))


def of_sums(chances: Floats, count: int) -> Floats:
    """The distribution of the sum of so many independent draws from 0, 1, ..."""
    size = count * (len(chances) - 1) + 1
    return np.fft.irfft(np.fft.rfft(chances, size) ** count, size).clip(min=0)


def verdict(cell: dict[str, Any], name: str, draws: int) -> bool:
    """Whether a procedure kept what it promises, within the noise of the draws."""
    outcome = cell["outcomes"][name]
    if name == "in expectation":
        return bool(outcome["risk"] <= cell["limit"])
    broken = round(outcome["broken"] * draws)
    least = binomtest(broken, draws, alternative="greater").proportion_ci(0.95).low
    return bool(least <= 1 - cell["confidence"] + 1e-12)


INTRO = """\
# Certificates: are they kept, and what do they cost

{doc}

## Kept

Over the risks {risks}, limits of 1, 2 and 5 %, confidence 90 and 95 %, and 250 to 5,000 rows. A
procedure fails a setting if more draws are broken than it allows, beyond the noise of the draws
(one-sided 95 % interval of the binomial); `in expectation` if the mean risk over draws exceeds the
limit. *worst* is the largest share of broken draws at confidence 90 %, where 10 % are allowed;
*leave* the share of draws in which rows leave early at all.

| set | search | procedure | settings failed | worst | leave | mean cost reduction |
|---|---|---|---|---|---|---|
"""
ASKED = """
## What was asked

The fixed sequence against the plain choice, which breaks its promise: at 500 rows and a limit of
5 %, 95 % confidence, its cost reduction is at least 90 % of the plain choice's; at 1,000 rows and
2 %, 90 % confidence, it costs at most half a layer of twelve more, 4.2 % of full depth. *bets* is
the same with bets for a test; *any*, what no procedure can better that chooses from this path, by
the rows of the proof alone, and keeps its promise on every population: it chooses a policy or a
faster one in no more draws than the most powerful test of these rows against rows that lose just
too much (Neyman and Pearson). **nobody**: *any* is below 90 %, or above 4.2 %, so that what was
asked cannot be had on this path from so few rows; a better search may find a better path. The plain
choice gains most where its promise is broken most; its figures are means of {draws:,} draws.
uspto_50k and `simulated` have twelve layers; of the six of MiniLM, on sst2 and sick, 4.2 % is a
quarter of one.

{tally}

| set | search | risk | 500 rows | of plain | bets | any | 1,000 rows | more | bets | any |
|---|---|---|---|---|---|---|---|---|---|---|
"""
COST = """
## What it costs

Cost reduction at 95 % confidence; in brackets the share of draws broken. *best* is the fastest
policy of the path that is truly within the limit, which nobody knows; *of plain* the fixed
sequence's share of what the plain choice seems to save.
"""
YES, NOBODY = "**yes**", "nobody"
SHOWN = ("plain choice", "fixed sequence", "Holm", "in expectation")


def page(results: dict[str, Any]) -> str:
    doc = (__doc__ or "").partition("\n\n")[2].strip("\n")
    text = INTRO.format(doc=doc, risks=", ".join(f"`{name}`" for name in USUAL))
    for (name, found), search in product(results.items(), ("usual", ALL)):
        for how in PROCEDURES:
            text += f"| {name} | {search} | {how} | {kept(found, search, how)} |\n"
    answers = {
        name: [f"{search} | {line}" for search in ("usual", ALL) for line in asked(found, search)]
        for name, found in results.items()
    }
    draws = max(found["draws"] for found in results.values())
    text += ASKED.format(draws=draws, tally=tally(answers))
    text += "".join(f"| {name} | {line} |\n" for name in answers for line in answers[name])
    text += COST
    for name, found in results.items():
        head = " | ".join(("risk", "search", "limit", "rows", "best", *SHOWN, "of plain"))
        text += f"\n### {name}\n\n{counts(found)}\n\n| {head} |\n"
        text += "|" + "---|" * (len(SHOWN) + 6) + "\n"
        cells = [cell for cell in found["cells"] if cell["confidence"] == 0.95]
        text += "".join(f"| {power(cell)} |\n" for cell in cells)
    return text


def counts(found: dict[str, Any]) -> str:
    return (
        f"Searched on {found['searched']:,} rows; a population of {found['population']:,}; "
        f"{found['draws']:,} draws a setting."
    )


def asked(found: dict[str, Any], search: str) -> Iterator[str]:
    """A line for each risk: yes or no to both questions, with the figures."""
    for risk in USUAL:
        cells = {
            (cell["limit"], cell["rows"], cell["confidence"]): cell
            for cell in found["cells"]
            if (cell["risk"], cell["search"]) == (risk, search)
        }
        if not all(setting in cells for setting in QUESTIONS):
            continue
        wide, narrow = (costs_of(cells[setting]) for setting in QUESTIONS)
        shares = [wide[0] / cost for cost in wide[1:]]
        more = [cost - narrow[0] for cost in narrow[1:]]
        first = said(shares[0] >= 0.9, shares[2] >= 0.9)
        second = said(more[0] <= 0.5 / 12, more[2] <= 0.5 / 12)
        figures = [first, *map("{:.1%}".format, shares), second, *map("{:+.1%}".format, more)]
        yield " | ".join((f"`{risk}`", *figures))


def tally(answers: dict[str, list[str]]) -> str:
    """How often it was met, of both questions, and how often nobody could have met it."""
    counts = {name: " ".join(lines).split() for name, lines in answers.items()}
    return "\n".join(
        f"- {name}: met in {words.count(YES)} of {2 * len(answers[name])}, out of anybody's reach "
        f"in {words.count(NOBODY)}"
        for name, words in counts.items()
    )


def said(here: bool, anybody: bool) -> str:
    return YES if here else "**no**" if anybody else NOBODY


def costs_of(cell: dict[str, Any]) -> list[float]:
    """Plain choice, fixed sequence, the same with bets, and the ceiling."""
    names = ("plain choice", "fixed sequence", "fixed sequence, bets")
    return [*(cell["outcomes"][name]["cost"] for name in names), cell["ceiling"]]


def kept(found: dict[str, Any], search: str, how: str) -> str:
    cells = [cell for cell in found["cells"] if cell["search"] == search]
    failed = sum(not verdict(cell, how, found["draws"]) for cell in cells)
    worst = max(one["outcomes"][how]["broken"] for one in cells if one["confidence"] == 0.9)
    leave = np.mean([cell["outcomes"][how]["leaves"] for cell in cells])
    reduction = np.mean([1 / cell["outcomes"][how]["cost"] for cell in cells])
    return f"{failed} of {len(cells)} | {worst:.1%} | {leave:.0%} | {reduction:.2f}x"


def power(cell: dict[str, Any]) -> str:
    outcomes = [cell["outcomes"][name] for name in SHOWN]
    said = [f"{1 / one['cost']:.2f}x ({one['broken']:.1%})" for one in outcomes]
    share = outcomes[0]["cost"] / outcomes[1]["cost"]
    facts = (cell["risk"], cell["search"], f"{cell['limit']:.0%}", f"{cell['rows']:,}")
    return " | ".join((*facts, f"{1 / cell['best']:.2f}x", *said, f"{share:.0%}"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=SETS, metavar="SET")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=Path("runs/compare"))
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args()
    place = given.docs / "certificates"
    place.mkdir(parents=True, exist_ok=True)
    for name in given.names:
        file = place / f"{name}.json"
        if not file.is_file() or json.loads(file.read_text())["draws"] != given.draws:
            search, pool, run = tables_of(given.work, name)
            cells = list(tqdm(measured(search, pool, given.draws), desc=name))
            counts = {"searched": search.rows, "population": pool.rows, "run": run}
            write_json(file, {"draws": given.draws, **counts, "cells": cells})
    read = {file.stem: json.loads(file.read_text()) for file in place.glob("*.json")}
    text = page({name: read[name] for name in SETS if name in read})
    (given.docs / "certificates.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
