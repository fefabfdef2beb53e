"""From text to tokens, once and in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, List, Value
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from offramp.data.memory import with_columns
from offramp.errors import ConfigError, DataError, ModelError

log = logging.getLogger("offramp")

# A batch holds this many rows, or fewer where texts are long: memory stays bounded by the
# characters in a batch (about 200 bytes per token) and not by the longest text times 1,000.
BATCH_ROWS = 1000
BATCH_CHARACTERS = 1_000_000
NO_LIMIT = 1_000_000  # tokenizers without a limit say 1e30


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a folder; ModelError where there is none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as problem:
        reason = str(problem).strip().split("\n")[0].strip(" :.")
        raise ModelError(_no_tokenizer(folder, reason)) from problem
    # transformers makes one of special tokens alone where the vocabulary is missing
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(_no_tokenizer(folder, "its vocabulary is missing"))
    return tokenizer


def _no_tokenizer(folder: Path, reason: str) -> str:
    return (
        f"{folder}: no usable tokenizer ({reason}). Save the model's own beside it: "
        f"AutoTokenizer.from_pretrained(...).save_pretrained('{folder}')."
    )


def encode(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> tuple[Dataset, int]:
    """Add input_ids, token_type_ids (where the tokenizer has them) and length, in tokens.

    Rows are not padded, so their attention mask is all ones and not kept.

    Args:
        max_length: longest row allowed, special tokens included; the tokenizer's own limit
            holds as well. Longer rows are cut (pairs: the longer text first), which is said
            once, with their number.

    Returns:
        The dataset, and how many rows were cut.
    """
    limit = token_limit(tokenizer, max_length, "text_pair" in dataset.column_names)
    columns: dict[str, list[pa.Array]] = {}
    cut = 0
    with tqdm(total=len(dataset), desc="tokens", unit="row", disable=None, leave=False) as bar:
        for start, texts in _batches(dataset):
            encoded, too_long = encode_texts(tokenizer, texts, limit)
            for name, rows in encoded.items():
                if not all(rows):
                    _refuse_empty(dataset, start + [bool(row) for row in rows].index(False))
                columns.setdefault(name, []).append(pa.array(rows, pa.list_(pa.int32())))
            cut += too_long
            bar.update(len(texts))
    added: dict[str, tuple[Any, Any]] = {
        name: (pa.chunked_array(chunks), List(Value("int32"))) for name, chunks in columns.items()
    }
    lengths = pc.list_value_length(added["input_ids"][0])
    added["length"] = (lengths, Value("int32"))
    if cut:
        log.warning(
            "%d of %d rows are longer than %d tokens and were cut.", cut, len(dataset), limit
        )
    return with_columns(dataset, added), cut


def token_limit(
    tokenizer: PreTrainedTokenizerBase, max_length: int | None, pairs: bool
) -> int | None:
    """The longest row allowed, special tokens included, or None where nothing limits it."""
    if tokenizer.pad_token is None:
        raise ConfigError(
            "The tokenizer has no pad token, so rows cannot share a batch. Set one, for "
            "example tokenizer.pad_token = tokenizer.eos_token, and save it with the model."
        )
    limits = [limit for limit in (max_length, tokenizer.model_max_length) if limit is not None]
    limit = min(limits, default=NO_LIMIT)
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if limit <= special:
        raise ConfigError(
            f"max_length is {limit}, but {special} special tokens leave no room for text; "
            f"it must be at least {special + 1}."
        )
    return None if limit >= NO_LIMIT else limit


def _batches(dataset: Dataset) -> Iterator[tuple[int, list[tuple[str, ...]]]]:
    """First row and texts of each batch."""
    names = [name for name in ("text", "text_pair") if name in dataset.column_names]
    batch: list[tuple[str, ...]] = []
    start = characters = 0
    for texts in zip(*(dataset[name][:] for name in names), strict=True):
        size = sum(map(len, texts))
        if batch and (len(batch) == BATCH_ROWS or characters + size > BATCH_CHARACTERS):
            yield start, batch
            start, batch, characters = start + len(batch), [], 0
        batch.append(texts)
        characters += size
    yield start, batch


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, ...]], limit: int | None
) -> tuple[dict[str, list[list[int]]], int]:
    """Token columns of a batch, and how many rows were cut.

    Rows are encoded whole first, and those that turn out too long a second time: all
    tokenizers count alike this way, and few rows pay.
    """
    encoded = _call(tokenizer, texts)
    ids = encoded["input_ids"]
    long = [] if limit is None else [row for row, tokens in enumerate(ids) if len(tokens) > limit]
    if long:
        short = _call(tokenizer, [texts[row] for row in long], truncation=True, max_length=limit)
        for name, rows in short.items():
            for row, tokens in zip(long, rows, strict=True):
                encoded[name][row] = tokens
    return encoded, len(long)


def _call(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, ...]], **options: Any
) -> dict[str, list[list[int]]]:
    columns = [list(column) for column in zip(*texts, strict=True)]
    try:
        encoded = tokenizer(*columns, return_attention_mask=False, verbose=False, **options)
    except TypeError:
        _refuse_surrogates(columns)
        raise
    return {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}


def _refuse_surrogates(columns: list[list[str]]) -> None:
    for text in (text for column in columns for text in column):
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            raise DataError(
                f"The text {text[:80]!r} cannot be written as UTF-8 (character {problem.start}). "
                "Decode it again, with its true encoding."
            ) from None


def _refuse_empty(dataset: Dataset, index: int) -> None:
    row = dataset["row"][index] if "row" in dataset.column_names else index
    raise DataError(f"Row {row} (from 0) gives no token at all: its text is empty.")
