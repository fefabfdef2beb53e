"""A claim about the defaults: they are those that docs/results/defaults.md measured and chose."""

from __future__ import annotations

import json
from pathlib import Path

from offramp.exits import ExitSpec
from offramp.methods import METHODS
from offramp.training import ATTACH, ATTACH_TOKENS, TRAIN, probe
from offramp.training.options import FEWEST_UPDATES

CHOSEN = Path(__file__).parents[1] / "docs" / "results" / "defaults" / "chosen.json"
ADVICE = (
    "A default differs from docs/results/defaults/chosen.json. Measure it with `python "
    "benchmarks/defaults.py SET --seed 1` for every set, write what wins into chosen.json, and "
    "the page with `python benchmarks/defaults_table.py`."
)


def test_the_defaults_are_those_that_the_study_chose() -> None:
    defaults = {
        "attach": {
            "pooling": ExitSpec().pooling,
            "hidden": ExitSpec().hidden,
            "learning_rate": ATTACH_TOKENS.learning_rate,
            "learning_rate_on_cached_vectors": ATTACH.learning_rate,
            "fewest_updates": FEWEST_UPDATES,
        },
        "train": {
            "rehearsed": list(probe.REHEARSED),
            "fewest_steps": probe.FEWEST_STEPS,
            "hidden": METHODS["pabee"].exits.hidden,
            "head_learning_rate": TRAIN.head_learning_rate,
        },
    }
    assert defaults == json.loads(CHOSEN.read_text()), ADVICE
