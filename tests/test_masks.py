"""A mask of tokens by tokens is made thin where it says padding alone, and only there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.backbones import Flow
from offramp.engines.masks import with_thin_masks

NAME = "attention_mask.1"
Table = Callable[[Tensor], Tensor]


def batch(rows: int, tokens: int) -> dict[str, Tensor]:
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    mask[1:, tokens // 2 :] = 0
    return {"attention_mask": mask, "x": torch.rand(rows, tokens, 4)}


BATCHES, LONGEST = [batch(3, 6), batch(2, 9)], batch(2, 30)


def attend(hidden: Tensor, table: Tensor) -> Tensor:
    heads = hidden[:, None]
    return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, table)[:, 0]


def backbone(table: Table, layer: Callable[[Tensor, Tensor], Tensor] = attend) -> Any:
    """Two layers; `table` makes what they are given of a mask (rows, tokens)."""

    def embed(given: dict[str, Tensor]) -> Flow:
        mask = given["attention_mask"]
        return Flow(given["x"], mask, {NAME: table(mask)})

    def run(number: int, flow: Flow) -> Flow:
        return flow._replace(hidden=layer(flow.hidden, flow.inputs[NAME]))

    return SimpleNamespace(depth=2, embed=embed, layer=run)


def padding(mask: Tensor) -> Tensor:
    rows, tokens = mask.shape
    return mask.bool()[:, None, None].expand(rows, 1, tokens, tokens)


def window(mask: Tensor, reach: int = 2) -> Tensor:
    near = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).triu(-reach).tril(reach)
    return padding(mask) & near


def wide_window(mask: Tensor) -> Tensor:
    return window(mask, reach=20)


def added(mask: Tensor) -> Tensor:
    return torch.where(padding(mask), 0.0, -1e9)


def rows_of(table: Tensor) -> int:
    return table.shape[2]


def test_a_table_that_says_padding_is_one_row_of_it() -> None:
    plain = backbone(padding)
    embed = with_thin_masks(plain, BATCHES, LONGEST)
    for one in BATCHES:
        thin, full = embed(one), plain.embed(one)
        assert rows_of(thin.inputs[NAME]) == 1
        for number in (1, 2):
            thin, full = plain.layer(number, thin), plain.layer(number, full)
        real = one["attention_mask"].bool()
        assert torch.allclose(thin.hidden[real], full.hidden[real], atol=1e-6)


@pytest.mark.parametrize("table", [window, wide_window, added])
def test_a_table_that_says_more_or_is_no_yes_and_no_stays(table: Table) -> None:
    embed = with_thin_masks(backbone(table), BATCHES, LONGEST)
    assert rows_of(embed(BATCHES[0]).inputs[NAME]) == 6


def second_token(hidden: Tensor, table: Tensor) -> Tensor:
    return hidden * table[:, 0, 1, :, None]


def how_many_tokens(hidden: Tensor, table: Tensor) -> Tensor:
    return hidden * table.shape[2]


@pytest.mark.parametrize("layer", [second_token, how_many_tokens])
def test_layers_that_look_into_the_table_keep_it(layer: Any) -> None:
    embed = with_thin_masks(backbone(padding, layer), BATCHES, LONGEST)
    assert rows_of(embed(BATCHES[0]).inputs[NAME]) == 6


def test_where_texts_may_have_any_length_a_window_may_be_beyond_what_was_seen() -> None:
    embed = with_thin_masks(backbone(padding), BATCHES, None)
    assert rows_of(embed(BATCHES[0]).inputs[NAME]) == 6


def test_a_model_without_masks_is_left_as_it_is() -> None:
    plain = SimpleNamespace(depth=1, embed=lambda given: Flow(given["pixel_values"], None, {}))
    images = [{"pixel_values": torch.zeros(rows, 3, 8, 8)} for rows in (2, 3)]
    assert with_thin_masks(plain, images, images[0]) is plain.embed  # type: ignore[arg-type]
