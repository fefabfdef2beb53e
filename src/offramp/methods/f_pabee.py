"""F-PABEE: flexible patience, by how much the probabilities of successive exits differ.

PABEE's exits and training. Mended of the released code: what it calls the Jensen-Shannon
divergence is the entropy of the mean, which rewards sureness instead of agreement, and it
compares with an exit that is yet to come, whose layer it runs and does not count.
"""

from offramp.exits import ExitSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives import DepthWeighted

F_PABEE = Method(
    name="f_pabee",
    paper="F-PABEE, arXiv 2305.11916",
    exits=ExitSpec(pooling="pooler"),
    objective=DepthWeighted,
    policy="agreement",
)
METHODS.register(F_PABEE.name, F_PABEE)
