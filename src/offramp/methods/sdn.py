"""SDN: Shallow-Deep Networks, understanding and mitigating network overthinking, ICML 2019.

Source: arXiv 1810.07052. A linear layer on the pooled tokens at every exit,
trained along with the network, at first with next to no weight; leave where the largest class
probability is above a threshold. Not for regression, where a score has no probability.
"""

from offramp.exits import ExitSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives.growing import GrowingWeights

SDN = Method(
    name="sdn",
    paper="Shallow-Deep Networks, arXiv 1810.07052",
    exits=ExitSpec(pooling="mean"),
    objective=GrowingWeights,
    policy="max_probability",
    problem_types=("single_label_classification", "multi_label_classification"),
)
METHODS.register(SDN.name, SDN)
