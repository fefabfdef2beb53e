"""Attention as one node gives the bits that it gave as many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

from torch.nn.functional import scaled_dot_product_attention as attend

from offramp.engines.exporting import Exports
from offramp.engines.fusion import fuse_attention
from offramp.engines.graphs import Graphs
from offramp.engines.onnx_engine import _Session
from offramp.engines.slimming import slim
from offramp.policies import MaxProbability
from offramp.testing import tiny_model

WIDTH, HEADS = 96, 3
SIZES = ((3, 11), (5, 19))
Mask = Callable[[int, int], torch.Tensor]


def states(rows: int, tokens: int) -> torch.Tensor:
    return torch.randn(rows, tokens, 3 * WIDTH, generator=torch.Generator().manual_seed(rows))


def padded(rows: int, tokens: int) -> torch.Tensor:
    mask = torch.ones(rows, 1, 1, tokens, dtype=torch.bool)
    mask[1:, ..., tokens // 2 :] = False
    return mask


def blind(rows: int, tokens: int) -> torch.Tensor:
    """The last row sees no token, and the third token of others sees none."""
    mask = padded(rows, tokens).expand(rows, 1, tokens, tokens).clone()
    mask[:, :, 2] = False
    mask[-1] = False
    return mask


def of_heads(rows: int, tokens: int) -> torch.Tensor:
    """A number for each pair of tokens, other ones for each head, the same in all rows."""
    return torch.randn(1, HEADS, tokens, tokens, generator=torch.Generator().manual_seed(1))


def square(rows: int, tokens: int) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def of_queries(rows: int, tokens: int) -> torch.Tensor:
    return torch.randn(rows, 1, tokens, 1, generator=torch.Generator().manual_seed(1))


def heads(part: torch.Tensor, count: int = HEADS) -> torch.Tensor:
    return part.view(*part.shape[:2], count, -1).transpose(1, 2)


def encoder(x: torch.Tensor, mask: torch.Tensor | None = None, **how: Any) -> torch.Tensor:
    parts = map(heads, x.chunk(3, dim=-1))
    return attend(*parts, attn_mask=mask, **how).transpose(1, 2).flatten(2)


def turned(x: torch.Tensor) -> torch.Tensor:
    """Positions are turned into queries and keys."""
    query, key, value = map(heads, x.chunk(3, dim=-1))
    return attend(query.flip(-1), key.flip(-1), value).transpose(1, 2).flatten(2)


def of_other_heads(x: torch.Tensor) -> torch.Tensor:
    """What comes out is cut otherwise than what went in."""
    query, key, value = x.chunk(3, dim=-1)
    return attend(heads(query), heads(key), heads(value)).flatten(1, 2)


def of_one_row(x: torch.Tensor) -> torch.Tensor:
    """Queries are the same for all rows."""
    _, key, value = map(heads, x.chunk(3, dim=-1))
    return attend(heads(x[:1, :, :WIDTH]), key, value).transpose(1, 2).flatten(2)


def by_hand(scale: float, kind: torch.dtype = torch.float32) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        query, key, value = (heads(part.to(kind)) for part in x.chunk(3, dim=-1))
        shares = ((query * scale) @ key.mT).softmax(-1)
        return (shares @ value).transpose(1, 2).flatten(2)

    return run


def unscaled(x: torch.Tensor) -> torch.Tensor:
    query, key, value = map(heads, x.chunk(3, dim=-1))
    return ((query @ key.mT).softmax(-1) @ value).transpose(1, 2).flatten(2)


def graph_of(run: Callable[..., torch.Tensor], mask: Mask | None) -> tuple[Any, list[Any]]:
    given = [{"x": states(*size)} for size in SIZES]
    if mask is not None:
        given = [one | {"mask": mask(*size)} for one, size in zip(given, SIZES, strict=True)]
    graph, _ = Exports().graph(lambda one: {"y": run(*one.values())}, given, "layer 1")
    return slim(graph), given


def kinds(graph: Any) -> list[str]:
    return [node.op_type for node in graph.graph.node]


def said(graph: Any, given: list[Any]) -> list[torch.Tensor]:
    session = _Session(graph.SerializeToString(), 1)
    feeds = [{name: leaf.numpy() for name, leaf in leaves.items()} for leaves in given]
    return [torch.from_numpy(session.run(feed)[0]) for feed in feeds]


def check_same_bits(graph: Any, given: list[Any]) -> None:
    pairs = zip(said(fuse_attention(graph), given), said(graph, given), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("mask", [None, padded, square])
def test_attention_is_one_node_with_the_same_bits(mask: Mask | None) -> None:
    graph, given = graph_of(encoder, mask)
    assert kinds(fuse_attention(graph)).count("Attention") == 1
    assert "Attention" not in kinds(graph), "the given graph is not changed"
    check_same_bits(graph, given)


def test_numbers_that_are_added_to_shares_are_added_in_another_order() -> None:
    graph, given = graph_of(encoder, of_heads)
    assert kinds(fuse_attention(graph)).count("Attention") == 1
    for ours, theirs in zip(said(fuse_attention(graph), given), said(graph, given), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_token_that_sees_none_stays_finite_and_harms_no_other() -> None:
    graph, given = graph_of(encoder, blind)
    for ours, theirs in zip(said(fuse_attention(graph), given), said(graph, given), strict=True):
        sees = torch.arange(ours.shape[1]) != 2
        assert torch.equal(ours[:-1, sees], theirs[:-1, sees])
        assert ours.isfinite().all()


def test_a_scale_of_its_own_is_kept() -> None:
    graph, given = graph_of(lambda x: encoder(x, scale=0.7), None)
    assert "Attention" in kinds(fuse_attention(graph))
    check_same_bits(graph, given)


@pytest.mark.parametrize(
    "run",
    [
        turned,
        of_other_heads,
        of_one_row,
        unscaled,
        by_hand(0.0),
        by_hand(-0.5),
        by_hand(0.5, torch.float64),
    ],
)
def test_attention_of_another_kind_stays_as_it_is(run: Callable[..., torch.Tensor]) -> None:
    graph, given = graph_of(run, None)
    assert fuse_attention(graph) == graph
    check_same_bits(graph, given)


def test_a_bias_that_the_node_does_not_know_stays_as_it_is() -> None:
    graph, _ = graph_of(encoder, of_queries)
    assert fuse_attention(graph) == graph


@pytest.mark.parametrize(("runtime", "count"), [("onnx", 2), ("openvino", 0)])
def test_files_for_onnx_runtime_alone_have_it(runtime: str, count: int) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="needs the extra openvino")
    model = tiny_model("bert", layers=2)
    file = Graphs(model, progress=False, runtime=runtime).early_exit(MaxProbability(threshold=0.9))
    bodies = [one.g for node in file.graph.node for one in node.attribute if one.HasField("g")]
    nodes = [*file.graph.node, *(node for body in bodies for node in body.node)]
    assert sum(node.op_type == "Attention" for node in nodes) == count
