"""A slim graph computes what the graph did, with fewer nodes."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402

from offramp.engines.slimming import slim  # noqa: E402

WIDTH = 6


def graph(widths, biased=True, extra=(), biases=None):
    """A value times one matrix for each width, and a vector added to each product."""
    draw = np.random.default_rng(0).normal
    nodes, stored = [], []
    for number, width in enumerate(widths):
        names = f"w{number}", f"b{number}"
        shapes = (WIDTH, width), ((biases or widths)[number],)
        stored += [
            numpy_helper.from_array(draw(size=shape).astype(np.float32), name)
            for name, shape in zip(names, shapes, strict=True)
        ]
        made = f"p{number}" if biased else f"y{number}"
        nodes.append(helper.make_node("MatMul", ["x", names[0]], [made]))
        if biased:
            nodes.append(helper.make_node("Add", [names[1], made], [f"y{number}"]))
    return model([*nodes, *extra], [f"y{n}" for n in range(len(widths))], stored)


def model(nodes, outputs, stored=(), shapes=()):
    float32 = onnx.TensorProto.FLOAT
    values = [helper.make_tensor_value_info(name, float32, None) for name in outputs]
    inside = [helper.make_tensor_value_info(name, float32, shape) for name, shape in shapes]
    given = helper.make_tensor_value_info("x", float32, ["rows", "tokens", WIDTH])
    made = helper.make_graph(nodes, "g", [given], values, list(stored), value_info=inside)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def inside_a_body(name):
    """An `If` whose branches read a value of the graph around it."""
    value = helper.make_tensor_value_info("read", onnx.TensorProto.FLOAT, None)
    node = helper.make_node("Identity", [name], ["read"])
    body = helper.make_graph([node], "body", [], [value])
    return helper.make_node("If", ["yes"], ["z"], then_branch=body, else_branch=body)


def answers(graph, rows=3, tokens=4):
    import onnxruntime

    x = np.random.default_rng(1).normal(size=(rows, tokens, WIDTH)).astype(np.float32)
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})


def kinds(graph):
    return [node.op_type for node in graph.graph.node]


def same(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return all(np.allclose(one, other, rtol=0, atol=1e-5) for one, other in pairs)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(1, 3), st.integers(1, 5))
def test_products_of_one_value_become_one_product(widths, rows, tokens):
    full = graph(widths)
    thin = slim(full)
    assert kinds(thin) == ["MatMul", "Add", "Split"]
    assert same(answers(thin, rows, tokens), answers(full, rows, tokens))


def test_the_given_graph_is_not_changed():
    full = graph([2, 3])
    before = full.SerializeToString()
    slim(full)
    assert full.SerializeToString() == before


@pytest.mark.parametrize(
    "full",
    [
        graph([4]),
        graph([2, 3], biased=False),
        graph([2, 3], extra=[helper.make_node("Identity", ["p0"], ["z"])]),
        graph([2, 3], extra=[helper.make_node("MatMul", ["x", "w0"], ["z"])]),
        graph([1, 3], biases=[3, 3]),
        graph([2, 3], extra=[inside_a_body("p0")]),
    ],
    ids=[
        "a single one",
        "no vector to add",
        "a product read twice",
        "a weight read twice",
        "a vector of another width",
        "a product that a body reads",
    ],
)
def test_what_cannot_be_joined_stays(full):
    assert "Split" not in kinds(slim(full))


def reshaped(parts, shape):
    """x (rows, tokens, 6) in a shape that is put together from the sizes of x."""
    number = {"rows": (0, 1), "tokens": (1, 2)}
    nodes, names, stored = [], [], []
    for place, part in enumerate(parts):
        name = f"part{place}"
        names.append(name)
        if part in number:
            start, end = number[part]
            nodes.append(helper.make_node("Shape", ["x"], [name], start=start, end=end))
        else:
            stored.append(numpy_helper.from_array(np.array([part], np.int64), name))
    nodes += [
        helper.make_node("Concat", names, ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["split"], allowzero=1),
        helper.make_node("Identity", ["split"], ["y"]),
    ]
    return model(nodes, ["y"], stored, [("split", shape)])


@pytest.mark.parametrize(
    ("full", "constant"),
    [
        (reshaped(["rows", "tokens", 2, -1], ["rows", "tokens", 2, 3]), [0, 0, 2, 3]),
        (reshaped(["rows", -1, 3], ["rows", "more", 3]), None),
        (reshaped(["tokens", "rows", 6], ["tokens", "rows", 6]), None),
        (reshaped(["rows", "tokens", 6], None), None),
    ],
    ids=["heads", "a new size", "sizes that change places", "an unknown shape"],
)
def test_a_shape_is_constant_where_free_sizes_stay_in_their_places(full, constant):
    thin = slim(full)
    assert same(answers(thin), answers(full))
    (node,) = [node for node in thin.graph.node if node.op_type == "Reshape"]
    found = {value.name: numpy_helper.to_array(value) for value in thin.graph.initializer}
    told = found.get(node.input[1])
    assert (None if told is None else told.tolist()) == constant
