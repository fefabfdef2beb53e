"""The ONNX engine finds the exits that the torch engine finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

from offramp.engines.onnx_engine import OnnxEngine
from offramp.model import MultiExitModel
from offramp.policies import (
    MaxProbability,
    Patience,
)
from offramp.testing import check_engine
from offramp.testing.tiny import tiny_model

BAND = 5e-5
"""Two runtimes add up in another order."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def bert(cache: Path) -> tuple[MultiExitModel, OnnxEngine]:
    model = tiny_model("bert", layers=4)
    return model, OnnxEngine(model, progress=False)


@pytest.mark.parametrize(
    "arch", ["bert", "albert", "roberta", "distilbert", "modernbert", "deberta-v2", "vit"]
)
def test_it_does_what_the_slow_twin_does(arch: str, cache: Path) -> None:
    model = tiny_model(arch, layers=3)
    policies = [MaxProbability(threshold=0.45), Patience(patience=1)]
    engine = OnnxEngine(model, progress=False)
    check_engine(lambda _: engine, model, policies, rows=16, band=BAND, compiled=True)
