"""PCEE: performance control early exiting, arXiv 2412.19325.

A rule for leaving alone: how often an exit that is as sure as this one was right on held-out rows.
Here on PABEE's exits and training, with which it shares its runs in a comparison; the rule goes on
any method's exits. Not for regression, where nothing is right or wrong.
"""

from offramp.exits import ExitSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives import DepthWeighted

PCEE = Method(
    name="pcee",
    paper="PCEE, arXiv 2412.19325",
    exits=ExitSpec(pooling="pooler"),
    objective=DepthWeighted,
    policy="binned",
    problem_types=("single_label_classification", "multi_label_classification"),
)
METHODS.register(PCEE.name, PCEE)
