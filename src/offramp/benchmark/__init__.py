"""Engines and precisions side by side, and what a user has without them: `bench`."""

from offramp.benchmark.document import Bench
from offramp.benchmark.running import bench

__all__ = ["Bench", "bench"]
