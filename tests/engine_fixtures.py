"""What the tests of engines that run files share: one thread, and models that are made once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from offramp.model import MultiExitModel
from offramp.testing.tiny import tiny_model

BAND = 5e-5
"""Two runtimes add up in another order."""
BROKEN = 4
"""A token that no batch holds by itself, `[MASK]`; it is embedded as NaN."""


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bert_model() -> MultiExitModel:
    """The same for all engines, so that its files are made once, whoever needs them."""
    model = tiny_model("bert", layers=3)
    with torch.no_grad():
        model.stock.get_input_embeddings().weight[BROKEN] = torch.nan
    return model
