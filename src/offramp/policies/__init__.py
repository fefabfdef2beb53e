"""Exit criteria: pure rules that say after each layer which rows leave."""

from offramp.policies.base import (
    NEVER,
    POLICIES,
    Decision,
    EvidencePolicy,
    Policy,
    Rows,
    State,
    Step,
    decide,
    make_policy,
)
from offramp.policies.confidence import Entropy, Margin, MaxProbability
from offramp.policies.fixed import Fixed, Full
from offramp.policies.patience import Patience
from offramp.registry import import_all

__all__ = [
    "NEVER",
    "POLICIES",
    "Decision",
    "Entropy",
    "EvidencePolicy",
    "Fixed",
    "Full",
    "Margin",
    "MaxProbability",
    "Patience",
    "Policy",
    "Rows",
    "State",
    "Step",
    "decide",
    "make_policy",
]

import_all(__name__, __path__)
