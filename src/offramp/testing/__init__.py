"""Conformance checks, tiny models and an echo model, for us and for whoever adds a part.

Each check raises an AssertionError whose text says what is wrong. `testing.strategies` holds
hypothesis strategies and is imported by its own name, since it needs hypothesis.
"""

from offramp.testing.backbones import check_backbone
from offramp.testing.echo import EchoModel, Scripted, echo_batch
from offramp.testing.engines import check_bookkeeping, check_engine
from offramp.testing.methods import check_method
from offramp.testing.pictures import (
    IMAGE_ARCHITECTURES,
    tiny_image_processor,
    tiny_pictures,
    tiny_pixels,
)
from offramp.testing.policies import check_policy
from offramp.testing.reference import random_outputs, spread_policies, walk
from offramp.testing.road import check_road
from offramp.testing.streams import check_stream_bookkeeping
from offramp.testing.tiny import (
    ARCHITECTURES,
    PROBLEM_TYPES,
    RELATIVES,
    save_tiny,
    save_tiny_stock,
    tiny_batch,
    tiny_batch_for,
    tiny_model,
    tiny_processor,
    tiny_stock,
    tiny_texts,
    tiny_tokenizer,
)

__all__ = [
    "ARCHITECTURES",
    "IMAGE_ARCHITECTURES",
    "PROBLEM_TYPES",
    "RELATIVES",
    "EchoModel",
    "Scripted",
    "check_backbone",
    "check_bookkeeping",
    "check_engine",
    "check_method",
    "check_policy",
    "check_road",
    "check_stream_bookkeeping",
    "echo_batch",
    "random_outputs",
    "save_tiny",
    "save_tiny_stock",
    "spread_policies",
    "tiny_batch",
    "tiny_batch_for",
    "tiny_image_processor",
    "tiny_model",
    "tiny_pictures",
    "tiny_pixels",
    "tiny_processor",
    "tiny_stock",
    "tiny_texts",
    "tiny_tokenizer",
    "walk",
]
