"""The method to take where nothing speaks for another: what held up of several papers.

Half of the epochs fine-tune the model, without exits; then exits learn alone for a while, fast,
where to look and what to answer, and at last with the backbone, each row weighing most around
where it would leave (COSEE's weighting, without its energy). What each part is worth, and what
was left out, stands in docs/results/auto.md.
"""

from offramp.exits import ExitSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives.blended import Blended

AUTO = Method(
    name="auto",
    paper="what held up of several papers, see docs/results/auto.md",
    exits=ExitSpec(pooling="attention"),
    objective=Blended,
    policy="max_probability",
    measures_pooling=False,
)
METHODS.register(AUTO.name, AUTO)
