"""A smaller stock model from the first layers of one: what every early exit has to beat."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from offramp.backbones import make_backbone
from offramp.errors import ConfigError, ModelError


def truncated(stock: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The first `layers` layers of a classifier and its head, which needs fine-tuning.

    Weights are copied. Raises ConfigError for a number of layers that the model does not have,
    ModelError for an architecture whose config has no such number.
    """
    backbone: Any = make_backbone(stock)
    if not 1 <= layers <= backbone.depth:
        raise ConfigError(
            f"The model has {backbone.depth} layers; the first {layers} cannot be taken. "
            f"Give a number from 1 to {backbone.depth}."
        )
    config = _config(stock, layers, len(backbone.layers))
    path = next(name for name, part in stock.named_modules() if part is backbone.layers)
    gone = tuple(f"{path}.{number}." for number in range(layers, len(backbone.layers)))
    kept = {n: leaf for n, leaf in stock.state_dict().items() if not n.startswith(gone)}
    smaller = type(stock)(config)
    smaller.load_state_dict(kept)
    smaller.train(stock.training)
    return smaller.to(device=stock.device, dtype=stock.dtype)  # type: ignore[call-arg]


def _config(stock: PreTrainedModel, layers: int, modules: int) -> PreTrainedConfig:
    """The config of the smaller model; lists with an entry per layer are cut as well."""
    config: Any = copy.deepcopy(stock.config)
    depth = getattr(config, "num_hidden_layers", None)
    # ALBERT spreads few groups over all layers, so fewer layers would meet other groups
    if depth is None or modules not in (1, depth):
        raise ModelError(
            f"Layers of a '{config.model_type}' of this kind cannot be cut off: they share weights "
            "in groups or their widths differ. Take exits instead."
        )
    config.num_hidden_layers = layers
    if modules > 1 and hasattr(config, "num_hidden_groups"):
        config.num_hidden_groups = layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == depth and name.startswith("layer"):
            setattr(config, name, value[:layers])
    return config
