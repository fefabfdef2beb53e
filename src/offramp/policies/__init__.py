"""Exit criteria: pure rules that say after each layer which rows leave."""

from offramp.policies.accumulated import Accumulated
from offramp.policies.agreement import Agreement, ConfidentPatience
from offramp.policies.averaged import Averaged
from offramp.policies.base import (
    NEVER,
    POLICIES,
    Decision,
    EvidencePolicy,
    Policy,
    Rows,
    State,
    Step,
    bars_of,
    decide,
    has_one_bar,
    has_own_bars,
    has_own_step,
    make_policy,
    reads_all,
    with_inner,
)
from offramp.policies.binned import Binned
from offramp.policies.confidence import Entropy, Margin, MaxProbability
from offramp.policies.energy import Cap, Energy
from offramp.policies.fixed import Fixed, Full
from offramp.policies.gated import Gated
from offramp.policies.halting import QExit, Sample
from offramp.policies.learned import Learned
from offramp.policies.patience import Patience
from offramp.policies.per_exit import PerExit
from offramp.policies.tempered import Tempered
from offramp.policies.window import Window
from offramp.registry import import_all

__all__ = [
    "NEVER",
    "POLICIES",
    "Accumulated",
    "Agreement",
    "Averaged",
    "Binned",
    "Cap",
    "ConfidentPatience",
    "Decision",
    "Energy",
    "Entropy",
    "EvidencePolicy",
    "Fixed",
    "Full",
    "Gated",
    "Learned",
    "Margin",
    "MaxProbability",
    "Patience",
    "PerExit",
    "Policy",
    "QExit",
    "Rows",
    "Sample",
    "State",
    "Step",
    "Tempered",
    "Window",
    "bars_of",
    "decide",
    "has_one_bar",
    "has_own_bars",
    "has_own_step",
    "make_policy",
    "reads_all",
    "with_inner",
]

import_all(__name__, __path__)
