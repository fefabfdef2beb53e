"""PCEE-BERT: Patient and Confident Early Exiting, Findings of NAACL 2022.

PABEE's exits and training; leave after `patience` exits in a row that are sure. Mended of the
released code: the loss of exits is not divided by the sum of its weights, so the learning rate
means another thing at each depth, and the file for ALBERT is plain PABEE. Not for regression,
since the entropy of a single score is always 0.
"""

from offramp.exits import ExitSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives import DepthWeighted

PCEE_BERT = Method(
    name="pcee_bert",
    paper="PCEE-BERT, Findings of NAACL 2022",
    exits=ExitSpec(pooling="pooler"),
    objective=DepthWeighted,
    policy="confident_patience",
    problem_types=("single_label_classification", "multi_label_classification"),
)
METHODS.register(PCEE_BERT.name, PCEE_BERT)
