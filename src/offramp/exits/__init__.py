"""What answers at a layer."""

from offramp.exits.base import (
    EXITS,
    POOLINGS,
    Exit,
    ExitKind,
    ExitOutput,
    Exits,
    Host,
    Pooling,
    parse_exits,
    start_anew,
)
from offramp.exits.pooled import ExitSpec, PooledExit, PooledKind, check_pooling, mean_of_tokens
from offramp.registry import import_all

__all__ = [
    "EXITS",
    "POOLINGS",
    "Exit",
    "ExitKind",
    "ExitOutput",
    "ExitSpec",
    "Exits",
    "Host",
    "PooledExit",
    "PooledKind",
    "Pooling",
    "check_pooling",
    "mean_of_tokens",
    "parse_exits",
    "start_anew",
]

import_all(__name__, __path__)
