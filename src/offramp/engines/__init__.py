"""Engines run a batch so that the layers that are not needed cost nothing."""

from offramp.engines.base import Answers, Engine, Exitable, rows_of
from offramp.engines.torch_engine import TorchEngine, take_tree

__all__ = ["Answers", "Engine", "Exitable", "TorchEngine", "rows_of", "take_tree"]
