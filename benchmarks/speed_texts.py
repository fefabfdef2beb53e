"""Parts of speed.py on real rows and trained models: `padding`, `int8` and `pabee`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from speed_layers import FIXED, OURS
from speed_study import (
    ARCHITECTURES,
    FILES,
    QUICK,
    Cell,
    Cells,
    Figure,
    Options,
    Places,
    PlainOnnx,
    Stand,
    data_file,
    ms,
    neighbours,
    singles,
    stand,
    timed,
    with_rows,
)

from offramp.benchmark.runners import Runner, with_mask
from offramp.benchmark.subject import open_subject
from offramp.calibration import calibrate, measure
from offramp.data import drop_overlap, load_examples, split_examples
from offramp.engines import cost_model, plan_batches, record, windows
from offramp.engines.batching import MAX_ROWS, MAX_TOKENS, WINDOW
from offramp.evaluation import ideal_speed_up, laps
from offramp.evaluation.speed import Job
from offramp.metrics import predictions
from offramp.model import MultiExitModel
from offramp.policies import Full, Patience, Policy
from offramp.prediction import Predictor
from offramp.storage import whole_folder
from offramp.table import ExitTable, replay

BATCH = 32
PADDING_TARGETS = {"train": 2.0, "dev": 1.6}
TRAIN_ROWS, HALVES = 20_000, 2
TUNE_SHARES = {"sst2": 0.05, "uspto_50k": 0.1}
"""Of first_road.py, whose tune rows are the default."""
TUNE_ROWS, SEED, RESAMPLES = 3_000, 1, 2_000
POINTS: dict[str, dict[str, Any]] = {
    "at most 0.5 points lost": {"max_drop": 0.005},
    "3x": {"target_speedup": 3.0},
}
PATIENCE, LOOP_TOKENS = 2, 128


def in_turns(
    jobs: Sequence[dict[str, list[Job]]], names: Sequence[str]
) -> dict[str, npt.NDArray[np.float64]]:
    """Seconds of each contender for each window; who is first changes from window to window."""
    next(laps(jobs[0]))
    taken = []
    for number, window in enumerate(jobs):
        order = names if number % 2 else names[::-1]
        taken.append(next(laps({name: window[name] for name in order})))
    return {name: np.array([lap[name] for lap in taken]) for name in names}


# No wasted padding


def padding(options: Options) -> Cells:
    cells: Cells = {}
    for runtime in ("torch", "onnx"):
        for half in range(HALVES):
            rows = options.some(TRAIN_ROWS, 256)
            chosen = range(half * rows // HALVES, (half + 1) * rows // HALVES)
            name = f"train lengths, {runtime}, rows {chosen.start + 1:,} to {chosen.stop:,}"
            cells[name] = partial(_padding, options, "train", runtime, chosen)
        name = f"dev lengths, {runtime}"
        cells[name] = partial(_padding, options, "dev", runtime, range(options.some(872, 128)))
    return cells


@lru_cache(maxsize=1)
def _rows_of(options_key: tuple[int, bool, str | None], part: str, rows: int) -> Stand:
    threads, quick, folder = options_key
    subject = open_subject(folder or (QUICK if quick else ARCHITECTURES["MiniLM-6"]))
    return with_rows(subject, "sst2", part, threads, rows)


def _padding(options: Options, part: str, runtime: str, chosen: range) -> Cell:
    folder = options.folders.get("sst2")
    key = (options.threads, options.quick, str(folder) if folder else None)
    total = options.some(TRAIN_ROWS, 256) if part == "train" else len(chosen)
    one = _rows_of(key, part, total)
    plain = next(iter(one.plain(runtime, "fp32").values()))
    ours = one.ours(runtime, "fp32")
    again = options.some(9, 2) if part == "dev" else 1
    parts = list(windows(list(chosen), MAX_ROWS * WINDOW))
    jobs = [
        {
            "arrival": _all_of(one, plain, list(windows(window, BATCH))),
            OURS: _all_of(one, ours, _planned(one, window)),
        }
        for window in parts
    ] * again
    seconds = in_turns(jobs, ("arrival", OURS))
    rows = len(chosen) * again
    beside = f"{_real(one, [list(chosen)]):.1f} tokens a row"
    beside += f", padded to {_padded(one, parts):.1f} as they arrive; ms a row: "
    beside += f"{1000 * seconds['arrival'].sum() / rows:.3f}"
    beside += f" and {1000 * seconds[OURS].sum() / rows:.3f}"
    figure = Figure.of(
        "times as fast as batches of 32 as they arrive",
        seconds["arrival"] / seconds[OURS],
        PADDING_TARGETS[part],
        beside=beside,
    )
    facts = {"rows": len(chosen), "windows": len(jobs)}
    return Cell(figures=(figure,), facts=facts)


def _planned(one: Stand, window: list[int]) -> list[Places]:
    """As `predict` batches what it has read ahead."""
    lengths = one.data.lengths[window]
    return [np.array(window)[b].tolist() for b in plan_batches(lengths, MAX_ROWS, MAX_TOKENS)]


def _all_of(one: Stand, runner: Runner | PlainOnnx, batches: Sequence[Places]) -> list[Job]:
    return [runner.job(batch, rows, Full()) for batch, rows in one.numbered(batches)]


def _real(one: Stand, batches: Sequence[Places]) -> float:
    return float(one.lengths_in(batches).mean())


def _padded(one: Stand, parts: Sequence[list[int]]) -> float:
    batches = [batch for part in parts for batch in windows(part, BATCH)]
    cells = [len(batch) * int(one.data.lengths[batch].max()) for batch in batches]
    return sum(cells) / sum(map(len, batches))


# Early exit and eight bits


def int8(options: Options) -> Cells:
    cells: Cells = {}
    for kind in options.folders:
        cells[f"{kind}, score"] = partial(_score, options, kind)
        for work in ("batch 1", "batch 32", "stream"):
            cells[f"{kind}, {work}"] = partial(_int8, options, kind, work)
    return cells


def copied(options: Options, kind: str) -> Path:
    """A copy of a trained model, for points of its own."""
    source = options.folders[kind]
    folder = options.work / f"{kind}-{options.weights(kind)}" / "model"
    if not folder.is_dir():
        with whole_folder(folder) as staged:
            shutil.copytree(
                source,
                staged,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("points", "*.onnx"),
            )
    return folder


@lru_cache(maxsize=2)
def _predictor(folder: Path, dtype: str, threads: int) -> Predictor:
    backend = "torch" if dtype == "torch" else "onnx"
    number_format = "fp32" if dtype == "torch" else dtype
    return Predictor.load(
        folder, "full", device="cpu", backend=backend, dtype=number_format, threads=threads
    )


def _table(options: Options, kind: str, role: str, dtype: str, rows: Callable[[], Dataset]) -> Any:
    """What all exits say of rows, recorded once."""
    folder = copied(options, kind)
    path = folder.parent / f"{role}-{dtype}"
    if not path.is_dir():
        one = _predictor(folder, dtype, options.threads)
        record(one.model, rows(), path, role, processor=one.processor, engine=one.engine)
    return ExitTable.open(path)


def _tune_rows(options: Options, kind: str) -> Dataset:
    """Rows that the model was not trained on: a file, or what first_road.py keeps for it."""
    limit = options.some(TUNE_ROWS, 200)
    text, label = FILES[kind]
    if kind in options.tune:
        return load_examples(str(options.tune[kind]), text=text, label=label, max_rows=limit)
    whole = load_examples(str(data_file(kind, "train")), text=text, label=label)
    whole, _ = drop_overlap(whole, _dev_rows(options, kind))
    share = TUNE_SHARES[kind]
    tune = split_examples(whole, {"train": 1 - share, "tune": share}, SEED)["tune"]
    return load_examples(tune, max_rows=limit)


def _dev_rows(options: Options, kind: str) -> Dataset:
    text, label = FILES[kind]
    limit = options.some(5_000, 200)
    return load_examples(str(data_file(kind)), text=text, label=label, max_rows=limit)


def _points(options: Options, kind: str) -> dict[str, Policy]:
    """Policies chosen on what the engine in int8 says of the tune rows."""
    table = _table(options, kind, "tune", "int8", lambda: _tune_rows(options, kind))
    return {said: calibrate(table, **asked).point.build_policy() for said, asked in POINTS.items()}


def _score(options: Options, kind: str) -> Cell:
    """Points lost on dev against full depth in fp32."""
    dev = partial(_dev_rows, options, kind)
    whole = _right(_table(options, kind, "test", "fp32", dev), Full())
    table = _table(options, kind, "test", "int8", dev)
    figures = [_lost("full depth in int8", whole, _right(table, Full()), None)]
    for said, policy in _points(options, kind).items():
        done = measure(table, policy)
        layers = np.arange(1, table.depth + 1)
        lost = _lost(said, whole, _right(table, policy), 0.5)
        mean = np.average(layers, weights=done.exit_histogram)
        beside = f"cost reduction {done.cost_reduction:.2f}, mean exit layer {mean:.2f}, "
        beside += f"{policy.to_dict()}"
        figures.append(lost.model_copy(update={"beside": beside}))
    facts = {"rows": len(whole), "full depth in fp32, points": 100 * float(whole.mean())}
    return Cell(figures=tuple(figures), facts=facts)


def _right(table: ExitTable, policy: Policy) -> npt.NDArray[np.bool_]:
    answers = predictions(replay(table, policy).answers, table.problem_type)
    return np.asarray(answers == table.labels)


def _lost(
    said: str, whole: npt.NDArray[np.bool_], early: npt.NDArray[np.bool_], target: float | None
) -> Figure:
    """Points, with a bootstrap interval over rows, which are paired."""
    lost = 100 * (whole.astype(float) - early)
    draws = np.random.default_rng(0).integers(0, len(lost), (RESAMPLES, len(lost)))
    low, high = np.quantile(lost[draws].mean(axis=1), (0.025, 0.975))
    return Figure(
        name=f"points lost against full depth in fp32: {said}",
        value=float(lost.mean()),
        low=float(low),
        high=float(high),
        target=target,
        least=False,
    )


def _int8(options: Options, kind: str, work: str) -> Cell:
    points = _points(options, kind)
    one = stand(str(copied(options, kind)), options.threads, rows=options.some(512, 64))
    theirs, mine = _works(one, work, options)
    rows = sum(map(len, mine))
    ours = one.ours("onnx", "int8")
    plain = one.plain("onnx", "int8")
    jobs = {said: _all_of(one, runner, theirs) for said, runner in plain.items()}
    jobs[OURS], jobs[FIXED] = _all_of(one, ours, mine), _all_of(one, ours.front, mine)
    for said, policy in points.items():
        jobs[said] = [ours.job(batch, places, policy) for batch, places in one.numbered(mine)]
    costs = {said: _cost(one, jobs[said], mine, policy) for said, policy in points.items()}
    seconds = timed(jobs, options)
    fixed = seconds[FIXED]
    figures = []
    for said, cost in costs.items():
        for name in plain:
            full, over = seconds[name], f"{said}, over {name}"
            times = full / seconds[said]
            ideal = ideal_speed_up(float(np.median(full)), float(np.median(fixed)), cost)
            beside = f"cost reduction {1 / cost:.2f}, ideal {ideal:.2f}"
            if theirs is mine:  # else sorting by length has a part in it
                figures.append(Figure.of(f"speed-up / cost reduction: {over}", times * cost, 0.9))
            figures.append(Figure.of(f"speed-up: {over}", times, 3.0, beside=beside))
    facts = {
        "rows": rows,
        "passes": len(fixed),
        **{f"{name}, ms a row": round(ms(seconds[name], rows), 3) for name in plain},
        "ours at full depth, ms a row": round(ms(seconds[OURS], rows), 3),
        "fixed part, ms a row": round(ms(fixed, rows), 4),
    }
    return Cell(figures=tuple(figures), facts=facts)


def _works(one: Stand, work: str, options: Options) -> tuple[list[Places], list[Places]]:
    """Batches for plain runtimes, and ours; they differ only where rows come in a stream."""
    lengths = one.data.lengths
    if work == "batch 1":
        batches = singles(lengths, options.some(128, 8))
    elif work == "batch 32":
        batches = neighbours(lengths, BATCH, options.some(8, 1))
    else:
        window = list(range(len(lengths)))
        return list(windows(window, BATCH)), _planned(one, window)
    return batches, batches


def _cost(one: Stand, jobs: Sequence[Job], batches: Sequence[Places], policy: Policy) -> float:
    answers: list[Any] = [job() for job in jobs]
    layers = np.concatenate([found.exit_layers.numpy() for found in answers])
    return cost_model(one.model).share(one.lengths_in(batches), layers, policy)


# The loop of the original


def pabee(options: Options) -> Cells:
    return {"sst2 dev": partial(_pabee, options)} if "sst2" in options.folders else {}


def as_original(model: MultiExitModel, batch: Any, patience: int) -> tuple[int, int]:
    """One row through BERT's layers as in PABEE's release; its exit layer and its label.

    Layers, mask and head are the stock model's; only the exits between are ours.
    """
    bert: Any = model.stock.base_model
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    hidden = bert.embeddings(input_ids=tokens, token_type_ids=batch["token_type_ids"])
    extended = (1.0 - mask[:, None, None, :]) * torch.finfo(hidden.dtype).min
    counter, label, carry = 0, None, None
    for number, layer in enumerate(bert.encoder.layer, start=1):
        hidden = layer(hidden, extended)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        output, carry = model.exit_at(number)(hidden, mask, carry)
        found = output.scores.detach().argmax(dim=1)
        counter = counter + 1 if label is not None and torch.all(found.eq(label)) else 0
        label = found
        if counter == patience:
            break
    return number, int(label)


def _padded_rows(one: Stand, rows: int) -> Iterator[Any]:
    for place in range(rows):
        batch = with_mask(one.data.batch([place]))
        missing = LOOP_TOKENS - batch["input_ids"].shape[1]
        pad = torch.nn.functional.pad
        batch = {name: pad(leaf, (0, missing)) for name, leaf in batch.items()}
        yield {"token_type_ids": torch.zeros_like(batch["input_ids"]), **batch}


def _pabee(options: Options) -> Cell:
    one = stand(str(copied(options, "sst2")), options.threads, rows=872)
    rows, policy = options.some(872, 40), Patience(patience=PATIENCE)
    padded = list(_padded_rows(one, rows))
    planned = _planned(one, list(range(rows)))
    jobs: dict[str, list[Job]] = {
        "loop": [partial(as_original, one.model, batch, PATIENCE) for batch in padded]
    }
    kinds = (("torch", "fp32"), ("onnx", "fp32"), ("onnx", "int8"))
    for kind in kinds:
        ours = one.ours(*kind)
        jobs[" ".join(kind)] = [
            ours.job(batch, places, policy) for batch, places in one.numbered(planned)
        ]
    with torch.inference_mode():
        wanted = np.array([job() for job in jobs["loop"]])
    order = np.concatenate([list(batch) for batch in planned])
    seconds = timed(jobs, options)
    figures = []
    for runtime, precision in kinds:
        name, asked = f"{runtime} {precision}", precision == "fp32"
        unlike = _unlike(jobs[name], wanted[order])
        target = 0.0 if asked else None
        figures.append(
            Figure.count(f"rows answered unlike the loop: {name}", unlike, target, least=False)
        )
        times = seconds["loop"] / seconds[name]
        figures.append(Figure.of(f"times the loop's throughput: {name}", times, 10.0))
    facts = {
        "rows": rows,
        "passes": len(seconds["loop"]),
        "patience": PATIENCE,
        "mean exit layer": round(float(wanted[:, 0].mean()), 3),
        "loop, ms a row": round(ms(seconds["loop"], rows), 3),
    }
    return Cell(figures=tuple(figures), facts=facts)


def _unlike(jobs: Sequence[Job], wanted: npt.NDArray[np.int64]) -> int:
    answers: list[Any] = [job() for job in jobs]
    layers = np.concatenate([found.exit_layers.numpy() for found in answers])
    labels = np.concatenate([found.scores.argmax(dim=1).numpy() for found in answers])
    return int(((layers != wanted[:, 0]) | (labels != wanted[:, 1])).sum())
