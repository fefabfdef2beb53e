"""RomeBERT: Robust Training of Multi-Exit BERT, 2021, arXiv 2101.09755.

DeeBERT's exits and its rule; one stage, in which early exits learn labels and the answers of
full depth, and a gradient that points against the other is projected. Defects of the released
code that are mended: an untrained exit after the last layer; layer 12 by name as the one that
exits do not reach; with gradient accumulation the reference also holds the batches before;
distillation averaged over classes, so that it weighs less the more there are
(`as_released` has it so). For MNLI and QQP it projects the gradient of the exits (the setting
`reference="last"`), for all other tasks that of full depth, which is the default here as in the
paper. Not for regression: a single score has no entropy.
"""

from offramp.exits import ExitSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives import RobustExits

ROMEBERT = Method(
    name="romebert",
    paper="RomeBERT, arXiv 2101.09755",
    exits=ExitSpec(pooling="cls", hidden=True),
    objective=RobustExits,
    policy="entropy",
    released={"reduction": "mean"},
    problem_types=("single_label_classification", "multi_label_classification"),
)
METHODS.register(ROMEBERT.name, ROMEBERT)
