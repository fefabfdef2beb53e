"""Loading stock classifiers: strict about the backbone, explicit about a new head."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from offramp.backbones import check_architecture
from offramp.errors import ModelError
from offramp.model.bounds import UNUSABLE, Building, Extent
from offramp.storage import Strict, read_json

logger = logging.getLogger("offramp")


class Head(Strict):
    """A task head to be trained: what it answers."""

    problem_type: str
    labels: tuple[str, ...] = ()

    def config(self) -> dict[str, Any]:
        names = self.labels or ("LABEL_0",)
        return {
            "problem_type": self.problem_type,
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
        }


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that makes a classifier of such a config."""
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return AutoModelForImageClassification
    return AutoModelForSequenceClassification


def load_stock(path: Path, head: Head | None = None) -> PreTrainedModel:
    """Load a stock classifier from a folder, safetensors only.

    Without `head`, every tensor must be there and no other. With it, that holds for the
    backbone only, and the names of the tensors that start anew are logged.
    """
    extent = Extent.of(path)
    extent.check(_sizes(read_json(path / "config.json", ModelError)), path / "config.json")
    try:
        with Building(extent, path / "config.json"):
            config = AutoConfig.from_pretrained(
                path, trust_remote_code=False, **(head.config() if head else {})
            )
            check_architecture(config.model_type)
            stock, info = auto_class(config).from_pretrained(
                path,
                config=config,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except UNUSABLE as problem:
        said = _first_line(problem)
        raise ModelError(f"{path}: cannot be loaded as a classifier: {said}") from problem
    _check_keys(stock, info, path, head)
    return stock


def _sizes(config: Any) -> Any:
    """The part of a config that its architecture reads; a note of the user's is no size."""
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return config
    default = CONFIG_MAPPING[model_type]()
    known = {*default.to_dict(), *default.attribute_map, "num_labels"}
    return {key: value for key, value in config.items() if key in known}


def _check_keys(stock: PreTrainedModel, info: Any, path: Path, head: Head | None) -> None:
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    lost = [key for key in fresh if head is None or not _belongs_to_head(stock, key)]
    pooled = any(".pooler." in key for key, _ in stock.named_parameters())
    for key in sorted(info["unexpected_keys"]):
        # RoBERTa checkpoints often carry a pooler that their classifier never reads
        unused = ".pooler." in key and not pooled
        if not unused and (head is None or not _belongs_to_head(stock, key)):
            lost.append(key)
    if lost:
        mend = "" if head else " Fine-tune it first, for example with `offramp train`."
        raise ModelError(
            f"{path}: missing, misshapen or unexpected weights: {', '.join(lost[:8])}.{mend}"
        )
    if fresh:
        logger.warning(
            "%s has no head for this task; these weights start anew: %s", path, ", ".join(fresh)
        )


def _belongs_to_head(stock: PreTrainedModel, key: str) -> bool:
    return not key.startswith(f"{stock.base_model_prefix}.") or ".pooler." in key


def _first_line(problem: BaseException) -> str:
    return str(problem).strip().split("\n")[0] or type(problem).__name__
