"""PABEE: BERT Loses Patience, NeurIPS 2020, arXiv 2006.04152.

One linear exit per layer on the model's shared pooler, all trained together with weights
that grow with depth; leave after `patience` agreements in a row. The released code counts
patience once for the whole batch; here every row has its own counter.
"""

from offramp.exits import ExitSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives import DepthWeighted

PABEE = Method(
    name="pabee",
    paper="BERT Loses Patience, arXiv 2006.04152",
    exits=ExitSpec(pooling="pooler"),
    objective=DepthWeighted,
    policy="patience",
)
METHODS.register(PABEE.name, PABEE)
