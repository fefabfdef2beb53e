"""Architectures by the names that people know, without weights and without a network."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedModel

from offramp.model.stock import auto_class

_BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}


def _bert(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert-tiny": _bert(2, 128, 2),
    "bert-mini": _bert(4, 256, 4),
    "bert-small": _bert(4, 512, 8),
    "bert-medium": _bert(8, 512, 8),
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "minilm-l6": _bert(6, 384, 12),
    "minilm-l12": _bert(12, 384, 12),
    "distilbert-base": {"model_type": "distilbert"},
    "roberta-base": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
    "albert-base": {"model_type": "albert", **_BASE},
    "modernbert-base": {"model_type": "modernbert"},
    "vit-base": {"model_type": "vit"},
}
"""What their configs say besides the defaults of transformers."""


def random_model(name: str) -> PreTrainedModel:
    """A classifier of two labels with random weights, in evaluation mode."""
    options = dict(ARCHITECTURES[name])
    config = AutoConfig.for_model(options.pop("model_type"), num_labels=2, **options)
    stock: PreTrainedModel = auto_class(config).from_config(config)
    return stock.eval()
