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
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from compare import DOCS
from scipy.stats import binomtest
from tqdm import tqdm

from offramp import ExitTable
from offramp.calibration import RISKS, measure
from offramp.calibration.frontier import ALL, applicable, explore
from offramp.calibration.judge import Judge
from offramp.calibration.proving import losses_under, path_of, prove
from offramp.storage import write_json

Floats = npt.NDArray[np.float64]
SIMULATED = "simulated"
SETS = ("sst2", "sick", "uspto_50k", SIMULATED)
LIMITS, CONFIDENCES, ROWS = (0.01, 0.02, 0.05), (0.9, 0.95), (250, 500, 1000, 5000)
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
        if chosen:
            return chosen[0]
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
    for risk, specs in [(name, "usual") for name in RISKS] + [(name, ALL) for name in EVERYTHING]:
        judge = Judge(search, risk=RISKS[risk])
        tried = explore(judge, [*([ALL] if specs == ALL else applicable(search)), "full"])
        for limit in LIMITS:
            path = [one for one in path_of(tried, limit) if one.cost < 1 / 1.05]
            if not path:
                continue  # nothing saves 5%, so there is nothing to promise
            policies = [one.policy for one in path]
            losses = np.stack([losses_under(pool, one, RISKS[risk]) for one in policies], axis=1)
            costs = np.array([measure(pool, one).cost for one in policies])
            for rows, confidence in product(ROWS, CONFIDENCES):
                facts = {"risk": risk, "search": specs, "limit": limit}
                facts |= {"rows": rows, "confidence": confidence}
                found = drawn(losses, costs, risk, limit, rows, confidence, draws)
                true = losses.mean(axis=0) <= limit
                best = float(costs[true].min()) if true.any() else 1.0
                yield facts | {"tried": len(tried), "path": len(path), "best": best, **found}


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
    exact = RISKS[risk].whole and RISKS[risk].lowest == 0
    true, rng = losses.mean(axis=0), np.random.default_rng(0)
    places: dict[str, list[int | None]] = {name: [] for name in PROCEDURES}
    for _ in range(draws):
        some = losses[rng.integers(0, len(losses), rows)]
        for name, how in PROCEDURES.items():
            if how is None:
                within = np.flatnonzero(some.mean(axis=0) <= limit)
                place = int(within[np.argmin(costs[within])]) if len(within) else None
            else:
                test: Any = how[1] or ("binomial" if exact else "betting")
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
2 %, 90 % confidence, it costs at most half a layer of twelve more, 4.2 % of full depth. Of a
single policy no test of losses of 0 and 1 is more powerful than the exact binomial one, so where
`disagreement` misses this, more rows are needed rather than another test. The plain choice gains
most where its promise is broken most.

| set | search | risk | 500 rows, 5 % | of plain | 1,000 rows, 2 % | more than plain |
|---|---|---|---|---|---|---|
"""
COST = """
## What it costs

Cost reduction at 95 % confidence; in brackets the share of draws broken. *best* is the fastest
policy of the path that is truly within the limit, which nobody knows; *of plain* the fixed
sequence's share of what the plain choice seems to save.
"""
SHOWN = ("plain choice", "fixed sequence", "Holm", "in expectation")


def page(results: dict[str, Any]) -> str:
    doc = (__doc__ or "").partition("\n\n")[2].strip("\n")
    text = INTRO.format(doc=doc, risks=", ".join(f"`{name}`" for name in RISKS))
    for (name, found), search in product(results.items(), ("usual", ALL)):
        for how in PROCEDURES:
            text += f"| {name} | {search} | {how} | {kept(found, search, how)} |\n"
    text += ASKED
    for (name, found), search in product(results.items(), ("usual", ALL)):
        text += "".join(f"| {name} | {search} | {line} |\n" for line in asked(found, search))
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
    for risk in RISKS:
        cells = {
            (cell["rows"], cell["limit"], cell["confidence"]): cell["outcomes"]
            for cell in found["cells"]
            if (cell["risk"], cell["search"]) == (risk, search)
        }
        wide, narrow = cells.get((500, 0.05, 0.95)), cells.get((1000, 0.02, 0.9))
        if wide is None or narrow is None:
            continue
        share = wide["plain choice"]["cost"] / wide["fixed sequence"]["cost"]
        more = narrow["fixed sequence"]["cost"] - narrow["plain choice"]["cost"]
        said = ("yes" if share >= 0.9 else "no", "yes" if more <= 0.5 / 12 else "no")
        yield f"`{risk}` | **{said[0]}** | {share:.0%} | **{said[1]}** | {more:.1%} of full depth"


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
    results = {}
    for name in given.names:
        file = given.docs / "certificates" / f"{name}.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        if found.get("draws") != given.draws:
            search, pool, run = tables_of(given.work, name)
            cells = list(tqdm(measured(search, pool, given.draws), desc=name))
            counts = {"searched": search.rows, "population": pool.rows, "run": run}
            found = {"draws": given.draws, **counts, "cells": cells}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, found)
        results[name] = found
    (given.docs / "certificates.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
