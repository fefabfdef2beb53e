"""A benchmark as one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from offramp.benchmark import words
from offramp.benchmark.document import BASELINE, Bench, Contender, Timing, Workload
from offramp.report.templates import write_html

_KINDS = {"plain": "plain", "full": "", "early": "good"}
"""Classes of the bars."""


def write_page(bench: Bench, path: Path) -> Path:
    """Write the figures as a page that asks for nothing; gives the path.

    Raises:
        OutputError: the path is a folder, or cannot be written.
    """
    return write_html(
        path,
        "benchmark",
        title=bench.model,
        bench=bench,
        early=[one for one in bench.contenders if one.leaves is not None],
        weighed=sorted(
            (one for one in bench.contenders if one.peak_megabytes is not None),
            key=lambda one: one.peak_megabytes or 0.0,
        ),
        baseline=BASELINE,
        ranked=_ranked,
        kind=lambda name: _KINDS[_kind(bench.named(name))],
        words=words,
        data=bench.model_dump(mode="json"),
    )


def _ranked(workload: Workload) -> list[Timing]:
    """The fastest first."""
    return sorted(workload.timings, key=lambda one: one.ms.median)


def _kind(contender: Contender) -> str:
    if contender.side == "plain":
        return "plain"
    return "full" if contender.leaves is None else "early"
