"""The config of a multi-exit model: the stock model's own config, and what was added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from offramp.errors import ConfigError
from offramp.exits import ExitKind, parse_exits
from offramp.registry import nearest

KEYS = ("model_type", "architectures", "method", "exits", "stock")
"""What a config.json of ours holds, besides what transformers may add."""

MIRRORED = ("id2label", "label2id", "problem_type")


class MultiExitConfig(PreTrainedConfig):
    """Config of a `MultiExitModel`.

    Args:
        stock: the stock classifier's config as a dict; decides architecture and labels.
        exits: what hangs off layers 1..L-1, see `ExitKind`; by default `pooled`.
        method: the preset the exits and the training come from, for the record.
    """

    model_type = "offramp"
    # a Trainer that evaluates gathers all else that a model says
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["exits"]

    def __init__(
        self,
        stock: Mapping[str, Any] | None = None,
        exits: Mapping[str, Any] | ExitKind | None = None,
        method: str = "auto",
        **kwargs: Any,
    ) -> None:
        self.stock = dict(stock or {"model_type": "bert"})
        self.exits = exits.to_dict() if isinstance(exits, ExitKind) else dict(exits or {})
        self.method = method
        mirrored = self.stock_config()
        for name in MIRRORED:
            kwargs[name] = getattr(mirrored, name)
        super().__init__(**kwargs)

    def stock_config(self) -> PreTrainedConfig:
        """The stock model's config as transformers knows it."""
        options = dict(self.stock)
        model_type = options.pop("model_type", None)
        if model_type is None:
            raise ConfigError("config.json: key 'stock.model_type' is missing.")
        return AutoConfig.for_model(model_type, **options)

    def exit_kind(self) -> ExitKind:
        return parse_exits(self.exits, "config.json: exits")

    def to_dict(self) -> dict[str, Any]:
        """Only what this config decides; labels and the like live in `stock`."""
        return {
            "model_type": self.model_type,
            "architectures": ["MultiExitModel"],
            "method": self.method,
            "exits": self.exits,
            "stock": self.stock,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def check_config_keys(data: Mapping[str, Any], source: str) -> None:
    """Refuse missing keys, and keys that a config of ours never has."""
    known = [*KEYS, "transformers_version", "dtype"]
    for key in data:
        if key not in known:
            raise ConfigError(f"{source}: unknown key '{key}'.{nearest(key, known)}")
    for key in KEYS:
        if key not in data:
            raise ConfigError(f"{source}: key '{key}' is missing.")


AutoConfig.register("offramp", MultiExitConfig)
