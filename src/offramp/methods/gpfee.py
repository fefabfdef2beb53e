"""GPFEE: A Global Past-Future Early Exit Method, NAACL 2021.

An exit reads the vectors of all layers run and imitations of those to come. Mended of the
released code: rows of a batch leave only together, the entropy of saturated scores is NaN, and
the exit after the last layer has no loss of its own to be compared with; here it is the stock
model's head. Not for regression, since the entropy of a single score is always 0.
"""

from offramp.exits.imitating import ImitatingSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives import Imitating

GPFEE = Method(
    name="gpfee",
    paper="A Global Past-Future Early Exit Method, NAACL 2021",
    exits=ImitatingSpec(pooling="cls"),
    objective=Imitating,
    policy="entropy",
    problem_types=("single_label_classification", "multi_label_classification"),
)
METHODS.register(GPFEE.name, GPFEE)
