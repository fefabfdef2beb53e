"""The inductor engine finds the exits that the torch engine finds, with few graphs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import Said
from engine_fixtures import BAND
from torch import _dynamo as dynamo

from offramp.benchmark.contenders import line_up
from offramp.benchmark.running import _on_device
from offramp.engines import TorchEngine, make_engine
from offramp.engines.inductor_engine import InductorEngine
from offramp.errors import ConfigError
from offramp.model import MultiExitModel
from offramp.policies import Full, MaxProbability, Patience
from offramp.testing import check_engine, tiny_batch
from offramp.testing.tiny import tiny_batch_for, tiny_model, tiny_texts, tiny_tokenizer

pytest_plugins = ("cli_fixtures", "engine_fixtures")
COMPILERS = (os.environ.get("CXX", "g++"), "clang++", "c++")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return tiny_model(layers=3)


@pytest.fixture(scope="module")
def engine(model: MultiExitModel) -> InductorEngine:
    made = make_engine(model, "inductor")
    assert isinstance(made, InductorEngine)
    return made


def _graphs() -> int:
    return int(dynamo.utils.counters["stats"]["unique_graphs"])


def test_few_graphs_serve_all_layers_and_a_thousand_requests_of_random_shape(
    model: MultiExitModel, engine: InductorEngine
) -> None:
    before, policy = _graphs(), MaxProbability(threshold=0.45)
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 9, (1030,), generator=draw).tolist()
    lengths = torch.randint(3, 33, (1030,), generator=draw).tolist()
    engine.run(tiny_batch(5, 5, padded=False), policy)  # as many rows as tokens
    warm: list[int] = []
    for rows, tokens in zip(sizes, lengths, strict=True):
        engine.run(tiny_batch(rows, tokens, padded=rows % 2 == 0), policy)
        warm.append(_graphs())
    assert warm[-1] - before <= 6
    assert warm[-1] == warm[30]


def test_it_does_what_the_slow_twin_does(model: MultiExitModel, engine: InductorEngine) -> None:
    policies = [MaxProbability(threshold=0.45), Patience(patience=1)]

    def make(one: Any) -> TorchEngine:
        if one is model:
            return engine
        return (InductorEngine if hasattr(one.backbone, "through") else TorchEngine)(one)

    check_engine(make, model, policies, rows=16, band=BAND, compiled=True)


@pytest.mark.parametrize("arch", ["albert", "modernbert", "deberta-v2", "cifar_resnet"])
def test_it_does_so_on_other_architectures(arch: str) -> None:
    model = tiny_model(arch, layers=2 if arch != "cifar_resnet" else 3)
    batch, policy = tiny_batch_for(model.stock, 5), MaxProbability(threshold=0.45)
    engine = InductorEngine(model)
    with ThreadPoolExecutor(1) as thread:  # which is not the one that made the engine
        found = thread.submit(engine.run, batch, policy).result()
    wanted = TorchEngine(model).run(batch, policy)
    assert torch.equal(found.exit_layers, wanted.exit_layers)
    torch.testing.assert_close(found.scores, wanted.scores, atol=BAND, rtol=0)


def test_an_engine_says_so_where_it_has_no_room_for_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(layers=2)
    monkeypatch.setattr("offramp.engines.inductor_engine.GRAPHS", 2)
    engine = InductorEngine(model)
    with ThreadPoolExecutor(1) as thread:
        for batch in (tiny_batch(1, 9, padded=False), tiny_batch(3, 9, padded=False)):
            thread.submit(engine.run, batch, Full()).result()
        with pytest.raises(ConfigError, match="cannot be compiled here"):
            thread.submit(engine.run, tiny_batch(4, 9), Full()).result()


def test_the_model_itself_is_not_compiled(model: MultiExitModel, engine: InductorEngine) -> None:
    batch = tiny_batch(4, 11)
    engine.run(batch, MaxProbability())
    made = _graphs()
    with torch.inference_mode():
        model.all_exits(tiny_batch(7, 30))
    TorchEngine(model).run(batch, MaxProbability())
    assert _graphs() == made


def test_the_command_line_knows_it(
    model: MultiExitModel, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    model.save_pretrained(tmp_path / "m", processor=tiny_tokenizer())
    asked = ("predict", tmp_path / "m", *tiny_texts(3), "--point", "full")
    compiled, plain = offramp(*asked, "--backend", "inductor"), offramp(*asked)
    assert compiled.code == 0, compiled.err
    answers = [[json.loads(line) for line in said.out.splitlines()] for said in (compiled, plain)]
    assert [one["label"] for one in answers[0]] == [one["label"] for one in answers[1]]


def test_what_cannot_be_compiled_says_so(
    model: MultiExitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    with pytest.raises(ConfigError, match=r"no compiler was found.*a C\+\+ compiler on a CPU"):
        InductorEngine(model).run(tiny_batch(2, 5), MaxProbability())


def test_a_backbone_that_cannot_be_told_is_refused(model: MultiExitModel) -> None:
    class Other:
        backbone = object()

    with pytest.raises(ConfigError, match="has no `through`"):
        InductorEngine(Other())  # type: ignore[arg-type]


def test_a_benchmark_has_them_on_our_side_alone_and_wherever_torch_runs() -> None:
    wanted = line_up(6, ["torch", "inductor"], ["fp32", "int8"], ["here"])
    assert [one.name for one in wanted if one.runtime == "inductor"] == [
        "offramp inductor fp32, full depth",
        "offramp inductor fp32, here",
    ]
    there, skipped = _on_device(wanted, torch.device("cuda"))
    assert there == wanted
    assert not skipped
