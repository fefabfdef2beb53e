"""Claims about the one file: whoever leaves where, it says what torch says, and wastes no node."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

import onnx
from engine_fixtures import BAND

from offramp.engines import Budget, Engine, TorchEngine, make_engine, rows_of
from offramp.engines.assembly import all_read, bodies
from offramp.engines.graphs import Graphs
from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.model import MultiExitModel
from offramp.policies import MaxProbability, Patience, Policy, Rows, State, Step
from offramp.prediction import Predictor
from offramp.testing.tiny import tiny_batch_for, tiny_model, tiny_processor, tiny_texts

pytest_plugins = ("engine_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")
DEPTH = 4


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return tiny_model("bert", layers=DEPTH)


class _Even(MaxProbability):
    """Looks at every other exit."""

    name = "even"

    def reads(self, layer: int) -> bool:
        return layer % 2 == 0


class _Own(Policy):
    """Goes by the row's number and length, and begins to remember scores in the middle."""

    name = "own"
    first: int = 1

    def reads(self, layer: int) -> bool:
        return layer >= self.first

    def start(self, rows: Rows) -> State:
        return {"number": rows.ids + rows.lengths}

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        kept = state.get("scores", torch.zeros_like(output.scores))
        after = {"number": state["number"]}
        if layer >= 2:
            after["scores"] = output.scores + kept
        return Step((state["number"] + layer) % 3 == 0, output.scores + kept, after)


def said_alike(engine: Engine, model: MultiExitModel, policy: Policy, budget: Budget) -> int:
    """How many rows left on the way."""
    batch = tiny_batch_for(model.stock, 12, seed=4)
    rows = rows_of(batch)
    ours = engine.run(batch, policy, rows, budget)
    theirs = TorchEngine(model).run(batch, policy, rows, budget)
    assert torch.equal(ours.exit_layers, theirs.exit_layers), (policy, budget)
    torch.testing.assert_close(ours.scores, theirs.scores, atol=BAND, rtol=BAND)
    nobody = torch.zeros_like(theirs.bad)
    forced = [nobody if one.forced is None else one.forced for one in (ours, theirs)]
    assert torch.equal(*forced)
    return int((ours.exit_layers < DEPTH).sum())


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_rows_leave_as_in_torch_wherever_the_first_decision_is(
    model: MultiExitModel, backend: str
) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(backend, backend))
    engine = make_engine(model, backend, progress=False)
    for policy in (_Even(threshold=0.45), _Own(), _Own(first=2), _Own(first=3)):
        for depth in (None, 1, 2, 3):
            left = said_alike(engine, model, policy, Budget(depth=depth))
            assert left > 0


@pytest.mark.parametrize(
    "policy", [MaxProbability(), _Even(), Patience(patience=1), _Own(first=2)], ids=str
)
def test_no_node_and_no_weight_of_a_file_goes_unread(model: MultiExitModel, policy: Policy) -> None:
    for deepest in (DEPTH, 3):
        graph = Graphs(model, progress=False).early_exit(policy, deepest).graph
        for body in within(graph):
            read = all_read(body.node) | {value.name for value in body.output}
            assert all(read.intersection(node.output) for node in body.node)
            assert {weight.name for weight in body.initializer} <= read


def within(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all bodies in it."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from within(body)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("onnx", "fp32"), ("onnx", "int8"), ("openvino", "fp32")]
)
def test_a_stream_that_is_the_same_in_any_company_runs_row_by_row(
    model: MultiExitModel, backend: str, dtype: str
) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(backend, backend))
    engine = make_engine(model, backend, dtype, progress=False)
    policy = MaxProbability(threshold=0.45)
    predictor = Predictor(model, tiny_processor("bert"), policy, engine=engine)
    texts, draw = tiny_texts(40, seed=4), random.Random(0)
    wanted = dict(predictor.stream(texts, determinism="shape"))
    assert len({answer.exit_layer for answer in wanted.values()}) > 1
    for _ in range(50):
        company = draw.sample(range(40), draw.randint(1, 12))
        asked = (texts[place] for place in company)
        for place, answer in predictor.stream(asked, determinism="shape"):
            same = wanted[company[place]]
            assert answer.exit_layer == same.exit_layer
            assert answer.scores.tobytes() == same.scores.tobytes()
    endless = (text for turn in itertools.count() for text in texts)
    asked = predictor.stream(endless, determinism="shape")
    assert [place for place, _ in itertools.islice(asked, 3)] == [0, 1, 2]
    assert next(endless) == texts[3], "a row is answered before the next one is read"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"determinism": "bits"}, "'bits' is unknown"),
        ({"slots": 8}, "slots=8 is for backends torch and inductor"),
        ({"ahead": 0}, "ahead=0"),
    ],
)
def test_a_file_has_no_slots_to_fill(
    model: MultiExitModel, option: dict[str, Any], said: str
) -> None:
    engine = make_engine(model, "onnx", progress=False)
    predictor = Predictor(model, tiny_processor("bert"), "full", engine=engine)
    with pytest.raises(ConfigError, match=said):
        predictor.stream(["A dull story."], **option)
