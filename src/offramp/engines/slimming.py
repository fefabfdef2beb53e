"""Fewer nodes for the same layer: where rows are short, a node costs as much as what it computes.

Two things that a traced layer does step by step can be said at once:

- queries, keys and values are one product with their weights side by side, then cut;
- a shape that is put together from the sizes of other values is a constant, in which 0 stands for
  "as it was".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

__all__ = ["slim"]

Dims = tuple[int | str, ...]
Branch = tuple[NodeProto, NodeProto]
"""A product with a stored matrix, and the sum with a stored vector after it."""


def slim(model: ModelProto) -> ModelProto:
    """The same function of the same inputs; the given model is not changed.

    Nodes that nobody needs any more stay, for `assemble` to leave out.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    _join_products(copy)
    _fix_shapes(copy)
    return copy


# Products of one value


def _join_products(model: ModelProto) -> None:
    graph = model.graph
    stored = {weight.name: weight for weight in graph.initializer}
    for branches in list(_side_by_side(model, stored)):
        joined, weights = _joined(branches, stored)
        gone = {node.output[0] for branch in branches for node in branch}
        first = branches[0][0].output[0]
        nodes: list[NodeProto] = []
        for node in graph.node:
            nodes += joined if node.output[0] == first else []
            nodes += [] if node.output[0] in gone else [node]
        graph.initializer.extend(weights)
        del graph.node[:]
        graph.node.extend(nodes)


def _side_by_side(model: ModelProto, stored: dict[str, TensorProto]) -> Iterator[list[Branch]]:
    """Products of the same value, where there are several."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    told = {value.name for value in model.graph.output}
    found: dict[str, list[Branch]] = {}
    for node in model.graph.node:
        after = readers.get(node.output[0], [])
        alone = len(after) == 1 and node.output[0] not in told
        if alone and _is_product(node, stored) and _bias(after[0], stored) is not None:
            found.setdefault(node.input[0], []).append((node, after[0]))
    return (branches for branches in found.values() if len(branches) > 1)


def _joined(
    branches: Sequence[Branch], stored: dict[str, TensorProto]
) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes in the place of all branches, and what they store."""
    weights = [numpy_helper.to_array(stored[product.input[1]]) for product, _ in branches]
    biases = [numpy_helper.to_array(stored[_bias(added, stored) or ""]) for _, added in branches]
    outputs = [added.output[0] for _, added in branches]
    stem = f"{outputs[0]}.joined"
    values = {
        "weight": np.concatenate(weights, axis=1),
        "bias": np.concatenate(biases),
        "sizes": np.array([bias.size for bias in biases], np.int64),
    }
    made = [numpy_helper.from_array(value, f"{stem}.{name}") for name, value in values.items()]
    weight, bias, sizes = (value.name for value in made)
    return [
        helper.make_node("MatMul", [branches[0][0].input[0], weight], [f"{stem}.product"], stem),
        helper.make_node("Add", [f"{stem}.product", bias], [stem], f"{stem}.add"),
        helper.make_node("Split", [stem, sizes], outputs, f"{stem}.split", axis=-1),
    ], made


def _is_product(node: NodeProto, stored: dict[str, TensorProto]) -> bool:
    weight = stored.get(node.input[1]) if node.op_type == "MatMul" else None
    return weight is not None and len(weight.dims) == 2


def _bias(node: NodeProto, stored: dict[str, TensorProto]) -> str | None:
    """The stored vector that a node adds, if that is what it does."""
    if node.op_type != "Add":
        return None
    vectors = [name for name in node.input if name in stored and len(stored[name].dims) == 1]
    return vectors[0] if len(vectors) == 1 else None


# Shapes


def _fix_shapes(model: ModelProto) -> None:
    graph = model.graph
    known = {value.name: _dims(value) for value in (*graph.input, *graph.value_info, *graph.output)}
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


def _dims(value: ValueInfoProto) -> Dims:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _target(before: Dims, after: Dims) -> list[int] | None:
    """A shape to give; None where a free size stood elsewhere before, or nothing is known."""
    for place, size in enumerate(after):
        known = before[place : place + 1] == (size,) if isinstance(size, str) else size > 0
        if not known:
            return None
    return [0 if isinstance(size, str) else size for size in after] or None
