"""BEEM: boosting early-exit decisions with exits as experts, ICLR 2025, arXiv 2502.00745.

PABEE's exits and training; leave when the weighted sureness of exits with one and the same
answer adds up. Mended of the released code: that for BERT adds up, but leaves on PABEE's count;
after a change of answer the sum starts without the exit that changed it. Not for regression,
which has no label to repeat and no probability to add up.
"""

from offramp.exits import ExitSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives import DepthWeighted

BEEM = Method(
    name="beem",
    paper="BEEM, arXiv 2502.00745",
    exits=ExitSpec(pooling="pooler"),
    objective=DepthWeighted,
    policy="accumulated",
    problem_types=("single_label_classification", "multi_label_classification"),
)
METHODS.register(BEEM.name, BEEM)
