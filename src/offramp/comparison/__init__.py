"""Methods of early exit side by side, on one model and one set of rows."""

from offramp.comparison.running import Compared, compare

__all__ = ["Compared", "compare"]
