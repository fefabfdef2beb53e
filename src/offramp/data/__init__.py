"""Loading examples, cutting them apart, their tasks and their tokens."""

from offramp.data.hashing import (
    data_fingerprint,
    dataset_ids,
    drop_overlap,
    input_id,
    split_examples,
)
from offramp.data.loading import load_examples
from offramp.data.tasks import (
    Task,
    check_problem_type,
    encode_labels,
    infer_task,
    majority_share,
    names_source,
)
from offramp.data.tokens import encode

__all__ = [
    "Task",
    "check_problem_type",
    "data_fingerprint",
    "dataset_ids",
    "drop_overlap",
    "encode",
    "encode_labels",
    "infer_task",
    "input_id",
    "load_examples",
    "majority_share",
    "names_source",
    "split_examples",
]
