"""One run of a comparison, in a process of its own: train, record, say what it was worth.

python -m offramp.comparison.cell FOLDER '{"method": "pabee", "rate": 0.0003, "seed": 1}'
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset, load_from_disk
from filelock import FileLock

from offramp.comparison import leaderboard
from offramp.comparison.plan import (
    ATTACH,
    PLAIN,
    PLAN,
    RESULT,
    ROLES,
    START,
    STOPPED,
    TRUNCATED,
    Cell,
    Grid,
    Plan,
    Result,
    alike,
    plug_in,
    results,
)
from offramp.comparison.recipe import recipe, share_of
from offramp.comparison.rows import check_scores
from offramp.data import encode_labels
from offramp.engines import inputs_of, load_processor, record
from offramp.errors import OfframpError
from offramp.methods import METHODS
from offramp.metrics import default_metric
from offramp.model import MultiExitModel
from offramp.storage import LOCK, read_document, write_document, write_json
from offramp.table import ExitTable
from offramp.training import TrainOptions, attach, train
from offramp.training.preparing import encoded_rows, task_of
from offramp.training.probe import choose_pooling
from offramp.training.running import move

logger = logging.getLogger("offramp")

DEPTHS = (1.5, 2.0, 3.0, 4.0)
"""Depth divided by these is where smaller models are cut off."""
TICK = 10.0
"""Seconds after which it is noted how long a run has been training."""
HEAD_RATE = 1e-3
"""The least learning rate of what starts from nothing; it is ten times the other's or more."""


@dataclass(frozen=True)
class Work:
    """A run on its way.

    Attributes:
        folder: of the comparison.
        start: what it starts from; for starts the model itself.
        pooling: of exits that pool.
        device: where models are trained and recorded.
    """

    folder: Path
    plan: Plan
    cell: Cell
    start: Path
    pooling: str | None
    device: str

    @property
    def place(self) -> Path:
        return self.folder / "cells" / self.cell.name

    def rows(self, role: str) -> Dataset:
        return load_from_disk(str(self.folder / "rows" / role))

    @property
    def options(self) -> TrainOptions:
        method, rate = self.cell.method, self.cell.rate
        epochs = self.plan.start_epochs if method == START else self.plan.epochs
        return TrainOptions(
            # stages may add up to more than the epochs asked for, which are equal for all
            epochs=epochs / max(1.0, share_of(method)) if method in METHODS else epochs,
            batch_size=self.plan.batch_size,
            learning_rate=rate,
            head_learning_rate=None if rate is None else rate * self._times,
            bf16=self.plan.bf16,
            seed=self.cell.seed,
            quiet=True,
        )

    @property
    def _times(self) -> float:
        """The learning rate of what starts from nothing over that of the model."""
        return max(10.0, HEAD_RATE / min(self.plan.rates))

    def train(self, output: Path, method: str, **options: Any) -> None:
        """`train` from the start, unless it was done before."""
        if output.is_dir():
            return
        with self._clock():
            train(
                self.start,
                self.rows("train"),
                output,
                method=method,
                options=self.options,
                problem_type=self.plan.problem_type,
                max_length=self.plan.max_length,
                **options,
            )

    def attach(self, output: Path) -> None:
        """`attach` on the start with its own settings, unless it was done before."""
        if output.is_dir():
            return
        options = TrainOptions(
            epochs=self.plan.epochs, bf16=self.plan.bf16, seed=self.cell.seed, quiet=True
        )
        with self._clock():
            attach(
                self.start,
                self.rows("train"),
                output,
                options=options,
                max_length=self.plan.max_length,
            )

    @property
    def _spent(self) -> Path:
        return self.place / "seconds.json"

    @property
    def seconds(self) -> float:
        """Of training so far, over all tries."""
        return float(json.loads(self._spent.read_text())) if self._spent.is_file() else 0.0

    @contextmanager
    def _clock(self) -> Iterator[None]:
        """Adds up seconds; a run that is killed loses the last TICK of them at most."""
        before, began, over = self.seconds, time.perf_counter(), threading.Event()

        def note() -> None:
            write_json(self._spent, before + time.perf_counter() - began)

        def tick() -> None:
            while not over.wait(TICK):
                note()

        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield
        finally:
            over.set()
            ticking.join()
            note()

    def record(self, model: MultiExitModel, role: str, name: str = "") -> ExitTable:
        """The exit table of a model, recorded unless it is there. Raises NonFiniteError."""
        path = self.place / f"{name}{role}"
        if not path.is_dir():
            processor = load_processor(self.start, model.backbone.reads)
            longest = self.plan.max_length or model.max_length
            rows = encode_labels(self.rows(role), task_of(model))
            encoded = inputs_of(processor).encode(rows, longest)
            record(model, encoded, path, role, processor=processor, progress=False)
        table = ExitTable.open(path)
        check_scores(table)
        return table

    def load(self, path: Path) -> MultiExitModel:
        model = MultiExitModel.from_pretrained(path)
        move(model, torch.device(self.device))
        return model

    def result(self, quality: float, **facts: Any) -> Result:
        return Result(
            **self.cell._asdict(),
            quality=quality,
            seconds=self.seconds,
            threads=torch.get_num_threads(),
            memory=_most_memory(),
            recipe=recipe(self.cell.method, self.plan.problem_type),
            **{"parameters_added": 0, "pooling": None, **facts},
        )


def run_cell(folder: Path, cell: Cell) -> Result:
    """Train, record and judge; what a killed run has done is kept."""
    run = _prepare(folder, cell)
    run.place.mkdir(parents=True, exist_ok=True)
    kind = {START: _start, PLAIN: _plain, TRUNCATED: _truncated}.get(cell.method, _method)
    # where a comparison was killed and goes on at once, the run it had begun may not be over yet
    with FileLock(run.place / LOCK):
        result = kind(run)
        write_document(run.place / RESULT, result)
    if cell.method != START:
        for model in run.place.glob("model*"):
            shutil.rmtree(model)
    return result


def _prepare(folder: Path, cell: Cell) -> Work:
    plan = read_document(Plan, folder / PLAN)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if cell.method == START:
        return Work(folder, plan, cell, Path(plan.model), None, device)
    done = results(folder)
    first = min(result.seed for result in done.values())
    seeds = tuple(dict.fromkeys((first, cell.seed)))
    grid = Grid(plan, (), seeds)
    # whoever begins this run has waited for all starts; those that are not there have failed
    start = grid.start_of(cell.seed, done, grid.tried(START, done))
    if start is None:
        raise OfframpError(f"{folder}: the start of seed {cell.seed} has not been trained.")
    path = folder / "cells" / start.cell.name / "model" if plan.fine_tunes else Path(plan.model)
    return Work(folder, plan, cell, path, plan.pooling or start.pooling, device)


def _start(run: Work) -> Result:
    path = run.start
    if run.plan.fine_tunes:
        path = run.place / "model"
        run.train(path, PLAIN, fresh_head=run.plan.fresh_head)
    model = run.load(path)
    pooling = run.plan.pooling
    if pooling is None:
        processor = load_processor(path, model.backbone.reads)
        rows = encoded_rows(run.rows("train"), model, processor, run.plan.max_length)
        pooling = choose_pooling(model, rows, run.cell.seed)
    return run.result(_full_score(run.record(model, "tune")), pooling=pooling)


def _plain(run: Work) -> Result:
    path = run.place / "model"
    run.train(path, PLAIN)
    model = run.load(path)
    tune, _ = (run.record(model, role) for role in ROLES)
    return run.result(_full_score(tune))


def _method(run: Work) -> Result:
    path = run.place / "model"
    name = run.cell.method
    if before := _trained_before(run):
        return before
    if name == ATTACH:
        run.attach(path)
    else:
        pools = hasattr(METHODS[name].exits, "pooling") and METHODS[name].measures_pooling
        pooling = {"pooling": run.pooling} if pools else {}
        run.train(path, name, fine_tuned=True, **pooling)
    model = run.load(path)
    tune, _ = (run.record(model, role) for role in ROLES)
    added = sum(leaf.numel() for leaf in model.exits.parameters())
    return run.result(
        _tune_area(name, tune), parameters_added=added, pooling=model.config.exits.get("pooling")
    )


def _trained_before(run: Work) -> Result | None:
    """The result of a run that differs in its policy alone, with its tables, if there is one."""
    before = next((one for one in results(run.folder).values() if _serves(one, run)), None)
    if before is None:
        return None
    logger.info("%s has trained the same exits; its tables are taken.", before.cell.name)
    name = run.cell.method
    for role in ROLES:
        table = ExitTable.open(run.folder / "cells" / before.cell.name / role)
        check_scores(table)
        if not (run.place / role).is_dir():
            table.save(run.place / role)
    quality = _tune_area(name, ExitTable.open(run.place / "tune"))
    changed = {"method": name, "recipe": recipe(name, run.plan.problem_type), "quality": quality}
    return before.model_copy(update=changed)


def _serves(result: Result, run: Work) -> bool:
    """Whether what a run trained, with its method as it is now, is what another would train."""
    same = result.cell != run.cell and alike(result.cell, run.cell)
    return same and result.recipe == recipe(result.method, run.plan.problem_type)


def _truncated(run: Work) -> Result:
    """Smaller models, as if each were an exit of the plain fine-tune."""
    plain = run.folder / "cells" / run.cell._replace(method=PLAIN).name
    whole = {role: ExitTable.open(plain / role) for role in ROLES}
    layers = cuts(whole["tune"].depth)
    smaller: dict[str, dict[int, ExitTable]] = {role: {} for role in ROLES}
    for layer in layers:
        path = run.place / f"model-{layer}"
        run.train(path, PLAIN, layers=layer)
        model = run.load(path)
        for role in ROLES:
            smaller[role][layer] = run.record(model, role, f"layers-{layer}-")
    for role in ROLES:
        together = _as_exits(whole[role], smaller[role])
        together.save(run.place / role)
    tune = ExitTable.open(run.place / "tune")
    return run.result(_tune_area(TRUNCATED, tune, layers), layers=layers)


def cuts(depth: int) -> tuple[int, ...]:
    """How many layers the smaller models have; none costs more than its share of the depth."""
    return tuple(sorted({max(1, int(depth / cut)) for cut in DEPTHS}))


def _as_exits(whole: ExitTable, smaller: dict[int, ExitTable]) -> ExitTable:
    """A table whose exits at these layers are models of their own."""
    scores, layer_cost = whole.scores.copy(), whole.columns["layer_cost"]
    exit_cost = whole.columns["exit_cost"].copy()
    for layer, table in smaller.items():
        scores[:, layer - 1] = table.scores[:, -1]
        total = table.columns["layer_cost"][:, -1] + table.columns["exit_cost"][:, -1]
        exit_cost[:, layer - 1] = np.maximum(0, total - layer_cost[:, layer - 1])
    columns = {**whole.columns, "scores": scores, "exit_cost": exit_cost}
    return ExitTable(whole.header, columns)


def _tune_area(method: str, tune: ExitTable, layers: tuple[int, ...] | None = None) -> float:
    """Of its best family of policies."""
    run = leaderboard.Run(method, 0, tune, tune, 0.0, 0, None, layers)
    found = leaderboard.choices(run, default_metric(tune.problem_type))
    return max(choice.tune_area for choice in found.values())


def _full_score(table: ExitTable) -> float:
    return default_metric(table.problem_type).score(table.scores[:, -1], np.asarray(table.labels))


def _most_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # there is none on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _stop_when_alone() -> None:
    """Stop with a checkpoint when the process that began this one has gone."""
    sys.stdin.read()  # ends when nobody holds the other end any more
    os.kill(os.getpid(), signal.SIGINT)


def main(arguments: Sequence[str]) -> int:
    """Exit codes: 0 done, 2 with one sentence why not, 130 stopped, to be continued."""
    folder, cell, *plugins = arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # a process that was started in the background may have been told to ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_stop_when_alone, daemon=True).start()
    try:
        for plugin in plugins:
            plug_in(plugin)
        run_cell(Path(folder), Cell(**json.loads(cell)))
    except OfframpError as problem:
        print(f"Error: {problem}")
        return 2
    except KeyboardInterrupt:
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
