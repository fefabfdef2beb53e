"""What page and command line say of a benchmark, in one wording."""

from __future__ import annotations

from offramp.benchmark.document import Bench, Skipped, Spread, Timing, Workload

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
    """Ours beside the fastest that a user has without it."""
    if not bench.workloads:
        return "Nothing was measured."
    workload = bench.workloads[0]
    early = workload.fastest(bench.names("offramp", early=True))
    plain = workload.fastest(bench.names("plain", full_model=True))
    if plain is None or early is None:
        return "No engine of offramp could take part."
    ratio = workload.times(early.contender, plain.contender)
    verdict = "as fast" if ratio.median >= 1 else "as fast, which is slower,"
    return (
        f"{title(workload)}, {early.contender} takes {_ms(early)}: {times(ratio)} {verdict} as the "
        f"fastest runtime without offramp, {plain.contender} ({_ms(plain)})."
    )


def _ms(timing: Timing) -> str:
    return f"{figure(timing.ms.median)} ms"


def counted(skipped: Skipped) -> str:
    """'3 contenders'."""
    count = len(skipped.names)
    return "1 contender" if count == 1 else f"{count} contenders"
