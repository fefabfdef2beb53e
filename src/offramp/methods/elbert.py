"""ELBERT: Fast ALBERT with Confidence-Window Based Early Exit, ICASSP 2021, arXiv 2107.00175.

Every layer answers through the model's own pooler and classifier; all layers are trained
together with learned weights that add up to L; leave when an exit is sure, or when a window of
exits agrees. Defects of the released code that are mended: the weights are no parameters there,
so that they are in no checkpoint, not clipped, and their gradient is never cleared; their
learning rate stays when all others decay; a saturated row never leaves, because its entropy is
NaN; the first row of a batch decides for all rows; the window rule `bias_3` crashes, since no
configuration has its range (here `spread`). Not for regression: its rule asks how sure an
exit is of a class.
"""

from offramp.exits.own_head import OwnHeadSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives import LearnedWeights

ELBERT = Method(
    name="elbert",
    paper="ELBERT, arXiv 2107.00175",
    exits=OwnHeadSpec(),
    objective=LearnedWeights,
    policy="window",
    problem_types=("single_label_classification", "multi_label_classification"),
)
METHODS.register(ELBERT.name, ELBERT)
