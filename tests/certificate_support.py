"""The table that tests of certificates share."""

from __future__ import annotations

import numpy as np

from offramp import ExitTable

DEPTH = 6


def table_of(rows: int, seed: int = 0, role: str = "tune", labelled: bool = True) -> ExitTable:
    """Exits that know more the deeper they are, and know how sure they are."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, rows)
    ease = rng.normal(1.5, 1.5, rows)[:, None]
    margins = ease * np.linspace(0.6, 1.6, DEPTH) + rng.normal(0, 0.7, (rows, DEPTH))
    signed = np.where(truth[:, None] == 1, margins, -margins)
    return ExitTable.from_arrays(
        np.stack((-signed, signed), axis=-1),
        ids=rng.permutation(10 * rows)[:rows] + 10**6 * seed,
        problem_type="single_label_classification",
        labels=truth if labelled else None,
        role=role,
    )
