"""PALBERT: Teaching ALBERT to Ponder, NeurIPS 2022, arXiv 2204.03276.

PonderNet with a net of three layers that also sees the layer before, and a deterministic rule:
leave once the probability of having halted is above q. Mended of the released code: batches of
any size; the divergence is KL(p || prior), not KL(prior || p); the last layer halts for certain
and p adds up to 1, where the code gives a row that has nearly halted 0.05 / L per later layer.
Its rule `expectation`, whose last weight is 1 - p_L instead of what is left, is not here.
`as_released` has the code's start and its loss, but that the last layer halts for certain.
"""

from functools import partial

from offramp.exits.halting import HaltingSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives.ponder import Ponder

PALBERT = Method(
    name="palbert",
    paper="PALBERT, arXiv 2204.03276",
    exits=HaltingSpec(input="both", layers=3, start=0.1),
    objective=partial(Ponder, beta=0.5, prior=0.1, tail="last"),
    policy="q_exit",
    released={"as_released": True, "start": 0.5},
)
METHODS.register(PALBERT.name, PALBERT)
