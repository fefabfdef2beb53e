"""The method to take where nothing speaks for another: what held up of several papers.

Half of the epochs fine-tune the model, without exits; then exits and backbone learn together, each
row weighing most around where it would leave (COSEE's weighting). Exits learn where to look and
whether they are right (BERxiT), at three times the rate of other methods, from the labels and
from full depth. docs/results/auto.md says what each part is worth so far, and what was left out.
"""

from functools import partial

from offramp.exits.learned import LearnedSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives.blended import Blended

AUTO = Method(
    name="auto",
    paper="what held up of several papers, see docs/results/auto.md",
    exits=LearnedSpec(pooling="attention", correctness="own"),
    objective=partial(Blended, rate=3.0),
    policy="max_probability",
    measures_pooling=False,
)
METHODS.register(AUTO.name, AUTO)
