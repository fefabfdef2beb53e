"""PonderNet: Learning to Ponder, ICML AutoML workshop 2021, arXiv 2107.05407.

The model's own head answers after every layer, and one linear layer gives each row a
probability of halting there; the expected loss is trained, held to a truncated geometric prior,
and a row leaves at a draw from its probabilities. It was never released for encoders; this is
the baseline of PALBERT's paper. Known re-implementations compute KL(prior || p) for the paper's
KL(p || prior), and leave the tail off the prior so that it does not add up to 1: both are mended.
"""

from functools import partial

from offramp.exits.halting import HaltingSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives.ponder import Ponder

PONDERNET = Method(
    name="pondernet",
    paper="PonderNet, arXiv 2107.05407",
    exits=HaltingSpec(input="current", layers=1, start=0.2),
    objective=partial(Ponder, beta=0.01, prior=0.2),
    policy="sample",
)
METHODS.register(PONDERNET.name, PONDERNET)
