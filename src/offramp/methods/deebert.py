"""DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference, ACL 2020, arXiv 2004.12993.

Each exit owns a copy of the pooler and a linear layer; first the stock model is fine-tuned,
then the exits on the frozen model; leave when the entropy is low. Defects of the released code
that are mended: the untrained exit after the last layer answers (here the stock head does);
saturated logits have entropy NaN instead of 0; while exits learn, the frozen model keeps its
dropout, and its gradients take part in the clipping; batches have one row.
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
