"""What page and command line say of a benchmark, in one wording."""

from __future__ import annotations

from offramp.benchmark.document import Bench, Spread, Timing, Workload

FORCED = (
    "Where rows leave is forced, names say so: exits and a policy run at every layer, but a "
    "pattern decides who leaves, in every batch at layers all around the mean that is named. So "
    "these figures say what leaving saves, and nothing about answers."
)
POOL = (
    "A depth pool takes the rows of the stream one by one, as `Predictor.stream` does: rows of all "
    "depths run in one batch, and those that leave make room for the next."
)
_POINT = "point "
TIMES = "\N{MULTIPLICATION SIGN}"


def about(seconds: float) -> str:
    """'40 s', '3 min', '2.1 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def figure(value: float) -> str:
    """Three digits: '0.123', '4.56', '78.9', '1,234'."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"


def times(spread: Spread) -> str:
    return f"{spread.median:.2f}{TIMES}"


def quartiles(spread: Spread) -> str:
    return f"{figure(spread.low)} to {figure(spread.high)}"


def title(workload: Workload) -> str:
    """What is asked of it."""
    if workload.batch_size is None:
        return "A stream of rows as they come"
    if workload.batch_size == 1:
        return "One row at a time"
    return f"Batches of {workload.batch_size}"


def headline(bench: Bench) -> str:
    """Early exit, halfway between the strictest and the laxest, beside what a user has without.

    Where rows leave at a point, force is not what counts.
    """
    workload = bench.workloads[0]
    leaves = list(dict.fromkeys(one.leaves for one in bench.contenders if one.leaves))
    leaves = [one for one in leaves if one.startswith(_POINT)] or leaves
    middle = leaves[(len(leaves) - 1) // 2] if leaves else None
    names = [one.name for one in bench.contenders if one.leaves and one.leaves == middle]
    early = workload.fastest(names)
    plain = workload.fastest(bench.names("plain", full_model=True))
    if plain is None or early is None:
        return "No engine of offramp could take part."
    ratio = workload.times(early.contender, plain.contender)
    whom = f"the fastest runtime without offramp, {plain.contender} ({_ms(plain)})"
    how = "slower than" if ratio.median < 1 else f"{times(ratio)} as fast as"
    where = f", both on {_threads(bench.threads)}" if bench.others else ""
    return f"{title(workload)}, {early.contender} ({_ms(early)}) is {how} {whom}{where}."


def threads(bench: Bench) -> str:
    """Which number of threads is the fastest; empty where only one was tried."""
    if not bench.others:
        return ""
    tried = ", ".join(map(str, sorted([bench.threads, *(one.threads for one in bench.others)])))
    return (
        f"Of {tried} threads, {bench.threads} did best by the geometric mean over contenders and "
        "workloads. Each number had a race of its own, one after the other."
    )


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def exits(bench: Bench) -> str:
    """Where rows leave, and where others take their places."""
    leaves = dict.fromkeys(one.leaves for one in bench.contenders if one.leaves)
    said = [f"Rows leave at the operating {one}." for one in leaves if one.startswith(_POINT)]
    pooled = any(one.pool for one in bench.contenders)
    return " ".join([*said, *([FORCED] if bench.forced else []), *([POOL] if pooled else [])])


def _ms(timing: Timing) -> str:
    return f"{figure(timing.ms.median)} ms"
