"""Exits: what they pool, and that padding never counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from offramp.exits import POOLINGS, ExitSpec, PooledExit, mean_of_tokens
from offramp.model import MultiExitModel
from offramp.testing import tiny_batch, tiny_model, tiny_stock

WIDTH = 8


def first_token(hidden: Tensor, mask: Tensor | None) -> Tensor:
    return torch.tanh(hidden[:, 0])


HOST: Any = SimpleNamespace(pool=first_token, view=None, pooler=None)


def make(pooling: Any, **options: Any) -> PooledExit:
    torch.manual_seed(0)
    made = PooledExit(ExitSpec(pooling=pooling, **options), WIDTH, 3, HOST).eval()
    if pooling == "attention":
        nn.init.normal_(made.query.weight)
        nn.init.normal_(made.first)
    return made


@st.composite
def padded(draw: Any) -> tuple[Tensor, Tensor]:
    """Hidden states (rows, tokens, width) and a mask, at least one real token per row."""
    rows, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 20))
    lengths = draw(st.lists(st.integers(1, tokens), min_size=rows, max_size=rows))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    hidden = torch.randn(rows, tokens, WIDTH, generator=random)
    return hidden, (torch.arange(tokens) < torch.tensor(lengths).unsqueeze(1)).long()


@pytest.mark.parametrize("pooling", POOLINGS)
@settings(max_examples=60)
@given(given_=padded(), garbage=st.floats(-1e6, 1e6))
def test_what_stands_in_the_padding_never_counts(
    pooling: Any, given_: tuple[Tensor, Tensor], garbage: float
) -> None:
    hidden, mask = given_
    made = make(pooling)
    other = torch.where(mask.unsqueeze(-1) == 1, hidden, torch.tensor(garbage))
    one, two = made(hidden, mask)[0].scores, made(other, mask)[0].scores
    assert torch.equal(one, two)


@pytest.mark.parametrize("pooling", POOLINGS)
@settings(max_examples=60)
@given(given_=padded(), more=st.integers(1, 30))
def test_more_padding_changes_nothing(
    pooling: Any, given_: tuple[Tensor, Tensor], more: int
) -> None:
    hidden, mask = given_
    made = make(pooling)
    longer = torch.cat((hidden, torch.full((len(hidden), more, WIDTH), 9.0)), dim=1)
    longer_mask = torch.cat((mask, torch.zeros(len(mask), more, dtype=torch.long)), dim=1)
    one, two = made(hidden, mask)[0].scores, made(longer, longer_mask)[0].scores
    assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_no_mask_means_that_every_token_is_real(pooling: Any) -> None:
    made = make(pooling)
    hidden = torch.randn(4, 7, WIDTH)
    one = made(hidden, None)[0].scores
    assert torch.allclose(one, made(hidden, torch.ones(4, 7).long())[0].scores, atol=1e-6)


def test_attention_starts_as_the_mean_and_may_learn_the_first_token() -> None:
    model = MultiExitModel.from_stock(tiny_stock(), ExitSpec(pooling="attention", hidden=True))
    made = model.exits["2"]
    batch = tiny_batch(5)
    hidden, mask = torch.randn(5, 16, 32), batch["attention_mask"]
    assert torch.allclose(made.pool(hidden, mask), mean_of_tokens(hidden, mask), atol=1e-6)
    with torch.no_grad():
        made.first.fill_(100.0)
    assert torch.allclose(made.pool(hidden, mask), hidden[:, 0], atol=1e-5)


def test_the_pooler_is_the_backbones_own_and_shared_by_all_exits() -> None:
    model = tiny_model(spec=ExitSpec(pooling="pooler"))
    hidden = torch.randn(3, 5, 32)
    for made in model.exits.values():
        assert torch.equal(made.pool(hidden, None), model.stock.bert.pooler(hidden))
        assert [name for name, _ in made.named_parameters()] == [
            "classifier.weight",
            "classifier.bias",
        ]


def test_an_own_dense_layer_starts_as_a_copy_of_the_pooler() -> None:
    model = MultiExitModel.from_stock(tiny_stock(), ExitSpec(hidden=True))
    pooler = model.stock.bert.pooler.dense
    for made in model.exits.values():
        assert torch.equal(made.dense.weight, pooler.weight)
        assert made.dense.weight is not pooler.weight


def test_a_row_of_nothing_but_padding_is_still_a_number() -> None:
    for pooling in POOLINGS:
        scores = make(pooling)(torch.randn(2, 4, WIDTH), torch.zeros(2, 4).long())[0].scores
        assert torch.isfinite(scores).all()


def _prune(layer: nn.Linear, *names: str) -> nn.Linear:
    for name in names:
        prune.random_unstructured(layer, name, amount=0.5)
    return layer


def _watched(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_hook(lambda module, given, said: 2 * said)
    return layer


def _replaced(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda given: functional.relu(given @ layer.weight.T)  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: _prune(layer, "weight"),
        lambda layer: _prune(layer, "weight", "bias"),
        lambda layer: _prune(layer, "bias"),
        lambda layer: prune.remove(_prune(layer, "weight"), "weight"),
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: nn.Sequential(layer, nn.Tanh()),
        _watched,
        _replaced,
    ],
)
def test_whatever_is_done_to_its_linear_layer_is_what_an_exit_says(change: Any) -> None:
    exit = tiny_model(spec=ExitSpec(pooling="cls"), layers=2).exit_at(1)
    assert isinstance(exit, PooledExit)
    changed = change(exit.classifier)
    exit.classifier = changed.eval() if isinstance(changed, nn.Module) else exit.classifier
    hidden = torch.randn(3, 5, 32)
    with torch.inference_mode():
        said = exit(hidden, None)[0].scores
        assert torch.equal(said, exit.classifier(hidden[:, 0]))


def test_dropout_works_in_training_only() -> None:
    made = make("mean", dropout=0.5)
    hidden = torch.randn(3, 5, WIDTH)
    assert torch.equal(made(hidden, None)[0].scores, made(hidden, None)[0].scores)
    made.train()
    assert not torch.equal(made(hidden, None)[0].scores, made(hidden, None)[0].scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_half_precision_stays_half_precision_and_finite(pooling: Any, dtype: torch.dtype) -> None:
    made = PooledExit(ExitSpec(pooling=pooling), WIDTH, 3, HOST).to(dtype)
    scores = made(torch.randn(2, 6, WIDTH).to(dtype), torch.ones(2, 6).long())[0].scores
    assert scores.dtype == dtype
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize(
    "options",
    [{"pooling": "max"}, {"dropout": 1.0}, {"dropout": float("nan")}, {"size": 3}, {"hidden": 2}],
)
def test_a_spec_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ExitSpec(**options)


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ExitSpec().pooling = "mean"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_in_half_precision_neither_overflows_nor_miscounts_tokens(dtype: Any) -> None:
    hidden = torch.full((2, 500, WIDTH), 200.0, dtype=dtype)
    mask = torch.ones(2, 500, dtype=torch.long)
    mask[1, 400:] = 0
    assert torch.equal(mean_of_tokens(hidden, mask), hidden[:, 0])
    halves = torch.cat((hidden[:, :389], 2 * hidden[:, 389:]), dim=1)
    found = mean_of_tokens(halves, torch.ones_like(mask))
    assert torch.equal(found, mean_of_tokens(halves, None))
