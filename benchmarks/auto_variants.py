"""Variants of `auto`, one change at a time, as methods for `compare --plugin auto_variants`."""

from __future__ import annotations

from functools import partial
from typing import Any

from offramp.exits import ExitSpec
from offramp.exits.learned import LearnedSpec
from offramp.methods import METHODS
from offramp.methods.base import Method
from offramp.objectives.blended import Blended

ATTENTIVE = LearnedSpec(pooling="attention", correctness="own")


def variant(name: str, exits: Any = ATTENTIVE, measures: bool = False, **options: Any) -> None:
    made = Method(
        name=f"v-{name}",
        paper="a variant of auto",
        exits=exits,
        objective=partial(Blended, **options),
        policy="max_probability",
        measures_pooling=measures,
    )
    METHODS.register(made.name, made)


variant("base")
variant("depth", weighting="depth")
variant("equal", weighting="equal")
variant("sharp3", sharpness=3.0)
variant("soft0", distillation=0.0)
variant("soft2", distillation=2.0)
variant("plain-exits", exits=ExitSpec(pooling="attention"))
variant("probed", measures=True)
variant("shared", exits=LearnedSpec(pooling="attention"))
variant("hidden", exits=LearnedSpec(pooling="attention", correctness="own", hidden=True))
variant("full1", full=1.0)
variant("warm", exits=ExitSpec(pooling="attention"), exits_first=0.25)
variant("warm-soft0", exits=ExitSpec(pooling="attention"), exits_first=0.25, distillation=0.0)
variant("warm-half", exits=ExitSpec(pooling="attention"), exits_first=0.5)
