"""Eight-bit weights for an ONNX graph, with a scale for every token.

Dynamic quantisation usually takes one scale for a whole tensor, so that a row's answer moves with
its neighbours in the batch and with their padding. Here each token has its own: with m the
largest |x| of the token, x is stored as the integers x / m * 127 + 128, multiplied exactly with
the integer weights, and scaled back by m. Nothing is computed over rows or tokens, so a row's
answer does not depend on the others. Weights are symmetric, one scale for each column.

    x -> Abs -> ReduceMax -> m          once for each x, whatever number of weights reads it
    x * (1 / m) -> QuantizeLinear -> q
    MatMulIntegerToFloat(q, w) * m      in the place of MatMul(x, w)

A token of zeros, or of numbers below 1e-38, needs no guard: whatever integers it got, they are
multiplied by m. A token that is NaN throughout, as it is after any layer norm, comes out as NaN,
and one with an infinite number as numbers that are not finite.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.errors import MissingExtraError, ModelError

try:
    from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
except ImportError:
    raise MissingExtraError("onnx", "onnx") from None

from offramp.engines.assembly import attributes

__all__ = ["quantise"]

Array = npt.NDArray[Any]

_CONTRIB = "com.microsoft"
_LARGEST = 127
# Two products of 255 with a weight of this size fit into 16 bits, which is all that processors
# without VNNI have for them.
_LARGEST_REDUCED = 64
# What every quantised multiplication shares.
_STEP, _ZERO, _AXIS = "int8.step", "int8.zero", "int8.axis"


def quantise(model: ModelProto, ends: Collection[str], *, reduce_range: bool = False) -> ModelProto:
    """The model with the weights of every MatMul and Gemm that leads to one of `ends` in int8.

    `ends` are names of values, such as the hidden state a layer hands on; what is computed from
    them (an exit, a policy) stays as it is. A weight is a 2-D float32 initialiser; one that
    several nodes read is stored once. Bodies of If and Loop stay as they are, so quantise first and
    assemble then. The given model is not changed. Needs opset 18 or later.
    `reduce_range` keeps weights to 7 bits: on x86 processors without VNNI the sums of two products
    of 8 bits may saturate, which costs accuracy (never the independence of rows).
    Raises ModelError for a weight that is not finite and for ends the graph does not compute.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    inside = _upstream(copy, ends)
    largest = _LARGEST_REDUCED if reduce_range else _LARGEST
    rewrite = _Rewrite({x.name: x for x in copy.graph.initializer}, largest)
    for node in copy.graph.node:
        rewrite.add(node, node.output[0] in inside)
    del copy.graph.node[:]
    copy.graph.node.extend(rewrite.nodes)
    _store(copy, rewrite.made)
    if all(x.domain != _CONTRIB for x in copy.opset_import):
        copy.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
    return copy


def _upstream(model: ModelProto, ends: Collection[str]) -> set[str]:
    """Names of all values that lead to `ends`, themselves included."""
    makers = {name: node for node in model.graph.node for name in node.output}
    if missing := sorted(set(ends) - set(makers)):
        raise ModelError(
            f"The graph does not compute {', '.join(missing)}. "
            f"Its outputs are: {', '.join(x.name for x in model.graph.output)}"
        )
    seen: set[str] = set()
    waiting = list(ends)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += makers[name].input if name in makers else []
    return seen


def _store(model: ModelProto, made: dict[str, TensorProto]) -> None:
    """Add the new initialisers and drop those no node reads any more."""
    read = {name for node in _nodes(model.graph) for name in node.input}
    read |= {x.name for x in model.graph.output}
    kept = [x for x in model.graph.initializer if x.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *made.values()])


def _nodes(graph: Any) -> Iterator[NodeProto]:
    """All nodes, those of bodies (If, Loop) too: they read the initialisers outside."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body)


class _Rewrite:
    """The nodes of the new graph, in order, and the initialisers they need."""

    def __init__(self, stored: dict[str, TensorProto], largest: int) -> None:
        self.nodes: list[NodeProto] = []
        self.made: dict[str, TensorProto] = {}
        self._stored = stored
        self._largest = largest
        self._tokens: dict[str, tuple[str, str]] = {}

    def add(self, node: NodeProto, inside: bool) -> None:
        if not inside or not self._can(node):
            self.nodes.append(node)
            return
        values, largest = self._token(node.input[0])
        weight, scale = self._weight(node.input[1], attributes(node).get("transB", 0) == 1)
        output = node.output[0]
        bias = node.input[2] if len(node.input) > 2 else ""
        self._op(
            "MatMulIntegerToFloat",
            [values, weight, _STEP, scale, _ZERO],
            f"{output}.product",
            domain=_CONTRIB,
        )
        if bias:
            self._op("Mul", [f"{output}.product", largest], f"{output}.scaled")
            self._op("Add", [f"{output}.scaled", bias], output)
        else:
            self._op("Mul", [f"{output}.product", largest], output)

    def _can(self, node: NodeProto) -> bool:
        """Is it x @ w, or x @ w + b, for a stored matrix w?"""
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
            return False
        weight = self._stored.get(node.input[1])
        if weight is None or len(weight.dims) != 2 or weight.data_type != TensorProto.FLOAT:
            return False
        given = attributes(node)
        plain = {"transA": 0, "alpha": 1.0, "beta": 1.0}
        return all(given.get(key, value) == value for key, value in plain.items())

    def _token(self, x: str) -> tuple[str, str]:
        """Names of x as integers and of the largest |x| of each token."""
        if x not in self._tokens:
            self._constants()
            values, largest = f"{x}.int8", f"{x}.largest"
            self._op("Abs", [x], f"{x}.absolute")
            self._op("ReduceMax", [f"{x}.absolute", _AXIS], largest, keepdims=1)
            # one division a token: a product costs less than a quotient
            self._op("Reciprocal", [largest], f"{x}.inverse")
            self._op("Mul", [x, f"{x}.inverse"], f"{x}.share")
            self._op("QuantizeLinear", [f"{x}.share", _STEP, _ZERO], values)
            self._tokens[x] = values, largest
        return self._tokens[x]

    def _constants(self) -> None:
        self._make(_STEP, np.array(1 / _LARGEST, dtype=np.float32))
        self._make(_ZERO, np.array(_LARGEST + 1, dtype=np.uint8))
        self._make(_AXIS, np.array([-1], dtype=np.int64))

    def _weight(self, name: str, transposed: bool) -> tuple[str, str]:
        """Names of the integers and of the columns' scales of a weight, both stored once."""
        stem = f"{name}.transposed" if transposed else name
        if f"{stem}.int8" not in self.made:
            weight = numpy_helper.to_array(self._stored[name])
            integers, scale = _integers(name, weight.T if transposed else weight, self._largest)
            self._make(f"{stem}.int8", integers)
            self._make(f"{stem}.scale", scale)
        return f"{stem}.int8", f"{stem}.scale"

    def _make(self, name: str, value: Array) -> None:
        self.made[name] = numpy_helper.from_array(value, name)

    def _op(self, kind: str, inputs: list[str], output: str, **given: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **given))


def _integers(name: str, weight: Array, largest: int) -> tuple[Array, Array]:
    """Weight (in, out) as int8 of the same shape and the scale (out,) of each column."""
    if not np.isfinite(weight).all():
        raise ModelError(
            f"The weight '{name}' holds NaN or infinite values, which int8 cannot hold. "
            "Repair the model or use precision 'fp32'."
        )
    scale = np.abs(weight).max(axis=0) / np.float32(largest)
    scale[scale == 0] = 1
    integers = np.clip(np.rint(weight / scale), -largest, largest)
    return integers.astype(np.int8), scale
