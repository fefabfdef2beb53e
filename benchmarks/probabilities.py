"""Are probabilities true, and do sets hold the right class? Writes docs/results/probabilities.md.

    python benchmarks/compare.py sst2; ... sick; ... uspto_50k      # makes the exit tables
    python benchmarks/probabilities.py [sst2 sick uspto_50k]

A point near 2x is chosen on the tune rows of `auto`, seed 1, by `max_probability`, with a
temperature for each exit (`--temperatures`). Calibration errors are of test rows. For the sets,
test rows are dealt into halves again and again: limits come from one half (`--sets`), and what is
covered is seen on the other.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from certificates import tables_of
from compare import DOCS

from offramp.calibration import calibrate
from offramp.calibration.conformal import ENOUGH, Sets, busy_exits
from offramp.calibration.point import OperatingPoint
from offramp.evaluation import evaluate
from offramp.policies import make_policy
from offramp.storage import write_json
from offramp.table import ExitTable, replay

SETS = ("sst2", "sick", "uspto_50k")
SHARES = (0.8, 0.9, 0.95)
HEAD = """\
# True probabilities, and sets of classes

{doc}

## Calibration error of each exit

Mean gap between probability and accuracy in bins of equal mass (ECE), in points, as the exit says
it → divided by its temperature. Temperatures make the labels of the tune rows likely; an exit that
was nearly true before has little to gain by that, and pays for what these rows differ by.

"""
COVERED = """
## Share of rows whose set holds the right class

Mean over {deals} deals of the test rows, which is at least what was asked if the promise holds, but
for the noise of so many deals of the same rows; beside it the least mean of any exit that has a
limit of its own (more than {enough} tune rows leave there), and the mean number of classes in a
set.

| set | asked | covered | of the worst exit | classes in a set |
|---|---|---|---|---|
"""


def errors(point: OperatingPoint, test: ExitTable) -> list[tuple[float, float]]:
    """Before and after, by exit."""
    found = evaluate(test, point)
    assert found.calibration_errors is not None
    assert found.calibrated_errors is not None
    return [*zip(found.calibration_errors, found.calibrated_errors, strict=True)]


def covered(
    point: OperatingPoint, tune: ExitTable, test: ExitTable, share: float, deals: int
) -> dict[str, float]:
    """Means over deals of the test rows into two halves."""
    policy, random = make_policy(point.policy), np.random.default_rng(0)
    done, labels = replay(test, policy), np.asarray(test.labels)
    own = busy_exits(replay(tune, policy).exit_layers, test.depth)
    leaves = done.exit_layers == np.arange(1, test.depth + 1)[:, None]  # (layers, rows)
    whole, by_exit, sizes = [], [], []
    for _ in range(deals):
        proof = random.permutation(test.rows) < test.rows // 2
        limits = Sets.fit(test.take(proof), policy, share, tune)
        inside = limits.of(done.answers, done.exit_layers)
        held = inside[np.arange(test.rows), labels]
        whole.append(held[~proof].mean())
        there = leaves[own] & ~proof
        by_exit.append((held & there).sum(axis=1) / there.sum(axis=1))
        sizes.append(inside[~proof].sum(axis=1).mean())
    return {
        "share": share,
        "covered": float(np.mean(whole)),
        "worst": float(np.mean(by_exit, axis=0).min()),
        "size": float(np.mean(sizes)),
    }


def measured(work: Path, name: str, deals: int) -> dict[str, Any]:
    tune, test, run = tables_of(work, name)
    how: dict[str, Any] = {"target_speedup": 2.0, "policies": ["max_probability"]}
    point = calibrate(tune, temperatures=True, **how).point
    return {
        "run": run,
        "rows": {"tune": tune.rows, "test": test.rows},
        "cost_reduction": evaluate(test, point).outcome.cost_reduction,
        "errors": errors(point, test),
        "sets": [covered(point, tune, test, share, deals) for share in SHARES],
    }


def page(results: dict[str, Any], deals: int) -> str:
    doc = (__doc__ or "").partition("\n\n")[2].strip("\n")
    depth = max(len(found["errors"]) for found in results.values())
    text = HEAD.format(doc=doc)
    heads = ["set", "rows of tune, test", "cost reduction", *map(str, range(1, depth + 1))]
    text += f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|\n"
    for name, found in results.items():
        cells = [f"{100 * a:.1f} → {100 * b:.1f}" for a, b in found["errors"]]
        facts = [name, "{tune:,}, {test:,}".format(**found["rows"])]
        cells = [*facts, f"{found['cost_reduction']:.2f}x", *cells, *[""] * (depth - len(cells))]
        text += "| " + " | ".join(cells) + " |\n"
    text += COVERED.format(deals=deals, enough=ENOUGH)
    for name, found in results.items():
        for one in found["sets"]:
            figures = [f"{one[key]:.1%}" for key in ("share", "covered", "worst")]
            text += f"| {name} | {' | '.join(figures)} | {one['size']:.2f} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=SETS, metavar="SET")
    parser.add_argument("--deals", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path("runs/compare"))
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args()
    results = {name: measured(given.work, name, given.deals) for name in given.names}
    write_json(given.docs / "probabilities.json", {"deals": given.deals, "sets": results})
    text = page(results, given.deals)
    (given.docs / "probabilities.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
