"""Equal layers are traced once, and only equal ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("onnxscript", reason="needs the extra onnx")

from onnx.reference import ReferenceEvaluator
from transformers import AutoModelForSequenceClassification

from offramp.engines import exporting
from offramp.engines.alike import Values, follow
from offramp.engines.assembly import assemble, assemble_all, bodies
from offramp.engines.exporting import Exports
from offramp.engines.tracing import Traced, trace_model, trace_policy
from offramp.errors import ModelError
from offramp.exits import ExitSpec
from offramp.model import MultiExitModel
from offramp.policies import MaxProbability, Patience
from offramp.testing.tiny import tiny_batch_for, tiny_model


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one with each part that torch traces."""
    monkeypatch.setattr(exporting, "_MOULDS", {})
    calls: list[Any] = []
    export = torch.export.export

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(given)
        return export(*given, **named)

    monkeypatch.setattr(torch.export, "export", counted)
    return calls


def _is_right(traced: Traced, model: MultiExitModel, tokens: int = 9) -> None:
    """Every exit of the file says what the model says."""
    batch = tiny_batch_for(model.stock, 6, tokens=tokens, seed=3)
    file = assemble_all(traced.embedding, traced.layers)
    wanted = [value.name for value in file.graph.input]
    feed = {name: leaf.numpy() for name, leaf in batch.items() if name in wanted}
    feed.setdefault("token_type_ids", torch.zeros_like(batch["input_ids"]).numpy())
    names = [f"scores/{layer}" for layer in range(1, model.depth + 1)]
    ours = ReferenceEvaluator(file).run(names, {name: feed[name] for name in wanted})
    for one, output in zip(ours, model.all_exits(batch), strict=True):
        torch.testing.assert_close(torch.tensor(one), output.scores, atol=1e-4, rtol=0)


def test_layers_that_differ_in_weights_are_traced_once(traces: list[Any]) -> None:
    model = tiny_model("bert", layers=5)
    traced = trace_model(model)
    assert len(traces) == 3  # the embedding, layers 1 to 4, and the last one with the head
    _is_right(traced, model)
    traces.clear()
    trace_policy(MaxProbability(threshold=0.5), traced.outputs)
    assert len(traces) == 2  # at the last layer all leave
    traces.clear()
    trace_policy(Patience(patience=2), traced.outputs)
    assert len(traces) == 3  # and at the first there is nothing to remember yet
    traces.clear()
    other = tiny_model("bert", layers=4, seed=1)
    again = trace_model(other)
    assert not traces  # nor is another model of this kind
    _is_right(again, other)
    names = {weight.name for weight in again.layers[2].graph.initializer}
    assert "owner.exits.3.classifier.weight" in names


def test_layers_that_differ_in_more_are_traced_each(traces: list[Any]) -> None:
    model = tiny_model("bert", layers=4)
    layers = model.backbone.layers
    _look_at_first(layers[0], 30)
    _look_at_first(layers[1], 40)
    layers[2].output.LayerNorm.bias = layers[2].output.dense.bias  # one weight in two places
    traced = trace_model(model)
    assert len(traces) == 5
    _is_right(traced, model, tokens=60)


def _look_at_first(layer: Any, window: int) -> None:
    """Lets a layer add the mean of a window of its own."""
    run = layer.forward

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        first: torch.Tensor = hidden[:, :window].mean(dim=1, keepdim=True)
        return run(hidden, *args, **kwargs) + first

    layer.forward = forward


def test_no_weights_are_kept_for_the_next_model(traces: list[Any]) -> None:
    model = tiny_model("bert", layers=2)
    trace_model(model)
    kept = [
        value for mould in exporting._MOULDS.values() for value in mould.graph.initializers.values()
    ]
    held = [value.const_value for value in kept if value.name.startswith("weight.")]
    assert len(held) == 6 + 18 + 20
    assert not any(held)
    assert not any(value.name.startswith("owner.") for value in kept)


def test_a_graph_that_says_something_else_is_not_used(
    traces: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("bert", layers=3)
    monkeypatch.setattr("offramp.engines.exporting._near", lambda ours, theirs: False)
    traced = trace_model(model)
    assert len(traces) == 4
    _is_right(traced, model)


def _steps(run: Callable[[Values], torch.Tensor], *weights: torch.Tensor) -> str:
    given = {"x": torch.ones(2, 3), "y": torch.ones(2, 3)}
    return follow(lambda one: {"out": run(one)}, given, {id(leaf) for leaf in weights}).steps


A, B = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])


def test_parts_are_alike_where_only_weights_differ() -> None:
    assert _steps(lambda one: one["x"] * A + B, A, B) == _steps(lambda one: one["x"] * B + A, A, B)


@pytest.mark.parametrize(
    "other",
    [
        lambda one: one["x"] * A + A,
        lambda one: one["y"] * A + B,
        lambda one: one["x"] * A - B,
        lambda one: B + one["x"] * A,
        lambda one: torch.add(one["x"] * A, B, alpha=2),
        lambda one: one["x"] * A + B.clone(),
        lambda one: one["x"] * A + torch.tensor([4.0, 5.0, 6.0]),
    ],
)
def test_parts_are_not_alike_where_anything_else_does(
    other: Callable[[Values], torch.Tensor],
) -> None:
    assert _steps(lambda one: one["x"] * A + B, A, B) != _steps(other, A, B)


def test_a_part_that_cannot_be_followed_is_refused_with_the_mend() -> None:
    def sparse(given: Values) -> Values:
        return {"out": torch.mm(torch.eye(3).to_sparse(), given["x"])}

    given = [{"x": torch.ones(3, rows)} for rows in (2, 4)]
    with pytest.raises(ModelError, match=r"Layer 1 cannot be a graph.*backend='torch'"):
        Exports().graph(sparse, given, "layer 1")


def test_constants_are_told_apart_by_their_values() -> None:
    assert _steps(lambda one: one["x"] * A) != _steps(lambda one: one["x"] * B)
    again = A.clone()
    assert _steps(lambda one: one["x"] * A) == _steps(lambda one: one["x"] * again)


def test_a_wide_window_is_kept_for_texts_that_are_longer_than_it(traces: list[Any]) -> None:
    """One that is wider than both batches a model is traced on."""
    config = tiny_model("modernbert", layers=2).stock.config
    config.local_attention, config.max_position_embeddings = 320, 256
    torch.manual_seed(0)
    stock = AutoModelForSequenceClassification.from_config(config)
    model = MultiExitModel.from_stock(stock, ExitSpec(pooling="mean")).eval()
    traced = trace_model(model)
    tables = [v for v in traced.embedding.graph.output if "attention_mask" in v.name]
    sizes = [table.type.tensor_type.shape.dim[2].dim_value for table in tables]
    assert sorted(sizes) == [0, 1]  # free for the window, one for the layers that see all
    _is_right(traced, model, tokens=200)


def test_a_weight_stands_in_the_body_that_reads_it_and_padding_once_for_a_row() -> None:
    model = tiny_model("bert", layers=3)
    traced = trace_model(model)
    decisions = trace_policy(MaxProbability(threshold=0.5), traced.outputs)
    file = assemble(traced.embedding, traced.layers, decisions).graph
    ifs = [bodies(node) for node in file.node if node.op_type == "If"]
    inside = [{weight.name for body in two for weight in body.initializer} for two in ifs]
    assert len(inside) == 2
    assert "layer2.owner.exits.2.classifier.weight" in inside[0]
    assert not any(weight.name.startswith(("layer2", "layer3")) for weight in file.initializer)
    (mask,) = [value for value in traced.embedding.graph.output if "attention_mask" in value.name]
    assert mask.type.tensor_type.shape.dim[2].dim_value == 1
