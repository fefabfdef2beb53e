"""Attention as few nodes says what torch's says, whatever it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

from torch.nn.functional import scaled_dot_product_attention as attend

from offramp.engines.exporting import OUT, Exports
from offramp.engines.onnx_engine import _Session

Make = Callable[[int, int], torch.Tensor]


def heads(rows: int, tokens: int) -> torch.Tensor:
    return torch.randn(rows, 2, tokens, 8, generator=torch.Generator().manual_seed(rows))


def padded(rows: int, tokens: int) -> torch.Tensor:
    mask = torch.ones(rows, 1, 1, tokens, dtype=torch.bool)
    mask[1:, ..., tokens // 2 :] = False
    return mask


def blind(rows: int, tokens: int) -> torch.Tensor:
    """The third token sees none."""
    mask = padded(rows, tokens).expand(rows, 1, tokens, tokens).clone()
    mask[:, :, 2] = False
    return mask


def added(mask: Make) -> Make:
    return lambda *size: torch.zeros(size[0], 1, 1, 1).masked_fill(~mask(*size), -torch.inf)


def said(
    run: Callable[..., torch.Tensor], *make: Make
) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """By the graph and by torch at two sizes, and how many nodes the graph has."""
    given = [{"xk"[n]: one(*size) for n, one in enumerate(make)} for size in ((3, 11), (5, 19))]
    graph, theirs = Exports().graph(lambda one: {"y": run(*one.values())}, given, "layer 1")
    session = _Session(graph.SerializeToString(), 1)
    assert session.outputs == [f"{OUT}y"]
    ours = [session.run({n: leaf.numpy() for n, leaf in one.items()})[0] for one in given]
    pairs = zip(ours, theirs, strict=True)
    return [(torch.from_numpy(one), other["y"], len(graph.graph.node)) for one, other in pairs]


def square(rows: int, tokens: int) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("run", "make"),
    [
        (lambda x: attend(x, x, x), [heads]),
        (lambda x: attend(x, x[:, :, :4], x[:, :, :4], scale=0.2), [heads]),
        (lambda x, k: attend(x, x, x, k), [heads, padded]),
        (lambda x, k: attend(query=x, key=x, value=x, attn_mask=k), [heads, padded]),
        (lambda x, k: attend(x, x, x, k), [heads, square]),
        (lambda x, k: attend(x, x, x, k), [heads, added(padded)]),
        (lambda x: attend(x, x, x, is_causal=True), [heads]),
        (lambda x: attend(x[:, 0], x[:, 0], x[:, 0]), [heads]),
        (lambda x: attend(x, x[0], x[0]), [heads]),
        (lambda x: attend(x.double(), x.double(), x.double()), [heads]),
    ],
)
def test_attention_is_that_of_torch(run: Any, make: list[Make]) -> None:
    for ours, theirs, _ in said(run, *make):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_that_of_an_encoder_takes_few_nodes() -> None:
    _, (_, _, nodes) = said(lambda x, k: attend(x, x, x, k), heads, padded)
    assert nodes < 10


@pytest.mark.parametrize("mask", [blind, added(blind)])
def test_a_token_that_sees_none_sees_all_alike(mask: Make) -> None:
    for ours, theirs, _ in said(lambda x, k: attend(x, x, x, k), heads, mask):
        others = torch.arange(ours.shape[2]) != 2
        torch.testing.assert_close(ours[:, :, others], theirs[:, :, others], atol=1e-5, rtol=0)
        mean = heads(ours.shape[0], ours.shape[2]).mean(dim=2)
        torch.testing.assert_close(ours[:, :, 2], mean, atol=1e-5, rtol=0)
