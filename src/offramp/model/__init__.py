"""The multi-exit model, its config and its folder."""

from offramp.exits import ExitSpec
from offramp.model.configuration import MultiExitConfig
from offramp.model.modeling import MultiExitModel, MultiExitOutput
from offramp.model.stock import Head, load_stock
from offramp.model.truncation import truncated

__all__ = [
    "ExitSpec",
    "Head",
    "MultiExitConfig",
    "MultiExitModel",
    "MultiExitOutput",
    "load_stock",
    "truncated",
]
