"""What an attack is: rows made so that a model leaves late.

One attack is one file and one class, registered in `ATTACKS`. It gives rows, and what runs them;
the recording, the policies and all figures are the same for every attack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from datasets import Dataset
from pydantic import ValidationError, field_validator

from offramp.attacks.kept import Kept
from offramp.attacks.objectives import OBJECTIVES
from offramp.engines import Engine, in_batches, inputs_of
from offramp.errors import ConfigError
from offramp.model import MultiExitModel
from offramp.prediction.items import Item, Items, Row, items_of
from offramp.registry import Registry, nearest
from offramp.storage import Strict

MAX_TOKENS = 4096
"""Of a batch; gradients take many times the memory of answers."""


@dataclass
class Victim:
    """A model under attack, and how often it was asked.

    Attributes:
        model: in evaluation mode, on its device.
        processor: its tokenizer or image processor.
        queries: inputs that attacks ran through all layers.
    """

    model: MultiExitModel
    processor: Any
    progress: bool = True
    queries: int = 0

    @cached_property
    def items(self) -> Items:
        return items_of(self.model, inputs_of(self.processor), None)

    def score(self, items: Sequence[Item], objective: str) -> list[float]:
        """How well each item does what an objective wants."""
        rows, _ = self.items.read(items)
        measure, kind = OBJECTIVES[objective], self.model.problem_type

        @torch.inference_mode()
        def run(batch: Sequence[Row]) -> list[float]:
            outputs = self.model.all_exits(self.items.batch(batch, self.model.device))
            return measure(outputs[:-1], kind).tolist()

        return in_batches(rows, lambda row: row.length, run, max_tokens=MAX_TOKENS)


class Attack(Strict):
    """A way to make rows leave late. Subclasses are frozen and refuse unknown options.

    Attributes:
        name: what users type.
        reads: kinds of models it is for, by what these read.
        searches: it asks the model about one changed row after the other, which takes long.
        objective: what it raises, one of `OBJECTIVES`.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ("text",)
    searches: ClassVar[bool] = False
    objective: str

    @field_validator("objective")
    @classmethod
    def _known(cls, name: str) -> str:
        OBJECTIVES[name]  # raises with the nearest name
        return name

    def check(self, model: MultiExitModel) -> None:
        """Refuse a model that it is not for. Raises ConfigError."""
        if model.backbone.reads not in self.reads:
            raise ConfigError(
                f"Attack '{self.name}' changes {self.reads[0]}s, and the model reads "
                f"{model.backbone.reads}s. Take the attack 'embedding'."
            )

    def identity(self) -> dict[str, Any]:
        """All that what it finds depends on, beside the model and the rows; plain data."""
        return {"name": self.name, **self.model_dump(mode="json")}

    def on(self, victim: Victim, rows: Dataset, kept: Kept) -> tuple[Dataset, Engine]:
        """The rows to record, in the same order, and what records them.

        Args:
            kept: what was found for rows before a kill, and where to keep what is found now.
        """
        raise NotImplementedError


ATTACKS: Registry[type[Attack]] = Registry("attack")


def make_attacks(names: Sequence[str], options: Mapping[str, Any]) -> list[Attack]:
    """Attacks by name, each with those options that it has.

    Raises ConfigError for an option that none has, or a value that it cannot be.
    """
    kinds = [ATTACKS[name] for name in dict.fromkeys(names)]
    known = sorted({field for kind in kinds for field in kind.model_fields})
    for name in options:
        if name not in known:
            raise ConfigError(
                f"No attack of {', '.join(names)} has an option '{name}'.{nearest(name, known)} "
                f"They have: {', '.join(known)}."
            )
    return [_made(kind, options) for kind in kinds]


def _made(kind: type[Attack], options: Mapping[str, Any]) -> Attack:
    mine = {name: value for name, value in options.items() if name in kind.model_fields}
    try:
        return kind(**mine)
    except ValidationError as problem:
        first = problem.errors()[0]
        raise ConfigError(
            f"Attack '{kind.name}': option '{first['loc'][0]}': {first['msg']}."
        ) from None
