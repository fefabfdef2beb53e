"""Where and in which number format a model runs, as users type it."""

from __future__ import annotations

from typing import Any

import torch

from offramp.backbones.dtypes import DTYPES
from offramp.errors import ConfigError
from offramp.registry import nearest

INTEGERS = ("int8", "int7")
"""Layers in integers of eight bits; in the second with weights of seven, for processors on which
sums of products of eight bits may be too large."""


def as_device(device: str | int | torch.device | None) -> torch.device:
    """A device that is there; None is the first GPU, or the CPU where there is none.

    Raises ConfigError for a name that torch does not know or a device that does not answer.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == -1:  # transformers' way to say CPU
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # `meta` has no numbers
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as problem:
        reason = str(problem).strip().split("\n")[0]
        raise ConfigError(
            f"Device '{device}' cannot be used: {reason}. Use cpu, cuda or cuda:0, for example."
        ) from None
    return chosen


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A compute dtype from its name. Raises ConfigError."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        known = ", ".join([*DTYPES, "int8"])
        raise ConfigError(f"Unknown dtype '{dtype}'.{nearest(dtype, list(DTYPES))} Known: {known}.")
    return DTYPES[dtype]


def dtype_name(dtype: str | torch.dtype) -> str:
    """The full name of a number format: `float32`, `bfloat16`, `float16`, `int8` or `int7`.

    What is asked for as `int8` is `int7` on processors without VNNI.
    """
    if dtype in INTEGERS:
        return "int7" if lacks("avx512_vnni", "avx_vnni", "amx_int8") else str(dtype)
    return str(as_dtype(dtype)).removeprefix("torch.")


def lacks(*instructions: str) -> bool:
    """Whether this is an x86 processor that is known to have none of these instructions."""
    known: Any = getattr(torch.cpu, "get_capabilities", dict)  # not in every version of torch
    has = known()
    return has.get("architecture") == "x86_64" and not any(map(has.get, instructions))
