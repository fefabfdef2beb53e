"""Engines and precisions side by side, and what a user has without them: `bench`."""

from offramp.benchmark.bench import bench
from offramp.benchmark.document import Bench

__all__ = ["Bench", "bench"]
