"""Scaled dot-product attention as few ONNX nodes.

torch's own translation transposes keys in six nodes and guards tokens that may see none at all:
nodes that cost as much time as the products where rows are short. Here such a token, which only
padding can be, attends to all alike. `fusion.py` says it in one node where the runtime is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset20
from torch.export import ExportedProgram

op: Any = opset20
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_LEAST = float(torch.finfo(torch.float32).min)


def translations(program: ExportedProgram) -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export`: none where attention is of another kind than an encoder's."""
    calls = [node for node in program.graph.nodes if node.target is _SDPA]
    return {_SDPA: attention} if calls and all(map(_is_plain, calls)) else {}


def _is_plain(node: torch.fx.Node) -> bool:
    causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
    single = node.meta["val"].dtype == torch.float32
    return single and not (causal or node.kwargs.get("enable_gqa", False))


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The arguments are those of torch's, fp32 (..., tokens, width), in evaluation mode."""
    factor = op.Constant(value_float=query.shape[-1] ** -0.5 if scale is None else scale)
    *others, tokens, width = range(len(key.shape))
    turned = op.Transpose(key, perm=[*others, width, tokens])
    shares = op.MatMul(op.Mul(query, factor), turned)
    if attn_mask is not None:
        least = op.Constant(value_float=_LEAST)
        if str(attn_mask.dtype) == "BOOL":
            added = op.Where(attn_mask, op.Constant(value_float=0.0), least)
        else:  # where all is minus infinity, shares would be no numbers
            added = op.Max(attn_mask, least)
        shares = op.Add(shares, added)
    return op.MatMul(op.Softmax(shares, axis=-1), value)
