"""Variants of `auto`, one change at a time, as methods for `compare --plugin auto_variants`, with
this folder on PYTHONPATH."""

from __future__ import annotations

from functools import partial
from typing import Any

from offramp.exits import ExitKind, ExitSpec
from offramp.exits.learned import LearnedSpec
from offramp.methods import METHODS
from offramp.methods.base import Method
from offramp.objectives.blended import Blended

ATTENTIVE = LearnedSpec(pooling="attention", correctness="own")
PLAIN = ExitSpec(pooling="attention")
SHARED = LearnedSpec(pooling="attention")
NAMES: dict[str, str] = {}
"""What is other than in `v-base`, by name."""


def variant(
    name: str, told: str, exits: ExitKind = ATTENTIVE, measures: bool = False, **options: Any
) -> None:
    made = Method(
        name=f"v-{name}",
        paper=f"a variant of auto: {told}",
        exits=exits,
        objective=partial(Blended, **{"exits_first": 0.0, **options}),
        policy="max_probability",
        measures_pooling=measures,
    )
    METHODS.register(made.name, made)
    NAMES[made.name] = told


variant("base", "")
variant("depth", "weights by depth, as PABEE's", weighting="depth")
variant("equal", "equal weights", weighting="equal")
variant("sharp3", "beta 3 instead of 1", sharpness=3.0)
variant("soft0", "no distillation", distillation=0.0)
variant("soft2", "four times the distillation", distillation=2.0)
variant("plain-exits", "no correctness output", exits=PLAIN)
variant("probed", "pooling as the probe says, not learned", measures=True)
variant("shared", "one correctness output for all exits", exits=SHARED)
variant(
    "hidden",
    "a hidden layer in every exit",
    exits=LearnedSpec(pooling="attention", correctness="own", hidden=True),
)
variant("full1", "full depth weighs more", full=1.0)
variant("warm", "no correctness output; exits learn alone first", exits=PLAIN, exits_first=0.25)
variant("warm-half", "v-warm, half of the time alone", exits=PLAIN, exits_first=0.5)
variant(
    "warm-soft0",
    "v-warm without distillation",
    exits=PLAIN,
    exits_first=0.25,
    distillation=0.0,
)
variant("fast", "exits at three times the rate", rate=3.0)
variant("fast-plain", "v-fast, no correctness output", exits=PLAIN, rate=3.0)
variant(
    "fast-warm",
    "v-warm with exits at three times the rate",
    exits=PLAIN,
    exits_first=0.25,
    rate=3.0,
)
variant("simple", "no correctness output, no distillation", exits=PLAIN, distillation=0.0)
variant("fast-soft0", "v-fast without distillation", distillation=0.0, rate=3.0)
variant(
    "fast-simple",
    "v-fast, no correctness output, no distillation",
    exits=PLAIN,
    distillation=0.0,
    rate=3.0,
)
variant("fast-shared", "v-fast with one correctness output", exits=SHARED, rate=3.0)
