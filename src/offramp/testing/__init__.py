"""Conformance checks, tiny models and an echo model, for us and for whoever adds a part."""

from offramp.testing.echo import EchoModel, Scripted, echo_batch
from offramp.testing.tiny import (
    ARCHITECTURES,
    PROBLEM_TYPES,
    save_tiny,
    save_tiny_stock,
    tiny_batch,
    tiny_model,
    tiny_stock,
    tiny_texts,
    tiny_tokenizer,
)

__all__ = [
    "ARCHITECTURES",
    "PROBLEM_TYPES",
    "EchoModel",
    "Scripted",
    "echo_batch",
    "save_tiny",
    "save_tiny_stock",
    "tiny_batch",
    "tiny_model",
    "tiny_stock",
    "tiny_texts",
    "tiny_tokenizer",
]
