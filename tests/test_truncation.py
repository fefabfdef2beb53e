"""The first layers of a model as a smaller model: the same layers, and a fine-tune of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AlbertConfig, AutoModelForSequenceClassification

from offramp import train
from offramp.backbones import make_backbone
from offramp.errors import ConfigError, ModelError
from offramp.model import truncated
from offramp.testing import (
    ARCHITECTURES,
    save_tiny_stock,
    tiny_batch,
    tiny_batch_for,
    tiny_stock,
    tiny_texts,
)
from offramp.testing.tiny import RELATIVES
from offramp.training import TrainOptions

CUTTABLE = ("vit", "deit", *(arch for arch in ARCHITECTURES + RELATIVES if arch != "albert"))


@pytest.mark.parametrize("arch", CUTTABLE)
def test_the_layers_are_those_of_the_larger_model(arch: str) -> None:
    stock = tiny_stock(arch)
    smaller = truncated(stock, 4)
    batch, whole = tiny_batch_for(stock, 3), make_backbone(stock)
    with torch.no_grad():
        flow = whole.embed(batch)
        for layer in range(1, 5):
            flow = whole.layer(layer, flow)
        wanted = whole.head(flow.hidden, flow.mask)
        assert torch.equal(smaller(**batch).logits, wanted)
    assert smaller.num_parameters() < stock.num_parameters()
    assert stock.config.num_hidden_layers == 6


def test_one_group_of_an_albert_is_run_less_often() -> None:
    config = AlbertConfig(
        vocab_size=200,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=5,
        num_attention_heads=2,
        intermediate_size=16,
    )
    stock = AutoModelForSequenceClassification.from_config(config).eval()
    batch, whole = tiny_batch(3), make_backbone(stock)
    with torch.no_grad():
        flow = whole.layer(2, whole.layer(1, whole.embed(batch)))
        wanted = whole.head(flow.hidden, flow.mask)
        assert torch.equal(truncated(stock, 2)(**batch).logits, wanted)


@pytest.mark.parametrize("arch", ["albert", "cifar_resnet"])
def test_what_cannot_be_cut_says_so(arch: str) -> None:
    with pytest.raises(ModelError, match="cannot be cut off"):
        truncated(tiny_stock(arch), 2)


@pytest.mark.parametrize("layers", [0, 7])
def test_a_model_has_only_the_layers_it_has(layers: int) -> None:
    with pytest.raises(ConfigError, match="from 1 to 6"):
        truncated(tiny_stock(), layers)


def test_a_smaller_model_is_fine_tuned_and_saved_as_a_stock_checkpoint(tmp_path: Path) -> None:
    source = save_tiny_stock(tmp_path / "stock")
    rows = Dataset.from_dict(
        {"text": tiny_texts(24), "label": [f"label-{n % 3}" for n in range(24)]}
    )
    options = TrainOptions(max_steps=2, batch_size=8, quiet=True)
    train(source, rows, tmp_path / "two", method="plain", layers=2, options=options)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two")
    assert again.config.num_hidden_layers == 2
    assert len(again.bert.encoder.layer) == 2
