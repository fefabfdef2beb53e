"""FastBERT: a Self-distilling BERT with Adaptive Inference Time, ACL 2020, arXiv 2004.02178.

Students with an attention of their own; first the stock model is fine-tuned, then the students
learn its answers, for which no labels are needed; leave when the entropy is low. The paper's
"speed" is the policy `entropy` with `normalised`. Defects of the released code that are mended:
the teacher answers with dropout on while the students learn; the learning rate of stage 2
follows the schedule of stage 1 and is 0 from its fourth epoch on; weight decay has a name that
its optimiser never reads; the pooling `mean` is over features, and `last` reads padding (here the
first token asks, or the mean of the real ones); a row as unsure as the speed leaves in its script
and stays in its package (here it stays). The divergence is KL(teacher || student), as in the
code; the setting `reverse` has the other direction. Not for regression: a single score has no
entropy.
"""

from offramp.exits.student import StudentSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives import TeachStudents

FASTBERT = Method(
    name="fastbert",
    paper="FastBERT, arXiv 2004.02178",
    exits=StudentSpec(),
    objective=TeachStudents,
    policy="entropy",
    problem_types=("single_label_classification", "multi_label_classification"),
)
METHODS.register(FASTBERT.name, FASTBERT)
