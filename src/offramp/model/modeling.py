"""A Hugging Face classifier that can answer after every layer."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from offramp.backbones import Batch, check_architecture, make_backbone
from offramp.backbones.dtypes import DTYPES
from offramp.errors import ConfigError, ModelError
from offramp.exits import ExitKind, ExitOutput, ExitSpec
from offramp.model import folder
from offramp.model.configuration import MultiExitConfig
from offramp.model.stock import Head, auto_class, load_stock
from offramp.objectives import task_loss
from offramp.registry import nearest

_HUB = ("revision", "local_files_only", "token", "cache_dir")
# what AutoModel passes on beside the user's own options; all of it is settled by the folder
_FROM_AUTO = ("config", "trust_remote_code", "adapter_kwargs")


@dataclass
class MultiExitOutput(ModelOutput):
    """Answers of all exits.

    Attributes:
        loss: the task loss of the full-depth answer, where labels were given.
        logits: full-depth scores, (rows, classes).
        exits: one `ExitOutput` per layer, the last one at full depth.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exits: tuple[ExitOutput, ...] | None = None


class MultiExitModel(PreTrainedModel):
    """A stock classifier of texts or images with an exit after each of its layers.

    The exit after the last layer is the stock model's own head, so full-depth answers are
    those of the stock model bit for bit, and `stock` is that model whenever it is wanted back.

    Example:
        >>> exits = ExitSpec(pooling="mean")
        >>> model = MultiExitModel.from_pretrained("my-classifier", exits=exits)
        >>> model.save_pretrained("my-early-exit-model")
    """

    config_class = MultiExitConfig
    base_model_prefix = "stock"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: MultiExitConfig, stock: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if stock is None:
            inner = config.stock_config()
            check_architecture(inner.model_type)
            stock = auto_class(inner).from_config(inner)
        self.stock = stock
        self.main_input_name = stock.main_input_name
        self._check_task()
        self.backbone = make_backbone(stock)
        kind = config.exit_kind()
        self.exits = kind.build(self.backbone, cast(int, config.num_labels))
        self._known: tuple[Any, str] | None = None

    def _check_task(self) -> None:
        if self.problem_type == "regression" and self.stock.num_labels != 1:
            raise ModelError(
                f"A regression model answers one number; this one has {self.stock.num_labels} "
                "labels. Set its config's problem_type, or give it a head with one label."
            )

    @property
    def depth(self) -> int:
        """Number of layers, L."""
        return self.backbone.depth

    @property
    def problem_type(self) -> str:
        """As in transformers; inferred from the number of labels where the config is silent."""
        return task_of(self.config.problem_type, cast(int, self.stock.num_labels))

    @property
    def max_length(self) -> int | None:
        """Longest input in tokens, special tokens included, or None where nothing limits it."""
        return self.backbone.max_length

    @property
    def remembers(self) -> bool:
        """No exit before the one asked may be skipped, see `offramp.exits.Exits`."""
        return self.exits.remembers

    def exit_at(self, layer: int) -> Callable[..., tuple[ExitOutput, Any]]:
        """The exit after `layer` (1-based), see `offramp.exits.Exit`."""
        return self.exits.at(layer) if layer < self.depth else self._full_depth_exit

    def _full_depth_exit(
        self, hidden: Tensor, mask: Tensor | None, carry: Any = None
    ) -> tuple[ExitOutput, Any]:
        return self.exits.full(self.backbone.head(hidden, mask), hidden, carry)

    def all_exits(self, batch: Batch) -> tuple[ExitOutput, ...]:
        """Run every layer and every exit."""
        outputs, carry = [], None
        flow = self.backbone.embed(batch)
        for layer in range(1, self.depth + 1):
            flow = self.backbone.layer(layer, flow)
            output, carry = self.exit_at(layer)(flow.hidden, flow.mask, carry)
            outputs.append(output)
        return tuple(outputs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MultiExitOutput:
        """All exits of a batch; other tensors reach the embedding."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "pixel_values": pixel_values,
            **kwargs,
        }
        batch = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        outputs = self.all_exits(batch)
        logits = outputs[-1].scores
        loss = None if labels is None else task_loss(logits, labels, self.problem_type)
        return MultiExitOutput(loss=loss, logits=logits, exits=outputs)

    def fingerprint(self) -> str:
        """A name for exactly these weights and exits; stable over save, load, device and dtype.

        Weights that are saved in another dtype are others, and so is their name.
        """
        weights = self._weights()
        if self._known is None or self._known[0] != weights:
            manifest = folder.manifest_of(self.config.to_dict(), self.state_dict())
            self.remember(manifest.fingerprint)
        assert self._known is not None
        return self._known[1]

    def remember(self, fingerprint: str) -> None:
        """Keep the fingerprint of the present weights until one of them changes."""
        self._known = (self._weights(), fingerprint)

    def _weights(self) -> tuple[tuple[int, int], ...]:
        """Changes when a weight is replaced or written to, not when it moves or is cast."""
        return tuple(
            (id(leaf), 0 if leaf.is_inference() else leaf._version)
            for leaf in itertools.chain(self.parameters(), self.buffers())
        )

    @classmethod
    def from_stock(
        cls, stock: PreTrainedModel, exits: ExitKind | None = None, method: str = "auto"
    ) -> MultiExitModel:
        """Hang new exits on a classifier; its weights and its mode are shared, not copied."""
        spec = exits or ExitSpec(pooling=make_backbone(stock).poolings[0])
        # some architectures have several heads, which only this tells apart
        plain = {**folder.plain_config(stock.config), "architectures": [type(stock).__name__]}
        config = MultiExitConfig(stock=plain, exits=spec, method=method)
        model = cls(config, stock)
        model.train(stock.training)
        return model.to(device=stock.device, dtype=stock.dtype)  # type: ignore[call-arg]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str | os.PathLike[str],
        *,
        method: str | None = None,
        exits: ExitKind | None = None,
        head: Head | None = None,
        dtype: str | torch.dtype | None = None,
        **hub: Any,
    ) -> MultiExitModel:
        """Load a multi-exit model, or hang new exits on any supported classifier.

        Args:
            source: a folder or hub id; ours, or a stock checkpoint.
            method: preset for the exits of a stock checkpoint, by default `auto`.
            exits: overrides the preset's exits.
            head: a new task head for a checkpoint that has none; without it a missing head
                is an error.
            dtype: compute dtype, also by its name; `auto` is that of the stored weights. The
                fingerprint stays theirs.
            hub: `revision`, `local_files_only`, `token`, `cache_dir`.

        Raises:
            ModelError: no such model, no weights, unsupported architecture, or any missing,
                unexpected, misshapen or changed tensor, by name.
            ConfigError: an unknown option, or one that does not apply to this folder.
        """
        _check_options(hub)
        if not isinstance(exits, ExitKind | None):
            raise ConfigError(f"exits is {exits!r}. Give an ExitSpec, as ExitSpec(pooling='cls').")
        wanted = _dtype(dtype)
        path = folder.resolve(source, **{name: hub[name] for name in _HUB if name in hub})
        if folder.is_ours(path):
            if any(option is not None for option in (method, exits, head)):
                raise ConfigError(
                    f"{source} has its exits already; method, exits and head are for stock "
                    "classifiers. Leave them out."
                )
            model = folder.load(cls, path)
        else:
            from offramp.methods import METHODS

            preset = METHODS[method or "auto"]
            stock = load_stock(path, head)
            task = task_of(stock.config.problem_type, cast(int, stock.num_labels))
            model = cls.from_stock(stock, exits or preset.exits_for(task), preset.name)
        model.eval()
        _check_finite(model, source)
        return model if wanted is None else model.to(dtype=wanted)  # type: ignore[call-arg]

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        processor: Any = None,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write config, weights, manifest and model card, whole or not at all.

        Other files in the folder stay, and so does what the card's owner wrote there. Operating
        points of other weights are removed.
        """
        if is_main_process:
            folder.save(self, Path(save_directory), state_dict, processor)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)


def task_of(problem_type: str | None, num_labels: int) -> str:
    """A problem type as in transformers, or what the number of labels says where there is none."""
    if problem_type is not None:
        return str(problem_type)
    return "regression" if num_labels == 1 else "single_label_classification"


def _check_finite(model: MultiExitModel, source: object) -> None:
    """Refuse broken layers, which may give numbers all the same: attention kernels lose NaN.

    A broken embedding breaks the rows that hold its token alone, and these are named.
    """
    of_layers = set(map(id, model.backbone.layers.parameters()))
    for name, leaf in model.named_parameters():
        # the ends of the range tell, at a tenth of what it costs to ask each number
        if id(leaf) in of_layers and not torch.stack(leaf.aminmax()).isfinite().all():
            raise ModelError(
                f"{source}: '{name}' of a layer holds NaN or infinite values, as after a training "
                "that diverged. Take an earlier checkpoint."
            )


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """As transformers reads it; None is that of the stored weights."""
    if dtype is None or dtype == "auto":
        return None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ConfigError(f"dtype is {dtype!r}. Give float32, bfloat16, float16 or auto.")
    return found


def _check_options(given: Mapping[str, Any]) -> None:
    known = [*_HUB, "method", "exits", "head", "dtype"]
    for name in given:
        if name not in (*_HUB, *_FROM_AUTO):
            raise ConfigError(
                f"from_pretrained: unknown option '{name}'.{nearest(name, known)} "
                f"Options: {', '.join(known)}."
            )


AutoModelForSequenceClassification.register(MultiExitConfig, MultiExitModel)
AutoModelForImageClassification.register(MultiExitConfig, MultiExitModel)
