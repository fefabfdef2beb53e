"""Which methods can be compared: those that do the task and fit the model's layers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedModel

from offramp.backbones import make_backbone
from offramp.comparison.plan import ALL, PLAIN, REFERENCES, TRUNCATED
from offramp.errors import ConfigError, OfframpError
from offramp.methods import METHODS
from offramp.model import truncated
from offramp.registry import nearest
from offramp.storage import parse_document

logger = logging.getLogger("offramp")


def eligible(
    asked: Sequence[str], problem_type: str, stock: PreTrainedModel, pooling: str | None = None
) -> tuple[str, ...]:
    """Those asked for, `plain` first; `all` is spelt out, without those that cannot be.

    Args:
        stock: the classifier that they start from.
        pooling: that exits which pool are to have.

    Raises:
        ConfigError, ModelError: a method that is named is unknown, or cannot be had on this task
            or model.
    """
    known = [*METHODS, *REFERENCES]
    chosen: list[str] = []
    for name in asked:
        if name == ALL:
            for one in known:
                try:
                    _check(one, problem_type, stock, pooling)
                    chosen.append(one)
                except OfframpError as problem:
                    logger.info("Left out of `all`: %s: %s", one, problem)
        elif name not in known:
            hint = nearest(name, [ALL, *known])
            raise ConfigError(f"Unknown method '{name}'.{hint} Known: {', '.join(known)}.")
        else:
            _check(name, problem_type, stock, pooling)
            chosen.append(name)
    if not set(chosen) - {PLAIN}:
        raise ConfigError(f"There is nothing to compare. Known methods: {', '.join(known)}.")
    return tuple(dict.fromkeys((PLAIN, *chosen)))


def _check(name: str, problem_type: str, stock: PreTrainedModel, pooling: str | None) -> None:
    if name == TRUNCATED:
        truncated(stock, 1)
    if name not in METHODS:
        return
    method = METHODS[name]
    method.check(problem_type)
    exits = method.exits_for(problem_type)
    settings = exits.model_dump()
    if pooling is not None and method.measures_pooling and "pooling" in settings:
        settings["pooling"] = pooling
    exits = parse_document(type(exits), settings, f"Exits of method '{name}'")
    if "pooling" in settings and pooling is None:
        return  # a pooling is measured that the model has
    exits.build(make_backbone(stock), int(stock.config.num_labels or 1))
