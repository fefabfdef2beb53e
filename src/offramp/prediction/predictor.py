"""A model, its processor and an operating point, ready to answer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from offramp.backbones import Batch
from offramp.calibration import OperatingPoint, list_points, parse_share
from offramp.calibration.conformal import Sets
from offramp.engines import (
    UNLIMITED,
    Budget,
    Engine,
    TorchEngine,
    as_dtype,
    check_backend,
    in_batches,
    inputs_of,
    load_processor,
    make_engine,
    plan_batches,
    processor_fingerprint,
    windows,
)
from offramp.engines.base import NO_CLOCK
from offramp.engines.batching import MAX_ROWS, MAX_TOKENS
from offramp.engines.compiled import CompiledEngine
from offramp.engines.making import ON_TORCH
from offramp.engines.pool import SLOTS, Determinism, check_options, in_order
from offramp.engines.steps import most_padding
from offramp.errors import ConfigError, ModelError, PointError
from offramp.model import MultiExitModel
from offramp.model.folder import is_ours, resolve
from offramp.policies import Full, Policy, Rows
from offramp.prediction.items import Item, Row, alike, check_items, items_of, options_of
from offramp.prediction.ready import Course, ReadyPoint, check_length
from offramp.prediction.watching import Watch, begin

logger = logging.getLogger("offramp")

Point = str | OperatingPoint | Policy
"""The name of a point in the model's folder, `full`, a point or a policy."""
DEFAULT, FULL, WARN = "default", "full", "warn"


class Answer(NamedTuple):
    """What one row was answered with; the scores of a bad row mean nothing."""

    scores: npt.NDArray[np.float32]  # (classes,), raw
    exit_layer: int
    bad: bool
    forced: bool = False
    temperature: float = 1.0  # by which scores are divided before they are probabilities


def promises(point: OperatingPoint | Policy) -> bool:
    """Whether something is promised of it; that full depth loses nothing goes without saying."""
    return isinstance(point, Full) or (isinstance(point, OperatingPoint) and point.certified)


class Predictor:
    """Answers texts or images with a multi-exit model; any number of threads may share one.

    Args:
        model: in evaluation mode, on its device, in its compute dtype.
        processor: the model's tokenizer or image processor.
        point: where rows leave unless a call says otherwise. `default` is the folder's point
            of that name; without one, every row runs to full depth, and that is said aloud.
        folder: where named points lie.
        engine: what runs the model; None is torch.
        max_rows, max_tokens: of a batch, padding included.
        max_length: longest text in tokens; the tokenizer's and the model's limits hold as well.
        certified: refuse points without a certificate; full depth needs none.
    """

    def __init__(
        self,
        model: MultiExitModel,
        processor: Any,
        point: Point = DEFAULT,
        *,
        folder: str | Path | None = None,
        engine: Engine | None = None,
        max_rows: int = MAX_ROWS,
        max_tokens: int = MAX_TOKENS,
        max_length: int | None = None,
        certified: bool = False,
    ) -> None:
        whole = all(isinstance(one, int | np.integer) for one in (max_rows, max_tokens))
        if not whole or max_rows < 1 or max_tokens < 1:
            raise ConfigError(
                f"max_rows={max_rows!r}, max_tokens={max_tokens!r}: a batch holds a whole number "
                "of each, 1 or more."
            )
        self.model = model
        self.processor = processor
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self._folder = None if folder is None else Path(folder)
        self._certified = certified
        self.engine = engine or TorchEngine(model)
        self.inputs = inputs_of(processor)
        self.items = items_of(model, self.inputs, max_length)
        self.max_length = self.items.longest
        named = self._named(point) if isinstance(point, str) else point
        self.chosen = named if isinstance(named, OperatingPoint) else None
        self.point = self.ready(FULL if named is None else named)
        self.watched: Watch | None = None
        self._said_cut = False

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        point: Point = DEFAULT,
        *,
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: str = "torch",
        threads: int | None = None,
        sync_every: int | None = None,
        cuda_graphs: bool = False,
        max_rows: int = MAX_ROWS,
        max_tokens: int = MAX_TOKENS,
        max_length: int | None = None,
        certified: bool = False,
        **hub: Any,
    ) -> Self:
        """Load model, processor and point from a folder or hub id.

        Args:
            device: None is the first GPU, or the CPU where there is none.
            dtype: `fp32`, `bf16` or `fp16`; with backend `onnx` `fp32` or `int8`, with `openvino`
                `fp32`, `bf16` or `int8`. Decisions are made in fp32 all the same.
            backend: `torch`, or `onnx` or `openvino`, which run on the CPU and take a minute to
                prepare the first time.
            threads: of a call, where the backend is not torch; None is as many as torch's.
            sync_every, cuda_graphs: of `TorchEngine`, with backend `torch`; graphs need a GPU.
            hub: `revision`, `local_files_only`, `token`, `cache_dir`.
        """
        options: dict[str, Any] = {"sync_every": sync_every, "cuda_graphs": cuda_graphs}
        target = check_backend(backend, dtype, device, threads=threads, **options)
        folder = resolve(model, **hub)
        if not is_ours(folder):
            raise ModelError(
                f"{folder} holds a stock model without exits. "
                "Give it some with `offramp tune`, `offramp attach` or `offramp train`."
            )
        number_format = as_dtype(dtype) if backend in ON_TORCH else torch.float32
        loaded = MultiExitModel.from_pretrained(folder, dtype=number_format)
        torch.nn.Module.to(loaded, device=target)
        return cls(
            loaded,
            load_processor(folder, loaded.backbone.reads),
            point,
            folder=folder,
            engine=make_engine(loaded, backend, dtype, threads=threads, **options),
            max_rows=max_rows,
            max_tokens=max_tokens,
            max_length=max_length,
            certified=certified,
        )

    @property
    def policy(self) -> Policy:
        """Where rows leave unless a call says otherwise."""
        return self.point.policy

    def policy_of(self, point: Point) -> Policy:
        """The policy a point stands for, checked against the model; raises as `ready`."""
        return self.ready(point).policy

    def sets_of(self, point: Point | ReadyPoint | None = None) -> Sets:
        """What makes sets of classes at a point; None is the predictor's own.

        Raises:
            PointError: the point was chosen without.
        """
        sets = self.ready(point).sets
        if sets is None:
            raise PointError(
                "This point was chosen without sets of classes. Choose one with them: `offramp "
                "calibrate` or `offramp tune` with --sets 90%."
            )
        return sets

    def ready(self, point: Point | ReadyPoint | None) -> ReadyPoint:
        """What a point stands for, checked against the model; None is the predictor's own.

        Raises:
            PointError: no such point, or one that was chosen for another model, processor or
                way to compute.
            ConfigError: a policy that does not fit the task.
        """
        if point is None or isinstance(point, ReadyPoint):
            return self.point if point is None else point
        if isinstance(point, str):
            named = self._named(point)
            if named is None:
                return ReadyPoint(Full())
            point = named
        if not isinstance(point, OperatingPoint | Policy):
            raise PointError(f"Not an operating point: {point!r:.80}. Give its name, or a policy.")
        if self._certified and not promises(point):
            raise PointError("This point has no certificate, and only such with one are wanted.")
        found = ReadyPoint(point) if isinstance(point, Policy) else self._checked(point)
        found.policy.check(self.model.problem_type, self.model.depth)
        return found

    def _checked(self, point: OperatingPoint) -> ReadyPoint:
        point.check(self.model.fingerprint(), self.processor_fingerprint)
        point.check_engine(self.engine.name, self.engine.dtype)
        if self._certified and point.policy["name"] != FULL:
            check_length(point, self.items, items_of(self.model, self.inputs, None))
        return ReadyPoint(point.build_policy(), point.sets, point.temperatures, point.certificate)

    def watch(
        self,
        share: float | str = 0.01,
        path: str | Path | None = None,
        on_alarm: str = WARN,
        level: float = 0.05,
    ) -> Watch:
        """Run a share of the rows to full depth as well, and say when the point no longer holds.

        Args:
            share: of rows to audit, 0.01 or '1%'; each costs a full run.
            path: a file that keeps what was seen over restarts, for one process at a time.
            on_alarm: `warn` says so and goes on, `full` runs every row to full depth from then
                on, and the name of another point uses that one.
            level: chance of a false alarm, ever.

        Raises:
            ConfigError: there is no operating point to watch, an option makes no sense, or
                somebody else watches with the file.
            PointError: no such point, or a file of another one.
        """
        point = self.chosen
        if point is None:
            raise ConfigError(
                "There is nothing to watch: rows run under no operating point. Choose one of the "
                "folder's points; `offramp info` lists them."
            )
        audited = parse_share(share)
        if not 0 < audited <= 1:
            raise ConfigError(f"No share of the rows is {share}. Write 1% or 0.01.")
        instead = None if on_alarm == WARN else self.ready(on_alarm)
        # full depth that is watched may well fall back on full depth
        if instead is not None and self.policy != Full() and instead.policy == self.policy:
            raise ConfigError(
                f"After an alarm rows would run under '{on_alarm}', which is what is watched. Name "
                f"another point, '{WARN}' or '{FULL}'."
            )
        place = None if path is None else Path(path)
        if self.watched is not None:
            self.watched.close()
            self.watched = None
        monitor, kept = begin(point, place, level)
        kind = self.model.problem_type
        self.watched = Watch(monitor, audited, self.policy, instead, place, kind, kept)
        return self.watched

    @cached_property
    def processor_fingerprint(self) -> str:
        """Kept, since a point may be given with every call."""
        return processor_fingerprint(self.processor)

    def _named(self, name: str) -> OperatingPoint | None:
        """The folder's point of that name; None is full depth."""
        known = [] if self._folder is None else list_points(self._folder)
        if name == DEFAULT and name not in known and not self._certified:
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
        return OperatingPoint.load(self._folder, name, self._certified)

    def answer(
        self,
        items: Sequence[Item],
        point: Point | ReadyPoint | None = None,
        seen: Callable[[Sequence[Answer]], object] | None = None,
        budget: Budget = UNLIMITED,
    ) -> tuple[list[Answer], int]:
        """Answers in the order of the items, and how many of them were cut to the limit.

        Args:
            items: a dict among them may name its own `point`, `max_depth` and `max_seconds`.
            point: None is the predictor's own.
            seen: called with the answers of each batch as it is done, in any order.
            budget: of each row; what a row asks for itself is never more.
        """
        check_items(items)
        courses = self._courses(items, Course(self.ready(point), budget))
        rows, cut = self.items.read(items)
        answers: dict[int, Answer] = {}
        for course, places in courses:
            part = self._along(course, [rows[place] for place in places], seen)
            answers.update(zip(places, part, strict=True))
        return [answers[place] for place in range(len(rows))], cut

    def say_cut(self, cut: int) -> None:
        """Say, the first time, that texts were cut."""
        if cut and not self._said_cut:
            self._said_cut = True
            logger.warning(
                "Texts longer than %s tokens are cut: %d so far. This is said once.",
                self.max_length,
                cut,
            )

    def _along(
        self,
        course: Course,
        rows: Sequence[Row],
        seen: Callable[[Sequence[Answer]], object] | None,
    ) -> list[Answer]:
        """Answers of rows that run alike, in their order."""

        def run(batch: Sequence[Row]) -> list[Answer]:
            answers = self._run(batch, course)
            if seen is not None:
                seen(answers)
            return answers

        def length(row: Row) -> int:
            return row.length

        return in_batches(rows, length, run, *self._limits)

    def _courses(self, items: Sequence[Item], usual: Course) -> list[tuple[Course, list[int]]]:
        """How items run, and the places of those that run so."""
        same: dict[str, tuple[Course, list[int]]] = {}
        for place, item in enumerate(items):
            own = options_of(item)
            key = repr(own)
            if key not in same:
                same[key] = (self._course(usual, **own), [])
            same[key][1].append(place)
        return list(same.values())

    def _course(
        self,
        usual: Course,
        point: Point | None = None,
        max_depth: int | None = None,
        max_seconds: float | None = None,
    ) -> Course:
        ready = usual.point if point is None else self.ready(point)
        return Course(ready, usual.budget.within(Budget(max_depth, max_seconds)))

    def stream(
        self,
        items: Iterable[Item],
        point: Point | ReadyPoint | None = None,
        *,
        ordered: bool = False,
        determinism: Determinism | None = None,
        slots: int | None = None,
        ahead: int | None = None,
        budget: Budget = UNLIMITED,
    ) -> Iterator[tuple[int, Answer]]:
        """Positions of items and their answers as they are found, see `TorchEngine.stream`.

        Items are read a batch at a time, or `ahead` at a time where that is fewer, so `items` may
        be endless, and come slowly; long texts are cut. Engines that do not run in torch have no
        pool: they read some batches ahead and answer one after the other.

        Args:
            items: all run alike; none may ask for a point or a budget of its own.
            point: None is the predictor's own.
            ordered: give the answers in the order of the items.
            determinism: `shape` makes every answer the same to the last bit whatever other items
                are asked about; with backends onnx and openvino, rows then run one by one.
            slots: rows of a full batch; with backends torch and inductor.
            ahead: rows read before their answers are there.
            budget: of each row; its seconds begin with its first layer.

        Raises ConfigError where an option makes no sense.
        """
        check_items(items)
        course = Course(self.ready(point), budget)
        if isinstance(self.engine, CompiledEngine) and budget.seconds is not None:
            raise ConfigError(NO_CLOCK.format(self.engine.name))
        if not isinstance(self.engine, TorchEngine) or self.watched is not None:
            check_options(1, 1 if ahead is None else ahead, determinism, budget)
            # in a file, layers run on as many rows as neighbours leave over
            can_be = self.watched is None and isinstance(self.engine, CompiledEngine)
            one_by_one = determinism is not None and can_be
            asked = {"slots": slots, "determinism": None if one_by_one else determinism}
            for option, value in asked.items():
                if value is not None:
                    raise ConfigError(
                        f"{option}={value!r} is for backends torch and inductor, and not for rows "
                        "that are watched."
                    )
            found = self._by_batches(items, course, 1 if one_by_one else self.max_rows, ahead)
            return in_order(found) if ordered else found
        results = self.engine.stream(
            self._alone(items, ahead),
            course.point.policy,
            ordered=ordered,
            determinism=determinism,
            slots=SLOTS if slots is None else slots,
            ahead=ahead,
            budget=budget,
        )
        warm = course.point.temperature
        return (
            (position, Answer(row.scores.cpu().numpy(), *row[1:], warm(row.exit_layer)))
            for position, row in results
        )

    def _by_batches(
        self, items: Iterable[Item], course: Course, most: int, ahead: int | None
    ) -> Iterator[tuple[int, Answer]]:
        first = 0
        # rows are read ahead to be sorted by length, which rows one by one gain nothing by
        window_of = 1 if most == 1 else self.items.ahead * self.max_rows
        for window in windows(alike(items), min(window_of, ahead or window_of)):
            rows, cut = self.items.read(window)
            self.say_cut(cut)
            lengths = [row.length for row in rows]
            for places in plan_batches(lengths, most, *self._limits[1:]):
                answers = self._run([rows[place] for place in places], course)
                yield from zip((first + places).tolist(), answers, strict=True)
            first += len(rows)

    @property
    def _limits(self) -> tuple[int, int, int | None]:
        """Rows, tokens and padding of a batch."""
        return self.max_rows, self.max_tokens, most_padding(self.engine, self.model.device)

    def _alone(self, items: Iterable[Item], ahead: int | None) -> Iterator[tuple[int, Batch]]:
        for window in windows(alike(items), min(self.max_rows, ahead or self.max_rows)):
            rows, cut = self.items.read(window)
            self.say_cut(cut)
            for row in rows:
                yield row.id, self.items.batch([row], "cpu", few_lengths=True)

    def _run(self, batch: Sequence[Row], course: Course) -> list[Answer]:
        watch, (point, budget) = self.watched, course
        if watch is None or point.policy != watch.policy:
            return self._answers(batch, point, budget)
        if watch.instead is not None:
            return self._answers(batch, watch.instead, budget)
        answers = self._answers(batch, point, budget)

        def said(rows: Sequence[Row], point: ReadyPoint) -> tuple[npt.NDArray[Any], list[int]]:
            return _said(self._answers(rows, point))

        watch.saw(
            batch,
            *_said(answers),
            lambda rows: said(rows, ReadyPoint(Full()))[0],
            None if budget == UNLIMITED else lambda rows: said(rows, point),
        )
        return answers

    def _answers(
        self, batch: Sequence[Row], point: ReadyPoint, budget: Budget = UNLIMITED
    ) -> list[Answer]:
        device = self.model.device
        ids = torch.tensor([row.id for row in batch], device=device)
        lengths = torch.tensor([row.length for row in batch], device=device)
        inputs = self.items.batch(batch, device, getattr(self.engine, "few_shapes", False))
        answers = self.engine.run(inputs, point.policy, Rows(ids, lengths), budget)
        scores, layers = answers.scores.cpu().numpy(), answers.exit_layers.tolist()
        forced = [False] * len(batch) if answers.forced is None else answers.forced.tolist()
        warm = map(point.temperature, layers)
        return list(map(Answer, scores, layers, answers.bad.tolist(), forced, warm))


def _said(answers: Sequence[Answer]) -> tuple[npt.NDArray[Any], list[int]]:
    """Scores (rows, classes) and exit layers."""
    return np.stack([one.scores for one in answers]), [one.exit_layer for one in answers]
