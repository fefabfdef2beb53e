"""What several layers make of masks alone is made once, before them, and they compute the same."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from offramp.engines.assembly import bodies, needed  # noqa: E402
from offramp.engines.graphs import Graphs  # noqa: E402
from offramp.engines.once import work_out_once  # noqa: E402
from offramp.policies import MaxProbability  # noqa: E402
from offramp.testing import tiny_model  # noqa: E402

FLOAT = onnx.TensorProto.FLOAT
ROWS = ["rows", "tokens"]
SHAPES = {
    "hidden": ROWS,
    "mask": ROWS,
    "shared/table": ["tokens"],
    "away": ROWS,
    "both": ROWS,
    "how_many": [],
    "sum": [1, "tokens"],
    "shifted": ROWS,
}
STORED = {
    "one": np.float32([1]),
    "two": np.float32([2]),
    "owner.bias": np.float32([3]),
    "axis": np.int64([0]),
    "first": np.int64(0),
    "last_to_first": np.int64([2, 1, 0]),
    "many": np.ones((1, 100), np.float32),
}


def graph(nodes, outputs, inputs, stored=STORED):
    def values(names, prefix=""):
        return [helper.make_tensor_value_info(prefix + n, FLOAT, SHAPES[n]) for n in names]

    made = {name for node in nodes for name in node.output}
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            values(inputs),
            values(outputs, "out/"),
            [numpy_helper.from_array(value, name) for name, value in stored.items()],
            value_info=values(sorted(made & {*SHAPES})),
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


def embedding():
    nodes = [helper.make_node("Identity", [f"x/{n}"], [f"out/{n}"]) for n in ("hidden", "mask")]
    nodes.append(
        helper.make_node("ReduceSum", ["x/mask", "axis"], ["out/shared/table"], keepdims=0)
    )
    made = graph(nodes, ["hidden", "mask", "shared/table"], [])
    for name in ("hidden", "mask"):
        made.graph.input.append(helper.make_tensor_value_info(f"x/{name}", FLOAT, ROWS))
    return made


def layer(*steps):
    """A layer that adds to the state what its steps make last."""
    nodes = [helper.make_node(kind, [*read], [made]) for kind, read, made in steps]
    nodes.append(helper.make_node("Add", ["hidden", steps[-1][2]], ["out/hidden"]))
    return graph(nodes, ["hidden"], ["hidden", "mask", "shared/table"])


def kinds(model):
    return [n.op_type for n in needed(model.graph, [o.name for o in model.graph.output]).nodes]


def states(first, layers, rows=3, tokens=4):
    draw = np.random.default_rng(rows).normal
    feed = {f"x/{n}": draw(size=(rows, tokens)).astype(np.float32) for n in ("hidden", "mask")}
    names = [value.name for value in first.graph.output]
    values = dict(zip(names, ReferenceEvaluator(first).run(None, feed), strict=True))
    values = {name.removeprefix("out/"): value for name, value in values.items()}
    for one in layers:
        read = {value.name: values[value.name] for value in one.graph.input}
        values["hidden"] = ReferenceEvaluator(one).run(["out/hidden"], read)[0]
    return values["hidden"]


AWAY = ("Sub", ("one", "mask"), "away")
STEPS = {
    "of the mask": AWAY,
    "of what is shared": ("Add", ("mask", "shared/table"), "both"),
    "of the state": ("Mul", ("hidden", "mask"), "away"),
    "with a parameter": ("Mul", ("mask", "owner.bias"), "away"),
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4), st.integers(1, 3))
def test_layers_compute_the_same(steps, rows):
    first, layers = embedding(), [layer(STEPS[step]) for step in steps]
    new_first, new = work_out_once(first, layers)
    np.testing.assert_array_equal(states(new_first, new, rows), states(first, layers, rows))
    moved = sum(steps.count(step) > 1 for step in ("of the mask", "of what is shared"))
    assert len(new_first.graph.output) == 3 + moved


def test_given_graphs_stay_as_they_were():
    first, layers = embedding(), [layer(AWAY), layer(AWAY)]
    before = [one.SerializeToString() for one in (first, *layers)]
    work_out_once(first, layers)
    assert [one.SerializeToString() for one in (first, *layers)] == before


def test_a_whole_chain_moves_and_only_its_end_is_handed_on():
    chain = AWAY, ("Mul", ("away", "two"), "shifted")
    first, layers = work_out_once(embedding(), [layer(*chain), layer(*chain)])
    assert [kinds(one) for one in layers] == [["Add"], ["Add"]]
    assert [one.name for one in first.graph.output][3:] == ["out/rows/once.0"]


@pytest.mark.parametrize(
    "steps",
    [
        [("ReduceSum", ("mask", "axis"), "sum")],  # over rows, some of which leave
        [("CumSum", ("mask", "first"), "away")],
        [("Gather", ("mask", "last_to_first"), "away")],
        [("Size", ("mask",), "how_many"), ("CastLike", ("how_many", "one"), "sum")],
        [("Mul", ("mask", "owner.bias"), "away")],  # a parameter, if by chance of one value
        [("Mul", ("hidden", "mask"), "away")],
    ],
    ids=[
        "a sum over rows",
        "a running sum",
        "rows from behind",
        "how many rows there are",
        "a parameter",
        "the state",
    ],
)
def test_what_only_a_layer_can_make_stays_in_it(steps):
    first, layers = work_out_once(embedding(), [layer(*steps), layer(*steps)])
    assert len(first.graph.output) == 3
    assert all(len(kinds(one)) == len(steps) + 1 for one in layers)


def test_steps_that_differ_in_an_input_left_out_are_not_the_same():
    """`Clip` from below and from above: one mask, one number."""
    below, above = ("Clip", ("mask", "one"), "away"), ("Clip", ("mask", "", "one"), "away")
    first, layers = embedding(), [layer(step) for step in (below, above, below, above)]
    new_first, new = work_out_once(first, layers)
    assert len(new_first.graph.output) == 3 + 2
    np.testing.assert_array_equal(states(new_first, new), states(first, layers))


def test_what_a_layer_says_as_well_is_still_said():
    nodes = [
        helper.make_node("Sub", ["one", "mask"], ["out/away"]),
        helper.make_node("Add", ["hidden", "out/away"], ["out/hidden"]),
    ]
    saying = graph(nodes, ["hidden", "away"], ["hidden", "mask", "shared/table"])
    first, layers = embedding(), [saying, layer(AWAY)]
    new_first, new = work_out_once(first, layers)
    assert [one.name for one in new[0].graph.output] == ["out/hidden", "out/away"]
    np.testing.assert_array_equal(states(new_first, new), states(first, layers))


def test_what_one_layer_alone_makes_stays_in_it():
    other = ("Mul", ("mask", "two"), "away")
    _, layers = work_out_once(embedding(), [layer(AWAY), layer(other)])
    assert [kinds(one) for one in layers] == [["Sub", "Add"], ["Mul", "Add"]]


def test_no_layer_of_a_file_makes_a_table_of_its_mask():
    file = Graphs(tiny_model("bert", layers=4), progress=False).early_exit(MaxProbability())
    inside = [node.op_type for top in file.graph.node for body in bodies(top) for node in body.node]
    assert inside.count("Attention") == 3
    assert "Expand" not in inside
    assert "Unsqueeze" not in inside
