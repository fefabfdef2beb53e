"""Fewer nodes for the same layer: where rows are short, a node costs as much as what it computes.

Two things that a traced layer does step by step can be said at once:

- queries, keys and values are one product with their weights side by side, then cut;
- a shape that is put together from the sizes of other values is a constant, in which 0 stands for
  "as it was".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from offramp.engines.assembly import all_read, bodies

__all__ = ["known_dims", "slim"]

Dims = tuple[int | str, ...]


class _Branch(NamedTuple):
    """A product with a stored matrix, and the sum with a stored vector after it."""

    product: NodeProto
    added: NodeProto
    weight: TensorProto
    bias: TensorProto


def slim(model: ModelProto) -> ModelProto:
    """The same function of the same inputs; the given model is not changed.

    Nodes and weights that nobody needs any more stay, for `assemble` to leave out.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    _join_products(copy.graph)
    _fix_shapes(copy.graph)
    return copy


# Products of one value


def _join_products(graph: GraphProto) -> None:
    for branches in _side_by_side(graph):
        joined, weights = _joined(branches)
        gone = {node.output[0] for one in branches for node in (one.product, one.added)}
        first = branches[0].product.output[0]
        nodes: list[NodeProto] = []
        for node in graph.node:
            nodes += joined if node.output[0] == first else []
            nodes += [] if node.output[0] in gone else [node]
        graph.initializer.extend(weights)
        del graph.node[:]
        graph.node.extend(nodes)


def _side_by_side(graph: GraphProto) -> list[list[_Branch]]:
    """Products of the same value, where there are several."""
    stored = {weight.name: weight for weight in graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    elsewhere = {value.name for value in graph.output}
    elsewhere |= all_read(node for top in graph.node for body in bodies(top) for node in body.node)
    found: dict[str, list[_Branch]] = {}
    for node in graph.node:
        after = readers.get(node.output[0], [])
        alone = len(after) == 1 and node.output[0] not in elsewhere
        branch = _branch(node, after[0], stored) if alone else None
        # a weight with other readers would stand in the file twice
        if branch is not None and len(readers[branch.weight.name]) == 1:
            found.setdefault(node.input[0], []).append(branch)
    return [branches for branches in found.values() if len(branches) > 1]


def _branch(product: NodeProto, added: NodeProto, stored: dict[str, TensorProto]) -> _Branch | None:
    """What two nodes are together, if that is a product and a number for each of its columns."""
    if (product.op_type, added.op_type) != ("MatMul", "Add"):
        return None
    weight = stored.get(product.input[1])
    vectors = [stored[name] for name in added.input if name in stored]
    if weight is None or len(weight.dims) != 2 or len(vectors) != 1:
        return None
    fits = list(vectors[0].dims) == [weight.dims[1]]
    return _Branch(product, added, weight, vectors[0]) if fits else None


def _joined(branches: Sequence[_Branch]) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes in the place of all branches, and what they store."""
    weights = [numpy_helper.to_array(one.weight) for one in branches]
    biases = [numpy_helper.to_array(one.bias) for one in branches]
    outputs = [one.added.output[0] for one in branches]
    stem = f"{outputs[0]}.joined"
    values = {
        "weight": np.concatenate(weights, axis=1),
        "bias": np.concatenate(biases),
        "sizes": np.array([bias.size for bias in biases], np.int64),
    }
    made = [numpy_helper.from_array(value, f"{stem}.{name}") for name, value in values.items()]
    weight, bias, sizes = (value.name for value in made)
    given = branches[0].product.input[0]
    return [
        helper.make_node("MatMul", [given, weight], [f"{stem}.product"], stem),
        helper.make_node("Add", [f"{stem}.product", bias], [stem], f"{stem}.add"),
        helper.make_node("Split", [stem, sizes], outputs, f"{stem}.split", axis=-1),
    ], made


# Shapes


def _fix_shapes(graph: GraphProto) -> None:
    known = known_dims(graph)
    for node in graph.node:
        if node.op_type != "Reshape":
            continue
        target = _target(known.get(node.input[0], ()), known.get(node.output[0], ()))
        if target is None:
            continue
        name = f"{node.output[0]}.shape"
        graph.initializer.append(numpy_helper.from_array(np.array(target, np.int64), name))
        node.input[1] = name
        del node.attribute[:]  # with `allowzero`, 0 would mean none


def known_dims(graph: GraphProto) -> dict[str, Dims]:
    """The sizes of values where they are known; a free one is a name."""
    return {value.name: _dims(value) for value in (*graph.input, *graph.value_info, *graph.output)}


def _dims(value: ValueInfoProto) -> Dims:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _target(before: Dims, after: Dims) -> list[int] | None:
    """A shape to give; None where a free size stood elsewhere before, or nothing is known."""
    for place, size in enumerate(after):
        known = before[place : place + 1] == (size,) if isinstance(size, str) else size > 0
        if not known:
            return None
    return [0 if isinstance(size, str) else size for size in after] or None
