"""Attention as one node, for ONNX Runtime.

Since opset 23 ONNX has a node for all that `attention.py` spells out, and for cutting states into
heads and turning them before and after. ONNX Runtime computes the same bits with it in about two
thirds of the time (the last ones differ where more than a mask is added to the shares); OpenVINO
is slower with it. A token that sees none, which only padding can be, gets what each version of
the runtime makes up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from offramp.engines.assembly import attributes
from offramp.engines.slimming import known_dims

__all__ = ["fuse_attention"]

_OPSET = 23
_TURNED, _TURNED_TWICE = [0, 2, 1, 3], [0, 2, 3, 1]
_ONE = "attention.one"


class _Heads(NamedTuple):
    """States (rows, tokens, width) that are cut into heads and turned."""

    states: str
    heads: int
    width: int


class _Found(NamedTuple):
    query: _Heads
    key: _Heads
    value: _Heads
    scale: float
    bias: str | None
    """What is added to the shares: broadcast to (rows, heads, tokens, tokens)."""


def fuse_attention(model: ModelProto) -> ModelProto:
    """The same function of the same inputs; the given model is not changed.

    Nodes that nobody needs any more stay, for `assemble` to leave out. Attention of another kind,
    such as with positions turned into the states or with fewer heads of keys, stays as it is.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = _Graph(copy)
    nodes = [new for node in copy.graph.node for new in graph.instead(node)]
    if not graph.fused:
        return copy
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    copy.graph.value_info.extend(graph.new)
    copy.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), _ONE))
    for domain in copy.opset_import:
        if domain.domain == "":
            domain.version = max(domain.version, _OPSET)
    return copy


class _Graph:
    """The nodes of a graph by what they make."""

    def __init__(self, model: ModelProto) -> None:
        self.fused = False
        self.new: list[ValueInfoProto] = []
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._stored = {weight.name: weight for weight in model.graph.initializer}
        self._dims = known_dims(model.graph)

    def instead(self, node: NodeProto) -> Iterator[NodeProto]:
        """The node itself; or where it ends an attention, all of that at once."""
        found = self._attention(node)
        if found is None:
            yield node
            return
        self.fused = True
        stem = node.output[0]
        given = [found.query.states, found.key.states, found.value.states]
        if found.bias is not None:
            yield from self._for_each_token(found.bias, f"{stem}.bias")
            given.append(f"{stem}.bias")
        heads = found.query.heads
        yield helper.make_node(
            "Attention",
            given,
            [stem],
            f"{stem}.attention",
            q_num_heads=heads,
            kv_num_heads=heads,
            scale=found.scale,
        )

    def _for_each_token(self, bias: str, name: str) -> Iterator[NodeProto]:
        """What is the same for all tokens has to be said for each of them."""
        dims = self._dims[bias]
        size, shape = f"{name}.tokens", f"{name}.shape"
        yield helper.make_node("Shape", [bias], [size], size, start=len(dims) - 1)
        yield helper.make_node("Concat", [_ONE, _ONE, size, _ONE], [shape], shape, axis=0)
        yield helper.make_node("Expand", [bias, shape], [name], name)
        dims = (*[1] * (4 - len(dims)), *dims)
        self.new.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [*dims[:2], dims[3], dims[3]])
        )

    def _attention(self, node: NodeProto) -> _Found | None:
        """The attention whose heads a node puts side by side, if it does that."""
        turn = self._made("Transpose", node.input[0]) if node.op_type == "Reshape" else None
        product = None if turn is None else self._made("MatMul", turn.input[0])
        softmax = None if product is None else self._made("Softmax", product.input[0])
        if turn is None or product is None or softmax is None:
            return None
        shares, bias = self._shares(softmax.input[0])
        if bias is not None and shares is not None and not self._fits(bias, shares.output[0]):
            return None
        value = self._heads(product.input[1], _TURNED)
        if shares is None or value is None or attributes(turn).get("perm") != _TURNED:
            return None
        query, scale = self._scaled(shares.input[0])
        key = self._heads(shares.input[1], _TURNED_TWICE)
        if query is None or key is None:
            return None
        if not self._cuts(node.input[1], value.states, [value.heads * value.width]):
            return None
        alike = query[1:] == key[1:] and key.heads == value.heads
        rows = {self._dims[part.states][0] for part in (query, key, value)}
        tokens = {self._dims[part.states][1] for part in (query, key)}
        alike = alike and len(rows) == 1 and (bias is None or len(tokens) == 1)
        last = attributes(softmax).get("axis", -1) in (-1, 3)
        return _Found(query, key, value, scale, bias) if alike and last else None

    def _shares(self, name: str) -> tuple[NodeProto | None, str | None]:
        """The product of queries and keys, and what is added to it."""
        added = self._made("Add", name)
        if added is None:
            return self._made("MatMul", name), None
        return self._made("MatMul", added.input[0]), added.input[1]

    def _fits(self, bias: str, shares: str) -> bool:
        """Whether a bias says of each key what is added to its shares."""
        bias_dims, dims = self._dims.get(bias, ()), self._dims.get(shares, ())
        return bool(bias_dims) and bias_dims[-1:] == dims[-1:]

    def _scaled(self, name: str) -> tuple[_Heads | None, float]:
        scaled = self._made("Mul", name)
        factor = None if scaled is None else self._stored.get(scaled.input[1])
        if scaled is None or factor is None or factor.data_type != TensorProto.FLOAT:
            return None, 1.0  # in other formats the node has other bits
        scale = numpy_helper.to_array(factor)
        known = scale.size == 1 and scale.item() > 0
        return (self._heads(scaled.input[0], _TURNED) if known else None), scale.flat[0].item()

    def _heads(self, name: str, turned: list[int]) -> _Heads | None:
        turn = self._made("Transpose", name)
        cut = None if turn is None else self._made("Reshape", turn.input[0])
        if turn is None or cut is None or attributes(turn).get("perm") != turned:
            return None
        sizes = (self._numbers(cut.input[1]) or [])[2:]
        if len(sizes) != 2 or not self._cuts(cut.input[1], cut.input[0], sizes):
            return None
        return _Heads(cut.input[0], *sizes)

    def _cuts(self, shape: str, states: str, sizes: list[int]) -> bool:
        """Whether a stored shape leaves rows and tokens of states as they are, and cuts their
        width into sizes."""
        dims = self._dims.get(states, ())
        if len(dims) != 3 or min(sizes) < 1 or dims[2] != math.prod(sizes):
            return False
        same = [0 if isinstance(size, str) else size for size in dims[:2]]
        return self._numbers(shape) == [*same, *sizes]

    def _made(self, kind: str, name: str) -> NodeProto | None:
        """The node of a kind that makes a value."""
        maker = self._makers.get(name)
        return maker if maker is not None and maker.op_type == kind else None

    def _numbers(self, name: str) -> Any:
        """What is stored under a name, as Python numbers; None where nothing is."""
        weight: TensorProto | None = self._stored.get(name)
        return None if weight is None else numpy_helper.to_array(weight).tolist()
