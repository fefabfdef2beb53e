"""Loading stock classifiers: strict about the backbone, explicit about a new head."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from offramp.errors import ModelError
from offramp.storage import Strict

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


def load_stock(path: Path, head: Head | None = None) -> PreTrainedModel:
    """Load a stock classifier from a folder, safetensors only.

    Without `head`, every tensor must be there. With it, only the backbone must be, and the
    names of the tensors that start anew are logged.
    """
    try:
        config = AutoConfig.from_pretrained(path, **(head.config() if head else {}))
        stock, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=head is not None,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as problem:
        raise ModelError(
            f"{path}: cannot be loaded as a classifier: {_first_line(problem)}"
        ) from problem
    except Exception as problem:
        # safetensors raises its own type, which derives from Exception alone
        if type(problem).__name__ != "SafetensorError":
            raise
        raise ModelError(f"{path}: the weights file is broken: {problem}") from problem
    _check_keys(stock, info, path, head)
    return stock


def _check_keys(stock: PreTrainedModel, info: Any, path: Path, head: Head | None) -> None:
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    lost = [key for key in fresh if head is None or not _belongs_to_head(stock, key)]
    if lost:
        mend = "" if head else " Fine-tune it first, for example with `offramp train`."
        raise ModelError(f"{path}: missing or misshapen weights: {', '.join(lost[:8])}.{mend}")
    if fresh:
        logger.warning(
            "%s has no head for this task; these weights start anew: %s", path, ", ".join(fresh)
        )


def _belongs_to_head(stock: PreTrainedModel, key: str) -> bool:
    return not key.startswith(f"{stock.base_model_prefix}.") or ".pooler." in key


def _first_line(problem: BaseException) -> str:
    return str(problem).strip().split("\n")[0] or type(problem).__name__
