"""Does a watch raise its alarm where a promise breaks, and hardly elsewhere?

    python benchmarks/monitoring.py [--streams 200] [--rows 100000] [--runs 300] [--late]

Writes docs/results/monitoring.md. The promise is that at most 1 % of answers differ from those of
full depth; streams are drawn with a true share of their own. Every row is audited, so a stream of
100,000 rows is as hard as ten million of which one in a hundred is. Beside `Monitor` stands
`RiskMonitoring` of MAPIE, told the same limit, on the same rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from mapie.exchangeability_testing import RiskMonitoring
from scipy.stats import binomtest
from tqdm import tqdm

from offramp.calibration import Monitor

DOCS = Path(__file__).parents[1] / "docs" / "results"
LIMIT, LEVEL = 0.01, 0.05
Floats = npt.NDArray[np.float64]
WATCHED = Monitor(
    point="p", seal="", risk="disagreement", limit=LIMIT, level=LEVEL, expected=(1.0,)
)


def stream(share: float, rows: int, seed: int) -> Floats:
    return (np.random.default_rng(seed).random(rows) < share).astype(np.float64)


def alarm(losses: Floats) -> int | None:
    """Audited rows until the alarm."""
    return WATCHED.after(losses.tolist()).alarm_at


def mapies_alarm(losses: Floats) -> int | None:
    """Rows until MAPIE's lower bound of the risk is above the limit for the first time."""
    # half of its level is for rows of reference, even where there are none
    other = RiskMonitoring("accuracy", test_level=2 * LEVEL, threshold=LIMIT, warn=False)
    other.update(np.zeros(len(losses), dtype=int), losses.astype(int))
    above = np.flatnonzero(other.online_risk_lower_bound_sequence_history > LIMIT)
    return int(above[0]) + 1 if len(above) else None


def false_alarms(streams: int, rows: int) -> Iterator[str]:
    for share in (LIMIT, LIMIT / 2):
        found = [alarm(stream(share, rows, seed)) for seed in tqdm(range(streams), desc="at rest")]
        count = sum(one is not None for one in found)
        high = binomtest(count, streams).proportion_ci(0.95).high
        seen = f"{count} ({count / streams:.1%}, at most {high:.1%})"
        yield f"{share:.1%} | {streams} | {rows:,} | {seen}"


def delays(runs: int) -> Iterator[str]:
    """After a while at half the limit, or from the start, the share of losses rises."""
    for before, share in [(0, 0.02), (0, 0.03), (0, 0.05), (5000, 0.03), (5000, 0.05)]:
        ours: list[int | None] = []
        theirs: list[int | None] = []
        for seed in tqdm(range(runs), desc=f"to {share:.0%}"):
            losses = np.append(stream(LIMIT / 2, before, seed), stream(share, 8000, runs + seed))
            ours.append(alarm(losses))
            theirs.append(mapies_alarm(losses))
        yield f"{share:.0%} | {before:,} | {told(ours, before)} | {told(theirs, before)}"


def late_delays(runs: int) -> Iterator[str]:
    """As `delays`, after a promise that was kept for long."""
    share = 0.05
    for rest in (LIMIT / 2, LIMIT):
        for before in (5_000, 20_000, 100_000):
            run = partial(late_alarm, before, rest, share, runs)
            with ProcessPoolExecutor() as pool:
                found = list(tqdm(pool.map(run, range(runs)), total=runs, desc=f"{before:,}"))
            yield f"{rest:.1%} | {before:,} | {told(found, before)}"


def late_alarm(before: int, rest: float, share: float, runs: int, seed: int) -> int | None:
    return alarm(np.append(stream(rest, before, seed), stream(share, 8000, runs + seed)))


def told(alarms: list[int | None], before: int) -> str:
    """Median and 95th percentile of the delay, and the share within 500 and 2,000 rows."""
    # an alarm before the change is a false one
    waits = np.array([np.inf if one is None or one <= before else one - before for one in alarms])
    middle, late = np.quantile(waits, (0.5, 0.95), method="higher")
    shares = [f"{np.mean(waits <= most):.0%}" for most in (500, 2000)]
    return " | ".join(
        [*("never" if np.isinf(one) else f"{one:,.0f}" for one in (middle, late)), *shares]
    )


PAGE = """\
# Watching a promise

{doc}

## At rest

Alarms are false here; {level:.0%} of streams may have one, ever. In brackets the share, and the
upper end of its 95 % interval.

| true share | streams | audited rows of each | false alarms |
|---|---|---|---|
{rest}

## When it breaks

Audited rows from the change to the alarm, {runs} runs of 8,000 rows after the change; *before* it
the true share is 0.5 %. MAPIE's bound is for risks of any kind and recomputed from all rows.

*500* and *2,000* are the shares of runs in which the alarm came within so many rows; *late* is the
95th percentile.

| true share | rows before | median | late | 500 | 2,000 | MAPIE: median | late | 500 | 2,000 |
|---|---|---|---|---|---|---|---|---|---|
{breaks}
"""
LATE = """
## When it breaks late

`--late`; {runs} runs to a true share of 5 %. The longer a promise was kept, the later it is seen
to break: an alarm that is false in {level:.0%} of streams *ever* can bet less and less on new rows.

| at rest | rows before | median | late | 500 | 2,000 |
|---|---|---|---|---|---|
{breaks}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--late", action="store_true", help="the last part of the page alone")
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args()
    page = given.docs / "monitoring.md"
    text = page.read_text(encoding="utf-8") if given.late else whole(given)
    breaks = "\n".join(f"| {line} |" for line in late_delays(given.runs))
    late = LATE.format(runs=given.runs, level=LEVEL, breaks=breaks)
    page.write_text(text.partition("\n## When it breaks late")[0] + late, encoding="utf-8")


def whole(given: argparse.Namespace) -> str:
    """The page but for its last part."""
    doc = (__doc__ or "").partition("\n\n")[2].strip("\n")
    return PAGE.format(
        doc=doc,
        level=LEVEL,
        runs=given.runs,
        rest="\n".join(f"| {line} |" for line in false_alarms(given.streams, given.rows)),
        breaks="\n".join(f"| {line} |" for line in delays(given.runs)),
    )


if __name__ == "__main__":
    main()
