"""Stable names for inputs, and all that hangs on them: samples, splits, overlaps."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping

import numpy as np
from datasets import Dataset

from offramp.data.images import image_files
from offramp.data.memory import take
from offramp.errors import ConfigError, DataError
from offramp.storage import fingerprint

_UNLIKELY = 20
"""Rows that a part should have, of which it gets none by chance once in 10^8 times."""


def input_id(text: str, text_pair: str | None = None) -> int:
    """A stable 63-bit name of an input: equal inputs have equal ids, everywhere and always."""
    first = text.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(len(first).to_bytes(8, "little") + first, digest_size=8)
    if text_pair is not None:
        digest.update(b"\0" + text_pair.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "little") >> 1


def image_id(file: bytes) -> int:
    """A stable 63-bit name of an image: that of the bytes of its file."""
    return int.from_bytes(hashlib.blake2b(file, digest_size=8).digest(), "little") >> 1


def dataset_ids(dataset: Dataset) -> np.ndarray:
    """The `input_id` (or `image_id`) of every row, int64 (rows,)."""
    if "image" in dataset.column_names:
        return np.array([image_id(file) for file in image_files(dataset)], dtype=np.int64)
    texts = dataset["text"][:]
    if "text_pair" in dataset.column_names:
        pairs = zip(texts, dataset["text_pair"][:], strict=True)
        ids = [input_id(text, pair) for text, pair in pairs]
    else:
        ids = [input_id(text) for text in texts]
    return np.array(ids, dtype=np.int64)


def data_fingerprint(dataset: Dataset) -> str:
    """A name for the inputs and labels of a dataset, in their order."""
    labels = dataset["label"][:] if "label" in dataset.column_names else None
    return fingerprint(dataset_ids(dataset).tobytes(), json.dumps(labels))


def draws(ids: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """A number in [0, 1) for every id, fixed by (id, seed, purpose); float64 (rows,).

    Purposes are independent, so a sample of rows does not fall into one part of a split.
    The mixer is SplitMix64 (Steele, Lea, Flood 2014).
    """
    key = hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=8).digest()
    mixed = ids.astype(np.uint64) ^ np.uint64(int.from_bytes(key, "little"))
    mixed += np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)) * 2.0**-53


def split_examples(dataset: Dataset, shares: Mapping[str, float], seed: int) -> dict[str, Dataset]:
    """Cut a dataset by a hash of the input, e.g. {"train": 0.9, "tune": 0.1}.

    Where a row goes depends on its input and the seed alone: equal inputs stay together and
    added rows move no others. Parts keep the order of the rows; shares are met on average. Rows
    that are a part of such a cut, of which one part would get none, are cut by another hash,
    once; there added rows may move others.
    """
    if not shares or min(shares.values()) <= 0 or not math.isclose(sum(shares.values()), 1.0):
        raise ConfigError(f"Shares of a split must be above 0 and sum to 1; given: {dict(shares)}.")
    ends, ids = np.cumsum(list(shares.values()))[:-1], dataset_ids(dataset)
    part_of = np.searchsorted(ends, draws(ids, seed, "split"), side="right")
    wanted = np.array(list(shares.values())) * len(np.unique(ids))
    empty = np.bincount(part_of, minlength=len(shares)) == 0
    if (wanted[empty] > _UNLIKELY).any():  # they are themselves a part of a cut
        part_of = np.searchsorted(ends, draws(ids, seed, "split again"), side="right")
    parts = {}
    for number, name in enumerate(shares):
        rows = np.flatnonzero(part_of == number)
        if not len(rows):
            raise DataError(
                f"{len(dataset)} rows are too few to cut: part '{name}' "
                f"({shares[name]:.0%}) got none. Give more rows or a larger share."
            )
        parts[name] = take(dataset, rows)
    return parts


def drop_overlap(dataset: Dataset, *others: Dataset) -> tuple[Dataset, int]:
    """The rows whose input is in none of `others`, and how many were dropped."""
    taken = [dataset_ids(other) for other in others]
    if not taken:
        return dataset, 0
    keep = ~np.isin(dataset_ids(dataset), np.concatenate(taken))
    dropped = int((~keep).sum())
    if dropped == len(dataset):
        raise DataError(
            f"All {dropped} rows also occur in the data they must be apart from. "
            "Give other data, or let it be cut from one set."
        )
    return (take(dataset, np.flatnonzero(keep)), dropped) if dropped else (dataset, 0)
