"""CAP: Reliable Early Exiting via Null Space Projection, IJCAI 2025, arXiv 2506.17249.

A linear layer per exit on the shared pooler, the plain mean of all losses; leave when the
energy, raised by what lies outside the space of the classes, is low. Mended of the released
code: the root of a slightly negative number is NaN and never leaves; the space is computed anew
at every exit of every call; evaluation runs all layers. For one class of many only: a single
column of weights, as in regression, spans a line, and the sum over classes says nothing of label
sets.
"""

from offramp.exits.subspace import NspSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives import EqualWeights

CAP = Method(
    name="cap",
    paper="CAP (null space projection), arXiv 2506.17249",
    exits=NspSpec(pooling="pooler"),
    objective=EqualWeights,
    policy="cap",
    problem_types=("single_label_classification",),
    why_not="NSP and energy are sums over classes of which one is right.",
)
METHODS.register(CAP.name, CAP)
