"""A fixture for comparisons whose runs are no processes."""

from __future__ import annotations

import pytest
from comparison_support import in_this_process

from offramp.comparison.plan import Cell


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The runs that were begun, in order; they are not processes."""
    return in_this_process(monkeypatch)
