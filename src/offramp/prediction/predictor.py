"""A model, its tokenizer and an operating point, ready to answer texts."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from offramp.calibration import OperatingPoint, list_points
from offramp.data import input_id
from offramp.data.tokens import encode_texts, load_tokenizer, token_limit
from offramp.engines import (
    Engine,
    TorchEngine,
    as_device,
    as_dtype,
    collate,
    in_batches,
    processor_fingerprint,
)
from offramp.engines.batching import MAX_ROWS, MAX_TOKENS
from offramp.errors import DataError, ModelError, PointError
from offramp.model import MultiExitModel
from offramp.model.folder import is_ours, resolve
from offramp.policies import Full, Policy, Rows

logger = logging.getLogger("offramp")

Text = str | tuple[str, str] | Mapping[str, str]
"""A text, (text, text_pair), or {"text": ..., "text_pair": ...}."""
Point = str | OperatingPoint | Policy
"""The name of a point in the model's folder, `full`, a point or a policy."""
DEFAULT, FULL = "default", "full"


class Answer(NamedTuple):
    """What one row was answered with; the scores of a bad row mean nothing."""

    scores: npt.NDArray[np.float32]  # (classes,), raw
    exit_layer: int
    bad: bool


class _Row(NamedTuple):
    id: int
    tokens: Mapping[str, list[int]]


class Predictor:
    """Answers texts with a multi-exit model; any number of threads may share one.

    Args:
        model: in evaluation mode, on its device, in its compute dtype.
        processor: the model's tokenizer.
        point: where rows leave unless a call says otherwise. `default` is the folder's point
            of that name; without one, every row runs to full depth, and that is said aloud.
        folder: where named points lie.
        max_rows, max_tokens: of a batch, padding included.
        max_length: longest text in tokens; the tokenizer's and the model's limits hold as well.
    """

    def __init__(
        self,
        model: MultiExitModel,
        processor: PreTrainedTokenizerBase,
        point: Point = DEFAULT,
        *,
        folder: str | Path | None = None,
        max_rows: int = MAX_ROWS,
        max_tokens: int = MAX_TOKENS,
        max_length: int | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self._folder = None if folder is None else Path(folder)
        self._engine: Engine = TorchEngine(model)
        self._lock = threading.Lock()
        lengths = [length for length in (max_length, model.max_length) if length is not None]
        self.max_length = token_limit(processor, min(lengths, default=None), pairs=True)
        self.policy = self.policy_of(point)

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        point: Point = DEFAULT,
        *,
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_rows: int = MAX_ROWS,
        max_tokens: int = MAX_TOKENS,
        max_length: int | None = None,
        **hub: Any,
    ) -> Self:
        """Load model, tokenizer and point from a folder or hub id.

        Args:
            device: None is the first GPU, or the CPU where there is none.
            dtype: `fp32`, `bf16` or `fp16`; decisions are made in fp32 all the same.
            hub: `revision`, `local_files_only`, `token`, `cache_dir`.
        """
        target, number_format = as_device(device), as_dtype(dtype)
        folder = resolve(model, **hub)
        if not is_ours(folder):
            raise ModelError(
                f"{folder} holds a stock model without exits. "
                "Give it some with `offramp tune`, `offramp attach` or `offramp train`."
            )
        loaded = MultiExitModel.from_pretrained(folder, dtype=number_format)
        torch.nn.Module.to(loaded, device=target)
        return cls(
            loaded,
            load_tokenizer(folder),
            point,
            folder=folder,
            max_rows=max_rows,
            max_tokens=max_tokens,
            max_length=max_length,
        )

    def policy_of(self, point: Point) -> Policy:
        """The policy a point stands for, checked against the model.

        Raises:
            PointError: no such point, or one that was chosen for another model or tokenizer.
            ConfigError: a policy that does not fit the task.
        """
        if isinstance(point, str):
            named = self._named(point)
            if named is None:
                return Full()
            point = named
        if isinstance(point, OperatingPoint):
            point.check(self.model.fingerprint(), self.processor_fingerprint)
            self._warn_of_dtype(point)
            point = point.build_policy()
        point.check(self.model.problem_type, self.model.depth)
        return point

    @cached_property
    def processor_fingerprint(self) -> str:
        """Kept, since a point may be given with every call."""
        return processor_fingerprint(self.processor)

    def _named(self, name: str) -> OperatingPoint | None:
        """The folder's point of that name; None is full depth."""
        known = [] if self._folder is None else list_points(self._folder)
        if name == DEFAULT and name not in known:
            logger.warning(
                "%s has no operating point 'default', so every row runs to full depth. %s",
                self._folder or "The model",
                f"It has: {', '.join(known)}." if known else "Make one with `offramp calibrate`.",
            )
            return None
        if name == FULL:
            return None
        if self._folder is None:
            raise PointError(
                f"Point '{name}' is a name, but the model was not loaded from a folder. "
                "Give the point itself, a policy, or 'full'."
            )
        return OperatingPoint.load(self._folder, name)

    def _warn_of_dtype(self, point: OperatingPoint) -> None:
        running = str(self.model.dtype).removeprefix("torch.")
        if running != point.dtype:
            logger.warning(
                "Point '%s' was chosen in %s and runs in %s: rows near the threshold may leave "
                "elsewhere than its figures say.",
                point.name,
                point.dtype,
                running,
            )

    def answer(
        self,
        texts: Sequence[Text],
        policy: Policy | None = None,
        seen: Callable[[Sequence[Answer]], object] | None = None,
    ) -> tuple[list[Answer], int]:
        """Answers in the order of the texts, and how many texts were cut to the limit.

        Args:
            policy: None is the predictor's own.
            seen: called with the answers of each batch as it is done, in any order.
        """
        rows, cut = self._encode([_parts(text) for text in texts])
        policy = policy or self.policy

        def run(batch: Sequence[_Row]) -> list[Answer]:
            answers = self._run(batch, policy)
            if seen is not None:
                seen(answers)
            return answers

        def length(row: _Row) -> int:
            return len(row.tokens["input_ids"])

        return in_batches(rows, length, run, self.max_rows, self.max_tokens), cut

    def _encode(self, texts: Sequence[tuple[str, ...]]) -> tuple[list[_Row], int]:
        rows: dict[int, _Row] = {}
        cut = 0
        for parts in {len(text) for text in texts}:
            places = [place for place, text in enumerate(texts) if len(text) == parts]
            chosen = [texts[place] for place in places]
            # fast tokenizers keep their truncation setting on themselves
            with self._lock:
                columns, long = encode_texts(self.processor, chosen, self.max_length)
            cut += long
            for place, values in zip(places, zip(*columns.values(), strict=True), strict=True):
                tokens = dict(zip(columns, values, strict=True))
                rows[place] = _Row(input_id(*texts[place]), _not_empty(tokens))
        return [rows[place] for place in range(len(texts))], cut

    def _run(self, batch: Sequence[_Row], policy: Policy) -> list[Answer]:
        columns = {name: [row.tokens[name] for row in batch] for name in batch[0].tokens}
        device = self.model.device
        ids = torch.tensor([row.id for row in batch], device=device)
        lengths = torch.tensor([len(tokens) for tokens in columns["input_ids"]], device=device)
        tokens = collate(columns, self.processor.pad_token_id, device)
        answers = self._engine.run(tokens, policy, Rows(ids, lengths))
        scores, layers = answers.scores.cpu().numpy(), answers.exit_layers.tolist()
        return list(map(Answer, scores, layers, answers.bad.tolist()))


def _parts(text: Text) -> tuple[str, ...]:
    """(text,) or (text, text_pair). Raises DataError for anything else."""
    if isinstance(text, str):
        return (text,)
    if isinstance(text, Mapping) and "text" in text and set(text) <= {"text", "text_pair"}:
        parts = tuple(text[name] for name in ("text", "text_pair") if text.get(name) is not None)
    else:
        parts = tuple(text) if isinstance(text, tuple) else ()
    if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
        raise DataError(
            f"Not a text: {str(text)[:80]!r}, a {type(text).__name__}. Give a str, a tuple "
            '(text, text_pair), or a dict {"text": ..., "text_pair": ...}.'
        )
    return parts


def _not_empty(tokens: Mapping[str, list[int]]) -> Mapping[str, list[int]]:
    if not tokens["input_ids"]:
        raise DataError("A text is empty and gives no token at all. Leave it out.")
    return tokens
