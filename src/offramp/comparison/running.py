"""`compare`: train methods side by side on one model and one set of rows, and rank them."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from offramp.comparison.board import Board, Missing
from offramp.comparison.eligible import eligible
from offramp.comparison.leaderboard import Run, build_board
from offramp.comparison.markdown import to_markdown
from offramp.comparison.page import write_page
from offramp.comparison.plan import (
    ALL,
    ATTACH,
    PLAIN,
    PLAN,
    REFERENCES,
    ROLES,
    START,
    Cell,
    Grid,
    Plan,
    Result,
    open_plan,
    plug_in,
    results,
)
from offramp.comparison.recipe import recipe, share_of
from offramp.comparison.rows import check_labels, check_scores, cut, keep
from offramp.comparison.workers import Workers
from offramp.data import data_fingerprint
from offramp.data.tokens import load_tokenizer, token_limit
from offramp.errors import ConfigError, NonFiniteError, OfframpError
from offramp.methods import METHODS
from offramp.metrics import METRICS, default_metric
from offramp.model import Head, load_stock
from offramp.model.folder import is_ours, resolve
from offramp.storage import LOCK, alone_in, fingerprint_of_files, whole_file, write_document
from offramp.table import ExitTable
from offramp.training.options import warn_of_slow_bf16
from offramp.training.preparing import Columns, Data, check_pooling, head_for, read_examples

logger = logging.getLogger("offramp")

RATES = (1e-4, 3e-4)
EPOCHS, BATCH = 2.0, 32
TUNE, TEST = 0.2, 0.2
LEADERBOARD = "leaderboard"
NOT_YET = "not done yet"


@dataclass(frozen=True, slots=True)
class Compared:
    """What `compare` has so far.

    Attributes:
        board: None while too little is done to rank.
        folder: of the runs and of leaderboard.html, .md and .json.
        complete: whether every run is done.
    """

    board: Board | None
    folder: Path
    complete: bool
    missing: tuple[Missing, ...]


def compare(
    model: str | os.PathLike[str],
    data: Data,
    output: str | os.PathLike[str],
    *,
    methods: Sequence[str] = (ALL,),
    seeds: int = 3,
    budget: float | None = None,
    epochs: float = EPOCHS,
    start_epochs: float | None = None,
    batch_size: int = BATCH,
    rates: Sequence[float] = RATES,
    bf16: bool | None = None,
    pooling: str | None = None,
    reference: str | None = None,
    metric: str | None = None,
    eval_data: Data | None = None,
    eval_split: str | None = None,
    test_data: Data | None = None,
    test_split: str | None = None,
    tune_share: float = TUNE,
    test_share: float = TEST,
    problem_type: str | None = None,
    fresh_head: bool = False,
    max_length: int | None = None,
    split: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    image: str | None = None,
    label: str | None = None,
    max_rows: int | None = None,
    title: str | None = None,
    workers: int | None = None,
    plugins: Sequence[str] = (),
    quiet: bool = False,
) -> Compared:
    """Train methods of early exit from one start and say which is best on rows of test.

    Every seed fine-tunes the model once, without exits (a classifier for these labels is taken
    as it is), and every method goes on from there with equal epochs and equal learning rates,
    the best of which is chosen on `tune` rows with the first seed. Policies and thresholds are
    chosen on `tune`, too; test rows are only read. Runs go in processes of their own, on one
    core each. The same call goes on with what is not done yet, and more methods or seeds may be
    asked for; leaderboard.html, .md and .json are written anew each time.

    Args:
        model: folder or hub id of a pretrained encoder or of a classifier.
        data: labelled examples, see `load_examples`.
        output: folder of the comparison.
        methods: names of methods; `plain` (fine-tuned on without exits, what all are measured
            by), `truncated` (the first layers alone), `attach` (exits on the frozen start);
            `all` is all of these that do the task and fit the model's layers.
        seeds: how many, counted from 1.
        budget: seconds after which runs are stopped, to be continued by the next call.
        epochs, batch_size: of every method.
        start_epochs: of the fine-tune that all start from; by default as many.
        rates: learning rates to try; what starts from nothing takes ten times as much, or as many
            times as make 0.001 of the least of them.
        bf16: train in bfloat16; else where a GPU supports it.
        pooling: of exits that pool; without it a probe of the start decides for all methods
            that leave it open.
        reference: the method that others are compared with; else `auto` or the best on `tune`.
        metric: see `calibrate`; learning rates are chosen by the task's own.
        eval_data, eval_split: rows to choose on; else `tune_share` of the data.
        test_data, test_split: rows to rank on; else `test_share` of the data.
        problem_type, fresh_head, max_length: see `train`.
        split, text, text_pair, image, label: see `load_examples`.
        max_rows: to train on.
        title: of the leaderboard; else the name of the data.
        workers: processes at once; else one per core, as memory allows, or one on a GPU.
        plugins: modules to import first, which register methods of your own.

    Raises:
        OfframpError: before the work starts, wherever that can be known.
    """
    _plug_in(plugins)
    _check_numbers(seeds, workers, rates, (epochs, start_epochs, batch_size, max_length, budget))
    if metric is not None:
        METRICS[metric]
    check_pooling(pooling)
    _check_folder(folder := Path(output))
    columns = Columns(split, text, text_pair, image, label)
    given = {
        "tune": _others(data, eval_data, eval_split, columns),
        "test": _others(data, test_data, test_split, columns),
    }
    parts, left_out = cut(
        read_examples(data, columns), given, {"tune": tune_share, "test": test_share}, max_rows
    )
    warn_of_slow_bf16(bf16)
    source = resolve(model)
    head = _head(source, parts["train"], problem_type, fresh_head)
    plan = _plan(
        source,
        parts,
        head,
        title=title or _title(data),
        max_length=max_length,
        fresh_head=fresh_head,
        start_epochs=epochs if start_epochs is None else start_epochs,
        epochs=epochs,
        batch_size=batch_size,
        rates=_as_named(rates),
        bf16="auto" if bf16 is None else bf16,
        pooling=pooling,
    )
    names = eligible(methods, plan.problem_type, load_stock(source, head), pooling)
    grid = Grid(plan, names, tuple(range(1, seeds + 1)))
    _check_ranking(grid, reference, metric)
    told = _told(left_out, metric, plan.problem_type)
    deadline = None if budget is None else time.monotonic() + budget
    crew = Workers(folder, workers, deadline, plugins, quiet)
    with alone_in(folder, "Another comparison"):
        open_plan(folder, plan)
        _check_recipes(folder, grid.methods, plan.problem_type)
        keep(folder, parts)
        crew.failed |= _broken(folder, grid.methods)
        crew.run(grid)
        return _conclude(folder, grid, crew, told, reference, metric)


def _as_named(rates: Sequence[float]) -> tuple[float, ...]:
    """Learning rates as the folders of runs are named by them, rising."""
    return tuple(sorted({float(f"{rate:g}") for rate in rates}))


def _plug_in(plugins: Sequence[str]) -> None:
    """Import them. Raises ConfigError, also for names that a grid cannot tell from its own."""
    for plugin in plugins:
        plug_in(plugin)
    for name in (START, ALL, *REFERENCES):
        if name in METHODS:
            raise ConfigError(
                f"A method is named '{name}', which compare means something else by. Register it "
                "under another name."
            )


def _head(source: Path, rows: Dataset, problem_type: str | None, fresh: bool) -> Head | None:
    """The head that starts have to learn first, if any."""
    if is_ours(source):
        raise ConfigError(f"{source} has exits already; compare starts from a stock model.")
    return head_for(source, rows, problem_type, fresh)


def _check_length(source: Path, rows: Dataset, longest: int | None) -> None:
    """Refuse rows so short that special tokens alone fill them. Raises ConfigError."""
    if longest is not None and "text" in rows.column_names:
        token_limit(load_tokenizer(source), longest, pairs="text_pair" in rows.column_names)


def _plan(source: Path, rows: dict[str, Dataset], head: Head | None, **settings: Any) -> Plan:
    _check_length(source, rows["train"], settings["max_length"])
    return Plan(
        model=str(source),
        model_fingerprint=_weights(source),
        rows={role: data_fingerprint(part) for role, part in rows.items()},
        counts={role: len(part) for role, part in rows.items()},
        problem_type=check_labels(rows, source, head).problem_type,
        fine_tunes=head is not None,
        **settings,
    )


def _others(data: Data, given: Data | None, split: str | None, columns: Columns) -> Dataset | None:
    """Rows that are given apart from the others."""
    if given is None and split is None:
        return None
    return read_examples(data if given is None else given, replace(columns, split=split))


def _told(left_out: Sequence[str], metric: str | None, problem_type: str) -> dict[str, str]:
    """Facts of a leaderboard that are known before anything runs."""
    for one in left_out:
        logger.warning("Rows left out: %s.", one)
    own = default_metric(problem_type).name
    by = {"learning rates": f"chosen by {own}, the task's own metric, and not by {metric}"}
    return {
        **({"rows left out": ", ".join(left_out)} if left_out else {}),
        **(by if metric not in (None, own) else {}),
    }


def _conclude(
    folder: Path,
    grid: Grid,
    crew: Workers,
    told: dict[str, str],
    reference: str | None,
    metric: str | None,
) -> Compared:
    """Write the leaderboard of what is done."""
    done = crew.done()
    runs, missing = [], []
    for method in dict.fromkeys((PLAIN, *grid.methods)):
        found = recorded(folder, grid, method, done, crew.failed)
        runs += found
        there = {run.seed for run in found}
        missing += _missing(method, [seed for seed in grid.seeds if seed not in there], crew)
    complete = not missing
    if not any(run.method != PLAIN for run in runs):
        return Compared(None, folder, complete, tuple(missing))
    board = build_board(
        runs,
        title=grid.plan.title,
        facts=_facts(grid, done, crew.failed) | told,
        reference=reference if any(run.method == reference for run in runs) else None,
        missing=missing,
        metric=metric,
    )
    write_document(folder / f"{LEADERBOARD}.json", board)
    with whole_file(folder / f"{LEADERBOARD}.md") as file:
        file.write_text(to_markdown(board), encoding="utf-8")
    write_page(board, folder / f"{LEADERBOARD}.html")
    return Compared(board, folder, complete, tuple(missing))


def _broken(folder: Path, methods: Sequence[str]) -> dict[Cell, str]:
    """Runs from before scores that are not finite were a failure."""
    found = {}
    for cell in [cell for cell in results(folder) if cell.method in methods]:
        try:
            for role in ROLES:
                check_scores(ExitTable.open(folder / "cells" / cell.name / role))
        except NonFiniteError as problem:
            found[cell] = str(problem)
    return found


def recorded(
    folder: Path,
    grid: Grid,
    method: str,
    done: Mapping[Cell, Result],
    failed: Iterable[Cell] = (),
) -> list[Run]:
    """The runs of a method that count, with their tables."""
    found = []
    for seed, result in grid.chosen(method, done, failed).items():
        place = folder / "cells" / result.cell.name
        tune, test = (ExitTable.open(place / role) for role in ROLES)
        found.append(
            Run(
                method,
                seed,
                tune,
                test,
                seconds=result.seconds,
                parameters_added=result.parameters_added,
                learning_rate=result.rate,
                layers=result.layers,
                threads=result.threads,
            )
        )
    return found


def _missing(method: str, seeds: Sequence[int], crew: Workers) -> list[Missing]:
    reasons = {cell.seed: why for cell, why in crew.failed.items() if cell.method == method}
    starts = [f"{cell.name}: {why}" for cell, why in crew.failed.items() if cell.method == START]
    fallback = f"waits for {'; '.join(starts)}" if starts else NOT_YET
    return [Missing(method=method, seed=s, why=reasons.get(s, fallback)) for s in seeds]


def _facts(grid: Grid, done: Mapping[Cell, Result], failed: Mapping[Cell, str]) -> dict[str, str]:
    plan = grid.plan
    gone = {"runs that failed": "; ".join(f"{one.name}: {why}" for one, why in failed.items())}
    counts = ", ".join(f"{number:,} {role}" for role, number in plan.counts.items())
    starts = [grid.start_of(seed, done, failed) for seed in grid.seeds]
    probed = sorted({start.pooling for start in starts if start and start.pooling})
    begun = "a fine-tune of each seed" if plan.fine_tunes else "the classifier itself"
    return {
        "model": _name_of(plan.model),
        "rows": counts,
        "start": f"{begun}, {plan.start_epochs:g} epochs" if plan.fine_tunes else begun,
        "each method": f"{plan.epochs:g} epochs in batches of {plan.batch_size}, learning rate "
        f"the best on tune of {', '.join(f'{rate:g}' for rate in plan.rates)}" + _exceptions(grid),
        "pooling": plan.pooling or ", ".join(probed) or "not chosen",
        **(gone if failed else {}),
    }


def _exceptions(grid: Grid) -> str:
    """What is not equal for all methods."""
    found = ["attach with a learning rate of its own"] if ATTACH in grid.methods else []
    for name in METHODS:
        if name in grid.methods:
            share = share_of(name)  # what is above 1 is made up for in training
            if share < 1 and not math.isclose(share, 1):
                found.append(f"{name} {share * grid.plan.epochs:.3g} epochs")
    return f" (but {', '.join(found)})" if found else ""


def _name_of(model: str) -> str:
    """That of a folder, or of the model whose snapshot it is in the hub's cache."""
    kept = [part for part in Path(model).parts if part.startswith("models--")]
    return kept[-1][len("models--") :].replace("--", "/") if kept else Path(model).resolve().name


def _check_numbers(
    seeds: int, workers: int | None, rates: Sequence[float], others: Sequence[float | None]
) -> None:
    """Refuse what no run could be trained with. Raises ConfigError."""
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}; there must be one at least.")
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers is {workers}; there must be one at least.")
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ConfigError("Learning rates must be positive numbers, one at least.")
    if not all(0 < one < math.inf for one in others if one is not None):
        raise ConfigError(
            "Epochs, batch size, the greatest length and the budget must be positive numbers."
        )


def _check_ranking(grid: Grid, reference: str | None, metric: str | None) -> None:
    """Refuse what the methods cannot be ranked by. Raises ConfigError."""
    if metric is not None:
        METRICS[metric].check(grid.plan.problem_type)
    known = grid.methods[1:]
    if reference is not None and reference not in known:
        raise ConfigError(
            f"The reference '{reference}' is not among the methods: {', '.join(known)}."
        )


def _check_folder(folder: Path) -> None:
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give the name of a folder.")
    there = {one.name for one in folder.iterdir()} if folder.is_dir() else set()
    if there - {LOCK} and PLAN not in there:
        raise ConfigError(f"{folder} is not empty and holds no comparison. Give another --output.")


def _check_recipes(folder: Path, methods: Sequence[str], problem_type: str) -> None:
    """Refuse runs of methods that have been changed since. Raises ConfigError."""
    known = {method: recipe(method, problem_type) for method in methods}
    changed = [
        str(folder / "cells" / cell.name)
        for cell, result in results(folder).items()
        if cell.method in known and result.recipe not in (None, known[cell.method])
    ]
    if changed:
        raise ConfigError(
            f"Exits, objective or policy of a method have changed since it was run: delete "
            f"{', '.join(changed)} to train it anew, or give another --output."
        )


def _title(data: Any) -> str:
    if isinstance(data, Dataset):
        return "a data set"
    return Path(str(data)).name.partition(".")[0] or str(data)


def _weights(source: Path) -> str:
    """A name for a checkpoint's weights."""
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise OfframpError(f"{source}: no safetensors file here.")
    return fingerprint_of_files(source / "config.json", *files)
