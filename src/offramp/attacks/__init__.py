"""Attacks that delay exits, and what they do to policies: `attack`."""

from offramp.attacks.base import ATTACKS, Attack, Victim
from offramp.attacks.document import AttackReport, Tried
from offramp.attacks.figures import Attacked, Budgeted, Reading, efficacy
from offramp.attacks.kept import Kept
from offramp.attacks.objectives import OBJECTIVES
from offramp.attacks.running import attack
from offramp.registry import import_all

__all__ = [
    "ATTACKS",
    "OBJECTIVES",
    "Attack",
    "AttackReport",
    "Attacked",
    "Budgeted",
    "Kept",
    "Reading",
    "Tried",
    "Victim",
    "attack",
    "efficacy",
]

import_all(__name__, __path__)
