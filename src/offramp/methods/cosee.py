"""COSEE: Consistency-Oriented Signal-Based Early Exiting, AAAI 2025, arXiv 2412.13236.

A linear layer per exit on the shared pooler; rows weigh most at the exits where they would
leave, and the energy of the scores is pushed apart for right and wrong answers. Mended of the
released code: the energy overflows for large scores and then lets rows leave at once; the entropy
of a saturated row is NaN and never leaves; one outlier of the last epoch sets the range of
thresholds, which here are quantiles of the batch (`as_released` draws as the code does); masks on
the CPU make every step wait for the GPU, once per threshold and exit; poolers of its own in
evaluation are random unless they are copied; checkpoints are ranked by the cross-entropy of all
exits (here the last one counts, and score and cost choose where rows leave); evaluation runs all
layers. For one class of many only: in label sets and regression the sum over classes that makes
the energy says nothing of being right.
"""

from offramp.exits import ExitSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives import SimulatedExits

COSEE = Method(
    name="cosee",
    paper="COSEE, arXiv 2412.13236",
    exits=ExitSpec(pooling="pooler"),
    objective=SimulatedExits,
    policy="energy",
    released={"draw": "last_epoch", "sharpness": 10.0},
    problem_types=("single_label_classification",),
    why_not="Its energy is a sum over classes of which one is right.",
)
METHODS.register(COSEE.name, COSEE)
