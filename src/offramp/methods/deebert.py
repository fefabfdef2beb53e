"""DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference, ACL 2020, arXiv 2004.12993.

Each exit owns a copy of the pooler and a linear layer; first the stock model is fine-tuned,
then the exits on the frozen model; leave when the entropy is low. Two defects of the released
code are mended: the untrained exit after the last layer never answers (the stock head does),
and saturated logits give entropy 0 instead of NaN.
"""

from offramp.exits import ExitSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives import TwoStage

DEEBERT = Method(
    name="deebert",
    paper="DeeBERT, arXiv 2004.12993",
    exits=ExitSpec(pooling="cls", hidden=True),
    objective=TwoStage,
    policy="entropy",
    problem_types=("single_label_classification", "multi_label_classification"),
)
METHODS.register(DEEBERT.name, DEEBERT)
