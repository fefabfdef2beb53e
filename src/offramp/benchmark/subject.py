"""What is measured: a model, and the rows it is measured on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from tokenizers.pre_tokenizers import BertPreTokenizer

from offramp.backbones import Batch
from offramp.benchmark.architectures import ARCHITECTURES, random_model
from offramp.benchmark.document import Lengths
from offramp.data import load_examples
from offramp.engines import collate, inputs_of, load_processor
from offramp.errors import ConfigError, ModelError
from offramp.model import MultiExitModel
from offramp.model.folder import is_ours, resolve
from offramp.registry import nearest

_SPECIAL_TOKENS = 2
_UNUSED = 5
"""Ids from 0 on that may have a meaning of their own."""


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, on the CPU, in fp32.

    Attributes:
        source: what it is, in words.
        folder: of a multi-exit model that may have operating points.
        processor: None for an architecture, which has none.
    """

    name: str
    source: str
    model: MultiExitModel
    folder: Path | None = None
    processor: Any = None


def open_subject(model: str | os.PathLike[str]) -> Subject:
    """A folder or hub id of a model, ours or stock; or the name of an architecture.

    A folder goes before an architecture of the same name.

    Raises:
        ModelError: no such model or architecture, or one that cannot be loaded.
    """
    name = str(model)
    if _is_architecture(name):
        return Subject(name, "an architecture with random weights", open_model(name))
    folder = _folder(name)
    ours = is_ours(folder)
    loaded = open_model(folder)
    processor = load_processor(folder, loaded.backbone.reads)
    source = "a multi-exit model" if ours else "a stock model with new exits, which are not trained"
    title = folder.resolve().name if Path(name).is_dir() else name
    return Subject(title, source, loaded, folder if ours else None, processor)


def open_model(model: str | os.PathLike[str]) -> MultiExitModel:
    """The model alone; see `open_subject`. What is random is the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if _is_architecture(str(model)):
            return MultiExitModel.from_stock(random_model(str(model))).eval()
        return MultiExitModel.from_pretrained(_folder(model), dtype=torch.float32)


def _is_architecture(name: str) -> bool:
    return name in ARCHITECTURES and not Path(name).exists()


def _folder(model: str | os.PathLike[str]) -> Path:
    try:
        return resolve(model)
    except ModelError as problem:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"{problem} Nor is it an architecture.{nearest(str(model), list(ARCHITECTURES))} "
            f"Known: {known}."
        ) from None


class Rows(Protocol):
    """The rows of a benchmark, in the order in which they arrive.

    Attributes:
        lengths: in tokens, (rows,).
    """

    lengths: npt.NDArray[np.int64]

    def batch(self, places: Sequence[int], tokens: int = 0) -> Batch:
        """Some of the rows on the CPU, padded to the longest, or to `tokens` if that is more.

        They have no mask where nothing is padded.
        """
        ...


class _Tokens:
    """Rows of token ids."""

    def __init__(self, columns: Mapping[str, Sequence[Sequence[int]]], pad_id: int) -> None:
        self._columns, self._pad_id = columns, pad_id
        self.lengths = np.array([len(row) for row in columns["input_ids"]])

    def batch(self, places: Sequence[int], tokens: int = 0) -> Batch:
        chosen = {name: [rows[at] for at in places] for name, rows in self._columns.items()}
        return collate(chosen, self._pad_id, tokens=tokens)


class _Pixels:
    """Random images: their time does not depend on what is in them."""

    def __init__(self, model: MultiExitModel, rows: int) -> None:
        self._example = model.backbone.example(1, "cpu")
        self.lengths = np.ones(rows, dtype=np.int64)

    def batch(self, places: Sequence[int], tokens: int = 0) -> Batch:
        draw = torch.Generator().manual_seed(int(places[0]))
        return {
            name: torch.rand((len(places), *leaf.shape[1:]), generator=draw)
            for name, leaf in self._example.items()
        }


def open_rows(
    subject: Subject, data: Any, rows: int, max_length: int | None, **columns: Any
) -> tuple[Rows, Lengths]:
    """The rows to measure on, and what is to be said of their lengths.

    Args:
        data: as `load_examples` takes it; None is the built-in docstrings.
        rows: how many; where there are fewer, they come again.
        columns: and splits, as `load_examples` takes them.

    Raises:
        ConfigError: rows are given for a model of images, whose time does not depend on them.
        DataError: see `load_examples`.
    """
    model = subject.model
    if model.backbone.reads == "image":
        if data is not None:
            raise ConfigError("Images all take the same time; leave --data out.")
        return _described(_Pixels(model, rows), "random images, all of one size")
    if data is None:
        columns["split"] = columns.get("split") or "test"
    examples = load_examples("docstrings" if data is None else data, max_rows=rows, **columns)
    name = "the built-in docstrings" if data is None else _named(data)
    limits = [limit for limit in (max_length, model.max_length) if limit is not None]
    if subject.processor is None:
        made = _of_lengths(model, _count(examples), min(limits, default=None), rows)
        return _described(made, f"{name}, counted in words and signs, for want of a tokenizer")
    inputs = inputs_of(subject.processor)
    encoded = inputs.encode(examples, min(limits, default=None))
    order = np.arange(rows) % len(encoded)
    found = {n: encoded[n][:] for n in inputs.columns if n in encoded.column_names}
    again = {n: [column[at] for at in order] for n, column in found.items()}
    return _described(_Tokens(again, subject.processor.pad_token_id), name)


def _named(data: Any) -> str:
    return Path(data).name if isinstance(data, str | os.PathLike) else "rows of the caller"


def _count(examples: Dataset) -> list[int]:
    """Tokens of each text as far as they are known without a tokenizer."""
    split = BertPreTokenizer().pre_tokenize_str
    names = [name for name in ("text", "text_pair") if name in examples.column_names]
    if not names:
        raise ConfigError("An architecture is measured on texts, and the rows hold none.")
    texts = zip(*(examples[name][:] for name in names), strict=True)
    return [_SPECIAL_TOKENS + sum(len(split(part)) for part in parts) for parts in texts]


def _of_lengths(
    model: MultiExitModel, lengths: Sequence[int], longest: int | None, rows: int
) -> _Tokens:
    """Random tokens, as many a row as given."""
    draw = np.random.default_rng(0)
    config: Any = model.stock.config
    wanted = [min(lengths[at % len(lengths)], longest or max(lengths)) for at in range(rows)]
    ids = [draw.integers(_UNUSED, config.vocab_size, length).tolist() for length in wanted]
    return _Tokens({"input_ids": ids}, config.pad_token_id or 0)


def _described(rows: Rows, source: str) -> tuple[Rows, Lengths]:
    lengths = rows.lengths
    return rows, Lengths(
        source=source,
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        mean=float(lengths.mean()),
        longest=int(lengths.max()),
    )
