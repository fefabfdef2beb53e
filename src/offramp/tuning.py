"""`tune`: exits, an exit table, an operating point and what it is worth, in one call."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset

from offramp.backbones import Batch
from offramp.calibration import Calibration, Target, choose
from offramp.calibration.certificate import Procedure
from offramp.calibration.certifying import DEMAND, proven_on
from offramp.calibration.frontier import ALL, PolicySpec
from offramp.data import (
    data_fingerprint,
    drop_overlap,
    encode_labels,
    load_examples,
    names_source,
)
from offramp.data.hashing import dataset_ids, draws
from offramp.data.memory import take
from offramp.engines import (
    Engine,
    check_backend,
    load_processor,
    plan_batches,
    processor_fingerprint,
    record,
)
from offramp.engines.recording import label_names
from offramp.errors import ConfigError, DataError, OfframpError
from offramp.evaluation import Evaluation, Speed, evaluate, measure_speed
from offramp.exits import Pooling
from offramp.model import MultiExitModel
from offramp.model.folder import is_ours, resolve
from offramp.policies import POLICIES, Full, Policy, make_policy
from offramp.prediction import Predictor
from offramp.prediction.stream import rows_of_examples
from offramp.report import write_picture, write_report
from offramp.storage import Strict, read_document, write_document
from offramp.table import ExitTable
from offramp.training import TrainOptions, attach
from offramp.training.preparing import task_of, weights_fingerprint

logger = logging.getLogger("offramp")

Facts = dict[str, str]
RECIPE = "tune.json"
FEW = 8
COLUMNS = ("text", "text_pair", "image", "label", "max_rows")
SPEED_ROWS, SPEED_BATCH, SPEED_PASSES, SPEED_SECONDS = 512, 32, 5, 20.0


class Recipe(Strict):
    """How `tune` made a model: `tune.json` beside its weights.

    Attributes:
        source: fingerprint of the classifier's weights.
        data: fingerprint of the rows its exits were trained on.
        processor: fingerprint of what makes numbers of them.
        tune_share, seed: how rows were kept from training; None where they were given apart.
        made: fingerprint of the result.
    """

    schema_version: Literal[1] = 1
    source: str
    data: str
    processor: str
    tune_share: float | None
    seed: int
    pooling: str | None
    options: dict[str, Any]
    made: str = ""


@dataclass(frozen=True, slots=True)
class Tuned:
    """What `tune` made.

    Attributes:
        folder: the multi-exit model with its operating point.
        table: the exit table the point was chosen on; `calibrate` chooses others in seconds.
        evaluation: the point on the rows it was chosen on.
        speed: measured on a sample of these rows; None if not asked for.
        report: one HTML file that shows all of it; beside the folder, never in it, since it may
            hold texts and the folder may be released.
    """

    folder: Path
    table: Path
    calibration: Calibration
    evaluation: Evaluation
    speed: Speed | None
    report: Path


def tune(
    model: str | os.PathLike[str],
    data: str | Path | Dataset,
    output: str | os.PathLike[str] | None = None,
    *,
    target_speedup: float | None = None,
    max_drop: float | str | None = None,
    max_disagreement: float | str | None = None,
    metric: str | None = None,
    per_class: bool = False,
    policies: Sequence[PolicySpec] | None = None,
    name: str = "default",
    sets: float | str | None = None,
    temperatures: bool = False,
    max_risk: float | str | None = None,
    risk: str | None = None,
    confidence: float | str | None = None,
    procedure: Procedure = "fixed_sequence",
    eval_data: str | Path | Dataset | None = None,
    eval_split: str | None = None,
    tune_share: float = 0.2,
    seed: int = 0,
    pooling: Pooling | None = None,
    options: TrainOptions | None = None,
    device: Any = None,
    dtype: Any = None,
    backend: str = "torch",
    speed: bool = True,
    examples: bool = True,
    split: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    image: str | None = None,
    label: str | None = None,
    max_rows: int | None = None,
) -> Tuned:
    """Give a classifier exits and an operating point, and say what it is worth.

    Exits are trained on one part of the data and the point is chosen on another, cut by a
    hash of the input. Rows that the classifier was trained on are fine for the former, but
    flatter the choice: better give new ones as `eval_data`. A model that has exits keeps
    them, and all data serve the choice. The same call again continues after a kill, and
    repeats only what its arguments change.

    Args:
        model: folder or hub id of a classifier, or of a multi-exit model.
        data: inputs like those the model will see, see `load_examples`; labels only help.
        output: folder to write, by default `<model's name>-offramp`; a model that has exits
            gets the point in its own folder.
        target_speedup, max_drop, max_disagreement, max_risk: exactly one, see `calibrate`.
        risk, metric, per_class, policies, name, sets, temperatures: see `calibrate`.
        confidence, procedure: promise the limit; half of the rows to choose on are then for the
            proof, see `certify`.
        eval_data, eval_split: rows to choose on, instead of a part of `data`; a split alone
            is one of `data`.
        tune_share: of the rows, kept from training to choose on.
        seed: of that cut.
        pooling, options: see `attach`.
        device: None is the first GPU, or the CPU where there is none.
        dtype, backend: how the model will run, see `Predictor.load`; the point is chosen and
            timed so. Exits are trained with torch in any case.
        speed: also measure the speed-up.
        examples: show some of the rows, with their texts, in the report.
        split, text, text_pair, image, label, max_rows: see `load_examples`.

    Raises:
        OfframpError: before the work starts, wherever that can be known.
    """
    given = dict(locals())
    demand = {name: given[name] for name in DEMAND}
    columns = {name: given[name] for name in COLUMNS}
    Target.of(target_speedup, max_drop, max_disagreement, per_class, max_risk, risk)
    how = {"device": device, "dtype": dtype, "backend": backend}
    check_backend(**how)
    source = resolve(model)
    loaded = MultiExitModel.from_pretrained(source)
    apart = eval_data is not None or eval_split is not None
    share = None if is_ours(source) or apart else tune_share
    rows = _load(loaded, data, split=split, **columns)
    parts = {"train": rows, "tune": rows}
    if apart:
        elsewhere = data if eval_data is None else eval_data
        parts["tune"] = _unseen(_load(loaded, elsewhere, split=eval_split, **columns), rows)
    elif share is not None:
        parts = _cut(rows, share, seed)
    signals = _signals_for(policies) if is_ours(source) else []
    _rehearse(loaded, "label" in parts["tune"].column_names, demand, signals)
    if is_ours(source):
        folder = _own_folder(source, output)
        _refuse_training(source, pooling, options)
    else:
        folder = Path(output or f"{Path(model).absolute().name}-offramp")
        wanted = Recipe(
            source=weights_fingerprint(loaded.stock),
            data=data_fingerprint(parts["train"]),
            processor=processor_fingerprint(load_processor(source, loaded.backbone.reads)),
            tune_share=share,
            seed=seed,
            pooling=pooling,
            options=(options or TrainOptions()).what_changes_weights(),
        )
        _attach(source, parts["train"], folder, wanted, options)
    return _choose(folder, parts["tune"], demand, how, speed, examples)


def _load(model: MultiExitModel, data: str | Path | Dataset, **columns: Any) -> Dataset:
    """Examples with the model's label numbers."""
    rows = load_examples(data, **columns)
    with names_source(data):
        return encode_labels(rows, task_of(model))


def _unseen(others: Dataset, rows: Dataset) -> Dataset:
    """Those that are not trained on."""
    kept, dropped = drop_overlap(others, rows)
    if dropped:
        logger.warning("%d rows to choose on are also trained on and were dropped.", dropped)
    return kept


def _choose(
    folder: Path,
    rows: Dataset,
    demand: dict[str, Any],
    how: dict[str, Any],
    speed: bool,
    examples: bool,
) -> Tuned:
    """Record, calibrate, save the point, measure it and report."""
    predictor = Predictor.load(folder, "full", **how)
    place = folder.with_name(f"{folder.name}.tune")
    table = _record(predictor, rows, place)
    found = choose(table, **demand, progress=True)
    found.point.save(folder)
    write_picture(folder, found)
    table = proven_on(table, found.point)  # figures are not of rows that were searched on
    policy = found.point.build_policy()
    clock = speed_on(predictor, rows, policy) if speed and found.pays else None
    report = write_report(
        folder.with_name(f"{folder.name}.report.html"),
        table,
        found.point,
        title=folder.name,
        rows=rows,
        examples=examples,
        speed=clock,
        made=facts_of(predictor, clock),
    )
    return Tuned(folder, place, found, evaluate(table, found.point), clock, report)


def facts_of(predictor: Predictor, speed: Speed | None, threads: int | None = None) -> Facts:
    """What a report says of the model, and of the machine if it was timed."""
    model = predictor.model
    facts = {
        "architecture": f"{model.config.stock['model_type']}, "
        f"{model.num_parameters() / 1e6:.1f} million parameters",
        "method": model.config.method,
    }
    if speed is not None:
        where = f"{platform.machine()} CPU, {threads or torch.get_num_threads()} threads"
        if model.device.type == "cuda":
            where = torch.cuda.get_device_name(model.device)
        engine = predictor.engine
        how = "" if engine.name == "torch" else f", {engine.name} in {engine.dtype}"
        facts["timed on"] = f"{where}{how}, batches of up to {SPEED_BATCH} rows"
    return facts


def _cut(rows: Dataset, share: float, seed: int) -> dict[str, Dataset]:
    """As `split_examples`, but independent of a cut with it that made `rows`."""
    if not 0 < share < 1:
        raise ConfigError(f"--tune-share is {share:g}; it must lie between 0 and 1.")
    chosen_on = draws(dataset_ids(rows), seed, "tune") < share
    if chosen_on.all() or not chosen_on.any():
        raise DataError(
            f"{len(rows)} rows are too few to train exits on one part and choose on {share:.0%}. "
            "Give more rows, or rows to choose on as --eval-data."
        )
    return {
        "train": take(rows, np.flatnonzero(~chosen_on)),
        "tune": take(rows, np.flatnonzero(chosen_on)),
    }


def _signals_for(policies: Sequence[PolicySpec] | None) -> list[str]:
    """What the policies of a search read; whether a model's exits give it, its table will tell."""
    needs = [
        POLICIES[spec].signals if isinstance(spec, str) else make_policy(spec).needs
        for spec in policies or ()
        if spec != ALL
    ]
    return sorted({name for needed in needs for name in needed})


def _rehearse(
    model: MultiExitModel, labelled: bool, demand: dict[str, Any], signals: Sequence[str]
) -> None:
    """Let a table of few rows tell now what `choose` would refuse in the end."""
    width = len(label_names(model))
    multi = model.problem_type == "multi_label_classification"
    labels: np.ndarray = np.zeros((FEW, width) if multi else FEW, dtype=np.int64)
    if model.problem_type == "regression":
        labels = np.arange(FEW, dtype=np.float64)  # scores that differ, as real ones do
    rehearsed = ExitTable.from_arrays(
        np.random.default_rng(0).normal(size=(FEW, model.depth, width)),
        problem_type=model.problem_type,
        labels=labels if labelled else None,
        signals={name: np.full((FEW, model.depth), 0.5) for name in signals},
    )
    # everything takes a while, and is refused nothing
    some = [spec for spec in demand["policies"] or () if spec != ALL]
    choose(rehearsed, **demand | {"policies": some or None})


def _own_folder(source: Path, output: str | os.PathLike[str] | None) -> Path:
    if output is not None and Path(output).resolve() != source.resolve():
        raise ConfigError(
            f"{source} has exits already, so its point is written beside its weights; leave "
            "--output out."
        )
    return source


def _refuse_training(source: Path, pooling: str | None, options: TrainOptions | None) -> None:
    """Exits that are there are not trained; what changes no weights may be given all the same."""
    asked = (options or TrainOptions()).what_changes_weights()
    usual = TrainOptions().what_changes_weights()
    changed = ["pooling"] if pooling is not None else []
    changed += [name for name in asked if name != "seed" and asked[name] != usual[name]]
    if changed:
        raise ConfigError(
            f"{source} has exits already, and they are not trained again: leave "
            f"{', '.join(changed)} out, or start from the classifier that they hang on."
        )


def _attach(
    source: Path, rows: Dataset, folder: Path, wanted: Recipe, options: TrainOptions | None
) -> None:
    """Hang exits on the classifier, unless that has been done."""
    if _made_as(folder, wanted):
        logger.info("%s has these exits already: going on from there.", folder)
        return
    pooling: Any = wanted.pooling
    model = attach(source, rows, folder, pooling=pooling, options=options)
    made = wanted.model_copy(update={"made": model.fingerprint()})
    write_document(folder / RECIPE, made)


def _made_as(folder: Path, wanted: Recipe) -> bool:
    try:
        found = read_document(Recipe, folder / RECIPE)
        same = found.model_copy(update={"made": ""}) == wanted
        return same and MultiExitModel.from_pretrained(folder).fingerprint() == found.made
    except OfframpError:
        return False


def _record(predictor: Predictor, rows: Dataset, place: Path) -> ExitTable:
    """The exit table of these rows, recorded unless it is there."""
    model, processor = predictor.model, predictor.processor
    wanted = {
        "role": "tune",
        "model_fingerprint": model.fingerprint(),
        "processor_fingerprint": processor_fingerprint(processor),
        "data_fingerprint": data_fingerprint(rows),
        "engine": predictor.engine.name,
        "dtype": predictor.engine.dtype,
    }
    try:
        table = ExitTable.open(place)
        if all(getattr(table.header, name) == value for name, value in wanted.items()):
            table.check_content()
            logger.info("%s holds these rows already.", place)
            return table
    except OfframpError:
        pass
    return record(model, rows, place, "tune", processor=processor, engine=predictor.engine)


def speed_on(predictor: Predictor, rows: Dataset, policy: Policy) -> Speed:
    """Measured speed-up on a sample of examples, in batches as `predict` makes them.

    As many batches as take about 20 seconds in all, at most 512 rows.
    """
    order = np.argsort(draws(dataset_ids(rows), 0, "speed"), kind="stable")
    batches = _batches(predictor, take(rows, order[:SPEED_ROWS]))
    engine = predictor.engine
    count = _affordable(engine, batches)
    # every so many of the batches, so that long and short rows are timed
    spread = np.unique(np.linspace(0, len(batches) - 1, count).round().astype(int))
    timed = [batches[place] for place in spread]
    return measure_speed(engine, predictor.model, timed, policy, SPEED_PASSES)


def _batches(predictor: Predictor, rows: Dataset) -> list[Batch]:
    items, _ = predictor.items.read([item for _, item in rows_of_examples(rows)])
    return [
        predictor.items.batch([items[place] for place in places], predictor.model.device)
        for places in plan_batches([item.length for item in items], SPEED_BATCH)
    ]


def _affordable(engine: Engine, batches: list[Batch]) -> int:
    """How many batches of typical length fit the time, one at least."""
    typical = batches[len(batches) // 2]
    engine.run(typical, Full())
    began = time.perf_counter()
    engine.run(typical, Full())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    contenders = 3
    return max(1, min(len(batches), int(SPEED_SECONDS / (seconds * contenders * SPEED_PASSES))))
