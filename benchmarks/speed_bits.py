"""Parts of speed.py about bits: `file` and `determinism`."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from same_answers import near, texts
from speed_study import (
    Cell,
    Cells,
    Figure,
    Options,
    PlainOnnx,
    ms,
    singles,
    stand,
    timed,
)
from speed_texts import copied

from offramp.backbones import Batch
from offramp.benchmark.runners import with_mask
from offramp.engines import in_batches, windows
from offramp.evaluation.speed import Job
from offramp.policies import MaxProbability
from offramp.prediction import Predictor, export
from offramp.prediction.predictor import Answer

POLICY = MaxProbability(threshold=0.9)
ROWS, LATENCY_ROWS = 5_000, 96
TEXTS, ORDERS, CHUNK, BATCH = 200, 50, 10, 32
REQUESTS, WARM_UP = 1_000, 32
ENGINES = (("torch", "fp32"), ("onnx", "fp32"), ("onnx", "int8"), ("inductor", "fp32"))
Bits = npt.NDArray[np.int32]


# The file alone


def file(options: Options) -> Cells:
    cells: Cells = {}
    for kind in options.folders:
        cells[f"{kind}, answers"] = partial(_answers, options, kind)
        cells[f"{kind}, latency"] = partial(_latency, options, kind)
    return cells


def _load(options: Options, kind: str, backend: str) -> Predictor:
    folder = copied(options, kind)
    return Predictor.load(folder, POLICY, device="cpu", backend=backend, threads=options.threads)


def _exported(options: Options, kind: str) -> Path:
    path = copied(options, kind).parent / "exported.onnx"
    return export(_load(options, kind, "onnx"), path, progress=False).path


class _File(PlainOnnx):
    """An exported file, as whoever has nothing but it runs it."""

    def feed(self, batch: Any) -> dict[str, Any]:
        whole = {name: leaf.numpy() for name, leaf in with_mask(batch).items()}
        whole.setdefault("token_type_ids", np.zeros_like(whole["input_ids"]))
        whole["bar"] = np.array(np.nan, dtype=np.float32)
        whole["bars"] = np.array([np.nan], dtype=np.float32)
        return {name: whole[name] for name in self._names}

    def job(self, batch: Any, rows: Any = None, policy: Any = None) -> Job:
        return partial(self.session.run, None, self.feed(batch))

    def answers(self, predictor: Predictor, rows: Sequence[str]) -> list[Answer]:
        """Of texts, in length-sorted batches."""
        read, _ = predictor.items.read(rows)

        def run(batch: Any) -> list[Answer]:
            feed = self.feed(predictor.items.batch(batch, torch.device("cpu")))
            scores, layers = self.session.run(["scores", "exit_layer"], feed)
            return [Answer(*row, False) for row in zip(scores, layers.tolist(), strict=True)]

        return in_batches(read, lambda row: row.length, run)


def _answers(options: Options, kind: str) -> Cell:
    """The file and the torch engine, row by row."""
    rows = texts(kind, options.some(ROWS, 100))
    predictor = _load(options, kind, "torch")
    ours, _ = predictor.answer(rows)
    theirs = _File(_exported(options, kind), options.threads).answers(predictor, rows)
    unlike = np.array(
        [
            one.exit_layer != other.exit_layer or one.scores.argmax() != other.scores.argmax()
            for one, other in zip(ours, theirs, strict=True)
        ]
    )
    band = np.array([near(predictor, row, POLICY) for row in rows])
    outside = Figure.count(
        "rows unlike the torch engine outside the band of 1e-4",
        int((unlike & ~band).sum()),
        0,
        least=False,
        beside=f"{band.sum()} rows lie in the band, {(unlike & band).sum()} of them unlike",
    )
    mean = float(np.mean([one.exit_layer for one in ours]))
    facts = {"rows": len(rows), "mean exit layer": round(mean, 3), "policy": str(POLICY.to_dict())}
    return Cell(figures=(outside,), facts=facts)


def _latency(options: Options, kind: str) -> Cell:
    path = _exported(options, kind)
    one = stand(str(copied(options, kind)), options.threads, rows=256)
    batches = singles(one.data.lengths, options.some(LATENCY_ROWS, 4))
    alone = _File(path, options.threads)
    jobs = {"file": [alone.job(batch) for batch, _ in one.numbered(batches)]}
    for runtime in ("onnx", "torch"):
        ours = one.ours(runtime, "fp32")
        jobs[runtime] = [ours.job(batch, rows, POLICY) for batch, rows in one.numbered(batches)]
    seconds = timed(jobs, options)
    rows = len(batches)
    figures = tuple(
        Figure.of(
            f"{runtime} engine / file, time at batch 1",
            seconds[runtime] / seconds["file"],
            1.0,
            beside=f"{ms(seconds[runtime], rows):.3f} and {ms(seconds['file'], rows):.3f} ms",
        )
        for runtime in ("onnx", "torch")
    )
    return Cell(figures=figures, facts={"rows": rows, "passes": len(seconds["file"])})


# Neighbours, and what is made anew


def determinism(options: Options) -> Cells:
    cells: Cells = {}
    for kind in options.folders:
        orders = range(options.some(ORDERS, 2))
        chunk = options.some(CHUNK, 2)
        for first in orders[::chunk]:
            some = orders[first : first + chunk]
            name = f"{kind}, orders {first + 1} to {some.stop}"
            cells[name] = partial(_bits, options, kind, some)
        for backend, dtype in ENGINES:
            name = f"{kind}, requests, {backend} {dtype}"
            cells[name] = partial(_requests, options, kind, backend, dtype)
    return cells


def _bits(options: Options, kind: str, orders: range) -> Cell:
    """Each order is a stream of all texts, beside the order in which they stand."""
    rows = texts(kind, options.some(TEXTS, 24))
    predictor = _load(options, kind, "torch")

    def same_shape(some: Sequence[str]) -> list[Any]:
        return [found for _, found in predictor.stream(some, ordered=True, determinism="shape")]

    def usual(some: Sequence[str]) -> list[Any]:
        return [found for some in windows(some, BATCH) for found in predictor.answer(some)[0]]

    first = same_shape(rows)
    differ = _differing(rows, orders, same_shape, first)
    inverse = _differing(rows, orders, usual, usual(rows))
    checked = len(rows) * len(orders)
    figures = (
        Figure.count(f"of {checked:,} answers with other bits: shape", differ, 0, least=False),
        Figure.count(f"of {checked:,} answers with other bits: without it", inverse, 1),
    )
    mean = float(np.mean([one.exit_layer for one in first]))
    facts = {"texts": len(rows), "orders": len(orders), "mean exit layer": round(mean, 3)}
    return Cell(figures=figures, facts=facts)


def _differing(
    rows: Sequence[str],
    orders: range,
    run: Callable[[Sequence[str]], list[Any]],
    wanted: Sequence[Any],
) -> int:
    """Answers of which a bit of a score or the exit layer is another than wanted."""
    count = 0
    for order in orders:
        places = np.random.default_rng(order).permutation(len(rows)).tolist()
        for place, found in zip(places, run([rows[n] for n in places]), strict=True):
            same = found.exit_layer == wanted[place].exit_layer
            count += not (same and np.array_equal(_bits_of(found), _bits_of(wanted[place])))
    return count


def _bits_of(answer: Answer) -> Bits:
    return np.asarray(answer.scores, dtype=np.float32).view(np.int32)


def _requests(options: Options, kind: str, backend: str, dtype: str) -> Cell:
    """Requests of random batch and length after a few, and what was made anew for them."""
    one = stand(str(copied(options, kind)), options.threads, rows=64)
    graphs, engine = _graphs(), one.engine(backend, dtype)
    draw = np.random.default_rng(0)
    vocabulary: int = one.model.stock.config.vocab_size
    engine.run(_request(draw, vocabulary, 5, 5), POLICY)  # a shape that compilers take for special
    for _ in range(WARM_UP):
        engine.run(_request(draw, vocabulary), POLICY)
    number = options.some(REQUESTS, 20)
    with _counting() as made:
        for _ in range(number):
            engine.run(_request(draw, vocabulary), POLICY)
    figure = Figure.count(
        f"made anew over {number:,} requests",
        made(),
        0,
        least=False,
        beside=f"graphs of torch.compile: {_graphs() - graphs}; watched: {', '.join(_MADE)}",
    )
    return Cell(figures=(figure,), facts={"requests before": WARM_UP + 1})


def _request(
    draw: np.random.Generator, vocabulary: int, rows: int | None = None, tokens: int | None = None
) -> Batch:
    """Of 1 to 31 rows of 4 to 90 tokens where nothing is said; every second one is padded."""
    rows = rows or int(2 ** draw.uniform(0, 5))
    tokens = tokens or int(2 ** draw.uniform(2, 6.5))
    shortest = int(draw.choice([2, tokens]))
    lengths = torch.from_numpy(draw.integers(shortest, tokens + 1, (rows, 1)))
    ids = torch.from_numpy(draw.integers(5, vocabulary, (rows, tokens)))
    return {"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths).long()}


_MADE = (
    "onnxruntime.InferenceSession",
    "torch.export.export",
    "torch.onnx.export",
    "torch.compile",
    "torch.jit.trace",
)


@contextmanager
def _counting() -> Iterator[Callable[[], int]]:
    """How many sessions, graphs and compilations are made within."""
    import onnxruntime  # noqa: F401

    compiled = _graphs()
    with ExitStack() as stack:
        spies = [
            stack.enter_context(mock.patch(name, wraps=pkgutil.resolve_name(name)))
            for name in _MADE
        ]
        yield lambda: sum(spy.call_count for spy in spies) + _graphs() - compiled


def _graphs() -> int:
    """That torch.compile has made so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
