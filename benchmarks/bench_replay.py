"""How long 1,000 thresholds take on a table of 100,000 rows and 12 exits, without a model.

    OMP_NUM_THREADS=2 python benchmarks/bench_replay.py

Every threshold gives its exit layers, accuracy, disagreement and cost.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from offramp.calibration import calibrate
from offramp.calibration.judge import Judge
from offramp.policies import Entropy, EvidencePolicy, Margin, MaxProbability
from offramp.table import ExitTable, evidence_matrix, replay

ROWS, DEPTH, CLASSES, BARS = 100_000, 12, 3, 1_000


def made_up_table(seed: int = 0) -> ExitTable:
    """Scores that get surer with depth, sooner on easy rows."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, ROWS)
    scores = rng.normal(size=(ROWS, DEPTH, CLASSES)).astype(np.float32)
    sure = np.arange(1, DEPTH + 1) / rng.exponential(3, size=(ROWS, 1))
    scores[np.arange(ROWS), :, labels] += sure.astype(np.float32)
    return ExitTable.from_arrays(
        scores,
        problem_type="single_label_classification",
        labels=labels,
        exit_cost=np.full((ROWS, DEPTH), 0.01),
    )


def seconds_of_sweep(table: ExitTable, policy: EvidencePolicy) -> float:
    known = evidence_matrix(table, policy)
    bars = np.linspace(known.min(), known.max(), BARS)
    started = time.perf_counter()
    outcomes = list(Judge(table).sweep(policy, bars))
    seconds = time.perf_counter() - started
    assert len(outcomes) == BARS
    return seconds


def main() -> None:
    torch.set_num_threads(2)
    table = made_up_table()
    print(f"{ROWS:,} rows, {DEPTH} exits, {CLASSES} classes, {torch.get_num_threads()} threads")
    for policy in (Entropy(), MaxProbability(), Margin()):
        seconds = seconds_of_sweep(table, policy)
        print(f"{policy.name:16} {BARS:,} thresholds  {seconds:6.2f} s")
    started = time.perf_counter()
    replay(table, Entropy())
    print(f"{'entropy':16} one replay        {time.perf_counter() - started:6.2f} s")
    started = time.perf_counter()
    found = calibrate(table, max_drop="1%")
    seconds = time.perf_counter() - started
    print(f"{'calibrate':16} {len(found.frontier):,} candidates    {seconds:6.2f} s")


if __name__ == "__main__":
    main()
