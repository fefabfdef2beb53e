"""BERxiT: Early Exiting for BERT with Better Fine-Tuning and Extension to Regression, EACL 2021.

Each exit owns a copy of the pooler and a linear layer; full depth and all exits are trained in
turn, and one linear layer for all exits learns when they are right. Mended of the released
code: the odd steps with that layer miss the loss of full depth (`as_released` has it so), batches
are of one, and ALBERT has no learning to exit (here any encoder has).
"""

from offramp.exits.learned import LearnedSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives import Alternating

BERXIT = Method(
    name="berxit",
    paper="BERxiT, EACL 2021",
    exits=LearnedSpec(pooling="cls", hidden=True, correctness="shared"),
    objective=Alternating,
    policy="learned",
    released={"as_released": True},
)
METHODS.register(BERXIT.name, BERXIT)
