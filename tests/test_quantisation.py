"""Claims about int8 graphs: small, close, and no row knows of its neighbours."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.errors import MissingExtraError, ModelError

reason = "needs the extra 'onnx'"
onnx = pytest.importorskip("onnx", reason=reason)
ort = pytest.importorskip("onnxruntime", reason=reason)

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from offramp.engines.quantisation import quantise  # noqa: E402

WIDTH, INNER, LABELS = 48, 96, 3


def weights(seed: int = 0) -> dict[str, Any]:
    drawn = np.random.default_rng(seed)
    shapes = {
        "query": (WIDTH, WIDTH),
        "value": (WIDTH, WIDTH),
        "up": (WIDTH, INNER),
        "down": (INNER, WIDTH),
        "head": (WIDTH, LABELS),
    }
    made = {k: drawn.normal(size=v).astype(np.float32) / 7 for k, v in shapes.items()}
    return made | {"bias": drawn.normal(size=INNER).astype(np.float32), "root": np.float32(7)}


def layer(stored: dict[str, Any] | None = None) -> Any:
    """Attention whose keys share the queries' weight, a feed-forward block, and a linear exit."""
    nodes = [
        ("MatMul", ["x", "query"], "q"),
        ("MatMul", ["x", "query"], "k"),
        ("MatMul", ["x", "value"], "v"),
        ("Transpose", ["k"], "kt", {"perm": [0, 2, 1]}),
        ("MatMul", ["q", "kt"], "raw"),
        ("Div", ["raw", "root"], "scaled"),
        ("Add", ["scaled", "mask"], "masked"),
        ("Softmax", ["masked"], "shares"),
        ("MatMul", ["shares", "v"], "mixed"),
        ("Add", ["x", "mixed"], "middle"),
        ("MatMul", ["middle", "up"], "wide"),
        ("Add", ["wide", "bias"], "wider"),
        ("Relu", ["wider"], "bent"),
        ("MatMul", ["bent", "down"], "hidden"),
        ("MatMul", ["hidden", "head"], "scores"),
    ]
    inputs = {"x": ["rows", "tokens", WIDTH], "mask": ["rows", 1, "tokens"]}
    return graph(nodes, inputs, ["hidden", "scores"], stored or weights())


def linear(weight: Any, kind: str = "MatMul", **attributes: Any) -> Any:
    inputs = ["x", "w"] if kind == "MatMul" else ["x", "w", "b"]
    stored = {"w": weight}
    if kind == "Gemm":
        stored["b"] = np.arange(weight.shape[0], dtype=np.float32)
    shape = ["rows", "wide"] if kind == "Gemm" else ["rows", "tokens", "wide"]
    return graph([(kind, inputs, "y", attributes)], {"x": shape}, ["y"], stored)


def graph(nodes: Any, inputs: Any, outputs: list[str], stored: dict[str, Any]) -> Any:
    def value(name: str, shape: Any) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    made = helper.make_graph(
        [helper.make_node(x[0], x[1], [x[2]], **dict(*x[3:])) for x in nodes],
        "layer",
        [value(k, v) for k, v in inputs.items()],
        [value(k, [None] * len(inputs["x"])) for k in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def session(model: Any) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def batch(rows: int, tokens: int, seed: int = 1) -> dict[str, Any]:
    drawn = np.random.default_rng(seed)
    # Rows of very different size: what a scale for the whole tensor could not serve.
    size = np.logspace(-1, 1, rows).reshape(-1, 1, 1)
    x = (drawn.normal(size=(rows, tokens, WIDTH)) * size).astype(np.float32)
    return {"x": x, "mask": np.zeros((rows, 1, tokens), dtype=np.float32)}


def one(feed: dict[str, Any], row: int) -> dict[str, Any]:
    return {k: v[row : row + 1] for k, v in feed.items()}


def stored(model: Any) -> dict[str, Any]:
    return {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}


@pytest.fixture(scope="module")
def small() -> Any:
    return quantise(layer(), ["hidden"])


@pytest.fixture(scope="module")
def run(small: Any) -> Any:
    found = session(small)
    return lambda feed: dict(zip(["hidden", "scores"], found.run(None, feed), strict=True))


def test_a_row_is_answered_alone_as_among_its_neighbours_to_the_bit(run: Any) -> None:
    feed = batch(16, 11)
    together = run(feed)
    for row in range(16):
        np.testing.assert_array_equal(run(one(feed, row))["hidden"][0], together["hidden"][row])


def test_a_token_does_not_depend_on_how_many_others_follow_to_the_bit() -> None:
    found = session(quantise(linear(weights()["up"]), ["y"]))
    x = batch(5, 40)["x"]
    long = found.run(None, {"x": x})[0]
    for tokens in (1, 7, 39):
        np.testing.assert_array_equal(found.run(None, {"x": x[:, :tokens]})[0], long[:, :tokens])


@pytest.mark.parametrize("padding", [1, 5, 54])
def test_padding_moves_a_row_no_more_than_it_does_in_float(run: Any, padding: int) -> None:
    feed, more = batch(1, 10), batch(4, 10 + padding, seed=2)
    more["x"][0, :10] = feed["x"][0]
    more["mask"][0, :, 10:] = -np.inf
    got = run(more)["hidden"][0, :10]
    np.testing.assert_allclose(got, run(feed)["hidden"][0], rtol=0, atol=1e-5)


def test_the_answers_stay_close_to_those_in_float(run: Any) -> None:
    feed = batch(16, 11)
    hidden, scores = session(layer()).run(None, feed)
    got = run(feed)
    for want, have in ((hidden, got["hidden"]), (scores, got["scores"])):
        for row in range(16):
            assert np.abs(want[row] - have[row]).max() < 0.05 * np.abs(want[row]).max()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), wide=st.integers(1, 200), size=st.floats(1e-20, 1e20))
def test_an_error_is_bounded_by_the_largest_token_and_weight(
    seed: int, wide: int, size: float
) -> None:
    drawn = np.random.default_rng(seed)
    weight = drawn.standard_t(2, size=(wide, 5)).astype(np.float32)
    x = (drawn.standard_t(2, size=(2, 3, wide)) * size).astype(np.float32)
    # Any processor multiplies exactly with the reduced range, in steps of 1/127 and 1/64.
    got = session(quantise(linear(weight), ["y"], reduce_range=True)).run(None, {"x": x})[0]
    most = np.abs(x).max(axis=-1, keepdims=True) * np.abs(weight).max(axis=0)
    # Half a step for the token and half a step for the weight, for each of `wide` products.
    want = x.astype(np.float64) @ weight.astype(np.float64)
    assert (np.abs(got - want) <= wide * most * (0.5 / 127 + 0.5 / 64) * 1.001).all()


def test_weights_are_stored_once_in_int8_and_the_file_is_about_a_quarter(small: Any) -> None:
    found = stored(small)
    for name in ("query", "value", "up", "down"):
        assert name not in found
        assert found[f"{name}.int8"].dtype == np.int8
        assert found[f"{name}.int8"].shape == weights()[name].shape
        assert found[f"{name}.scale"].shape == weights()[name].shape[1:]
    big = linear(np.ones((512, 512), dtype=np.float32))
    assert quantise(big, ["y"]).ByteSize() < 0.26 * big.ByteSize()


def test_the_reduced_range_leaves_room_for_two_products_in_16_bits() -> None:
    found = stored(quantise(layer(), ["hidden"], reduce_range=True))["up.int8"]
    assert np.abs(found).max() == 64
    assert 2 * 255 * 64 < 2**15


def test_a_weight_read_twice_stays_one_weight_and_its_input_is_converted_once(small: Any) -> None:
    products = [x for x in small.graph.node if x.op_type == "MatMulIntegerToFloat"]
    assert [x.input[1] for x in products[:2]] == ["query.int8", "query.int8"]
    assert [x.input[0] for x in products[:3]] == ["x.int8"] * 3
    assert sum(x.op_type == "QuantizeLinear" for x in small.graph.node) == 3
    names = [x.name for x in small.graph.initializer]
    assert len(names) == len(set(names))


def test_what_follows_the_ends_is_not_touched(small: Any) -> None:
    np.testing.assert_array_equal(stored(small)["head"], weights()["head"])
    assert small.graph.node[-1] == layer().graph.node[-1]


def test_a_weight_the_exit_reads_too_stays_there_in_float() -> None:
    made = layer()
    made.graph.node[-1].input[1] = "value"
    found = stored(quantise(made, ["hidden"]))
    assert {"value", "value.int8"} <= set(found)
    np.testing.assert_array_equal(found["value"], weights()["value"])


def test_products_of_two_computed_values_stay_in_float(small: Any) -> None:
    left = [list(x.input) for x in small.graph.node if x.op_type == "MatMul"]
    assert left == [["q", "kt"], ["shares", "v"], ["hidden", "head"]]


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_keeps_its_bias_and_its_transposed_weight(transposed: int) -> None:
    weight = np.random.default_rng(0).normal(size=(WIDTH, WIDTH)).astype(np.float32)
    made = linear(weight, "Gemm", transB=transposed)
    x = batch(4, 1)["x"][:, 0]
    want = session(made).run(None, {"x": x})[0]
    got = session(quantise(made, ["y"])).run(None, {"x": x})[0]
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


def test_a_gemm_with_a_factor_stays_in_float() -> None:
    made = linear(np.eye(WIDTH, dtype=np.float32), "Gemm", alpha=0.5)
    assert quantise(made, ["y"]).graph == made.graph


def test_a_token_of_zeros_gives_zeros() -> None:
    found = session(quantise(linear(weights()["up"]), ["y"]))
    x = batch(2, 3)["x"]
    x[0, 1] = 0
    got = found.run(None, {"x": x})[0]
    assert (got[0, 1] == 0).all()
    assert np.isfinite(got).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_stays_so_and_leaves_its_neighbours_alone(
    run: Any, value: float
) -> None:
    feed = batch(3, 6)
    before = run(feed)["hidden"]
    feed["x"][1, 2] = value
    after = run(feed)["hidden"]
    assert np.isnan(after[1]).all()
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])


def test_the_given_graph_is_not_changed() -> None:
    made = layer()
    before = made.SerializeToString(deterministic=True)
    quantise(made, ["hidden"])
    assert made.SerializeToString(deterministic=True) == before


def test_the_graph_is_valid(small: Any) -> None:
    onnx.checker.check_model(small)


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    broken = weights()
    broken["down"][3, 4] = np.nan
    with pytest.raises(ModelError, match="'down'"):
        quantise(layer(broken), ["hidden"])


def test_ends_the_graph_does_not_compute_are_refused_with_its_outputs() -> None:
    with pytest.raises(ModelError, match=r"does not compute hiden.*hidden, scores"):
        quantise(layer(), ["hiden"])


def test_without_onnx_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "offramp.engines.quantisation")
    with pytest.raises(MissingExtraError, match=r"offramp\[onnx\]"):
        importlib.import_module("offramp.engines.quantisation")
