"""The method to take where nothing speaks for another: what held up of several papers.

Half of the epochs fine-tune the model, without exits; then exits and backbone learn together, each
row weighing most around where it would leave (COSEE's weighting). Exits learn where to look, at
three times the rate of other methods; those of images learn alone for a while before and after.
Numbers have no probabilities, so their exits also learn how wrong they are (BERxiT), and by that
rows leave. docs/results/auto.md says what each part is worth: looking by itself, weighting instead
of weights by depth, and for images both stretches alone are beyond chance; the rate, and weighting
instead of equal weights, are kept though they are not. Left out, because no gain of it is beyond
chance: distillation from full depth, for classes a second output that says whether an exit is
right, and, for texts, exits that learn alone first.
"""

from offramp.exits import ExitSpec
from offramp.exits.learned import LearnedSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives.auto import Auto

AUTO = Method(
    name="auto",
    paper="what held up of several papers, see docs/results/auto.md",
    exits=ExitSpec(pooling="attention"),
    objective=Auto,
    policy="max_probability",
    number_exits=LearnedSpec(pooling="attention", correctness="own"),
    number_policy="learned",
    measures_pooling=False,
)
METHODS.register(AUTO.name, AUTO)
