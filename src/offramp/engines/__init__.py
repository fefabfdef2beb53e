"""Engines run a batch so that the layers that are not needed cost nothing."""

import os

# before any import of ONNX Runtime, which would report to its maker and keep an id of the machine
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from offramp.engines.base import UNLIMITED, Answers, Budget, Engine, Exitable, RowAnswer, rows_of
from offramp.engines.batching import bucket, collate, in_batches, plan_batches, windows
from offramp.engines.cost import CostModel, cost_model
from offramp.engines.inputs import ImageInputs, Inputs, TextInputs, inputs_of, load_processor
from offramp.engines.making import ENGINES, check_backend, check_dtype, make_engine
from offramp.engines.recording import (
    label_names,
    processor_fingerprint,
    record,
    warn_below_majority,
)
from offramp.engines.settings import INTEGERS, as_device, as_dtype, dtype_name, lacks
from offramp.engines.torch_engine import TorchEngine
from offramp.engines.trees import take_tree

__all__ = [
    "ENGINES",
    "INTEGERS",
    "UNLIMITED",
    "Answers",
    "Budget",
    "CostModel",
    "Engine",
    "Exitable",
    "ImageInputs",
    "Inputs",
    "RowAnswer",
    "TextInputs",
    "TorchEngine",
    "as_device",
    "as_dtype",
    "bucket",
    "check_backend",
    "check_dtype",
    "collate",
    "cost_model",
    "dtype_name",
    "in_batches",
    "inputs_of",
    "label_names",
    "lacks",
    "load_processor",
    "make_engine",
    "plan_batches",
    "processor_fingerprint",
    "record",
    "rows_of",
    "take_tree",
    "warn_below_majority",
    "windows",
]
