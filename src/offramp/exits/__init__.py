"""Modules that answer at a layer."""

from offramp.exits.base import Exit, ExitOutput
from offramp.exits.pooled import POOLINGS, ExitSpec, PooledExit, Pooling, mean_of_tokens

__all__ = ["POOLINGS", "Exit", "ExitOutput", "ExitSpec", "PooledExit", "Pooling", "mean_of_tokens"]
