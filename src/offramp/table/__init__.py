"""The exit table: record once, replay any policy on it without the model."""

from offramp.table.header import Column, ProblemType, Role, TableHeader
from offramp.table.replay import (
    Replay,
    answer_matrix,
    evidence_matrix,
    executed_cost,
    histogram,
    replay,
    sweep,
)
from offramp.table.store import (
    ExitTable,
    TableWriter,
    concatenate,
    overlap,
    refuse_overlap,
    require_role,
)

__all__ = [
    "Column",
    "ExitTable",
    "ProblemType",
    "Replay",
    "Role",
    "TableHeader",
    "TableWriter",
    "answer_matrix",
    "concatenate",
    "evidence_matrix",
    "executed_cost",
    "histogram",
    "overlap",
    "refuse_overlap",
    "replay",
    "require_role",
    "sweep",
]
