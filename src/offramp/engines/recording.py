"""Record every exit's answer on a set of rows, once, into an exit table on disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from offramp.data import data_fingerprint, encode_labels, infer_task
from offramp.data.hashing import dataset_ids
from offramp.engines.base import Engine
from offramp.engines.batching import MAX_ROWS, MAX_TOKENS, plan_batches
from offramp.engines.cost import cost_model
from offramp.engines.inputs import Inputs, inputs_of
from offramp.engines.torch_engine import TorchEngine
from offramp.errors import ConfigError, DataError
from offramp.exits import ExitOutput
from offramp.metrics import METRICS, REGRESSION, predictions
from offramp.model import MultiExitModel
from offramp.table import ExitTable, TableHeader, TableWriter

logger = logging.getLogger("offramp")

Array = npt.NDArray[Any]


def record(
    model: MultiExitModel,
    dataset: Dataset,
    path: str | Path,
    role: str,
    *,
    processor: Any,
    engine: Engine | None = None,
    others: Sequence[ExitTable] = (),
    max_rows: int = MAX_ROWS,
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
) -> ExitTable:
    """Run every layer and every exit on all rows and stream the answers into a table folder.

    Scores that are not finite are recorded as they are; replay flags their rows.

    Args:
        model: in evaluation mode, on its device, in its compute dtype.
        dataset: examples as `load_examples` gives them, labels optional; or the same with
            `encode_labels` and `encode` already applied.
        path: the table's folder; it appears whole or not at all.
        role: `tune`, `calibrate` or `test`.
        processor: the model's tokenizer or image processor.
        engine: what runs the model; a point chosen on the table is for it. None is torch.
        others: tables of other roles; rows whose input is in one of them are dropped.
        max_rows: of a batch.
        max_tokens: of a batch, padding included.

    Raises:
        ConfigError: the model is in training mode, where dropout makes scores random.
        DataError: there are no rows, or a row or label is not usable.
        OutputError: the folder cannot be written, or the disk is too small.
    """
    if model.training:
        raise ConfigError("The model is in training mode. Call model.eval() first.")
    if not len(dataset):
        raise DataError("There are no rows to record. Give at least one.")
    inputs = inputs_of(processor)
    dataset, ids = _apart_from(others, _encoded(model, dataset, inputs), role)
    lengths = np.array(dataset["length"][:])
    labels = np.array(dataset["label"][:]) if "label" in dataset.column_names else None
    engine = engine or TorchEngine(model)
    header = _header(model, engine, dataset, role, inputs)
    costs = cost_model(model)
    with TableWriter(path, header) as writer, _bar(len(dataset), role, progress) as bar:
        for rows in plan_batches(lengths, max_rows, max_tokens):
            columns = _columns(_run(engine, model.device, dataset, rows, inputs))
            if labels is not None:
                columns["labels"] = labels[rows]
            writer.write(
                rows,
                ids=ids[rows],
                lengths=lengths[rows],
                layer_cost=costs.layers(lengths[rows]),
                exit_cost=costs.exits(lengths[rows]),
                **columns,
            )
            bar.update(len(rows))
    table = ExitTable.open(path)
    if table.labels is not None:
        names = table.header.label_names
        warn_below_majority(table.scores[:, -1], table.labels, table.problem_type, names)
    return table


def _encoded(model: MultiExitModel, dataset: Dataset, inputs: Inputs) -> Dataset:
    if "length" in dataset.column_names:
        return dataset
    task = infer_task(dataset, model.problem_type, dict(enumerate(label_names(model))))
    return inputs.encode(encode_labels(dataset, task), model.max_length)


def _apart_from(others: Sequence[ExitTable], dataset: Dataset, role: str) -> tuple[Dataset, Array]:
    """The rows whose input is in no other table, and their ids."""
    ids = dataset_ids(dataset)
    taken = [other.ids for other in others]
    keep = ~np.isin(ids, np.concatenate(taken)) if taken else np.ones(len(ids), dtype=bool)
    dropped = int((~keep).sum())
    if dropped == len(ids):
        raise DataError(
            f"All {dropped} rows are also in the "
            f"{', '.join(sorted({o.header.role for o in others}))} table. Give other rows."
        )
    if not dropped:
        return dataset, ids
    logger.warning(
        "%d of %d rows were dropped from '%s': their input is in a table of another role.",
        dropped,
        len(ids),
        role,
    )
    return dataset.select(np.flatnonzero(keep)), ids[keep]


def _header(
    model: MultiExitModel, engine: Engine, dataset: Dataset, role: str, inputs: Inputs
) -> TableHeader:
    probe = _columns(_run(engine, model.device, dataset, np.array([0]), inputs))
    _, depth, num_scores = probe["scores"].shape
    return TableHeader.plan(
        rows=len(dataset),
        depth=depth,
        num_scores=num_scores,
        problem_type=model.problem_type,
        labelled="label" in dataset.column_names,
        signals={n[8:]: c.shape[2:] for n, c in probe.items() if n.startswith("signals.")},
        role=role,
        label_names=label_names(model),
        model_fingerprint=model.fingerprint(),
        processor_fingerprint=inputs.fingerprint(),
        data_fingerprint=data_fingerprint(dataset),
        engine=engine.name,
        dtype=engine.dtype,
    )


def _run(
    engine: Engine, device: torch.device, dataset: Dataset, rows: Array, inputs: Inputs
) -> tuple[ExitOutput, ...]:
    """What every exit says about row indices `rows`."""
    names = [name for name in inputs.columns if name in dataset.column_names]
    columns = dataset.select_columns(names)[rows.tolist()]
    return engine.all_exits(inputs.collate(columns, device))


def _columns(outputs: Sequence[ExitOutput]) -> dict[str, Array]:
    """Scores and signals of all exits, float32 (rows, depth, ...), by column name."""
    stacked = {"scores": [output.scores for output in outputs]}
    for name in outputs[0].signals:
        stacked[f"signals.{name}"] = [output.signals[name] for output in outputs]
    return {name: torch.stack(parts, 1).float().cpu().numpy() for name, parts in stacked.items()}


def label_names(model: MultiExitModel) -> tuple[str, ...]:
    """The names of the model's labels, in the order of its scores."""
    names = {int(index): str(name) for index, name in (model.config.id2label or {}).items()}
    return tuple(names[index] for index in sorted(names))


def processor_fingerprint(processor: Any) -> str:
    """A name for how examples become numbers."""
    return inputs_of(processor).fingerprint()


def _bar(rows: int, role: str, progress: bool) -> Any:
    # disable=None: no bar where nobody watches, as in a log file
    return tqdm(total=rows, desc=f"record {role}", unit="row", disable=None if progress else True)


def warn_below_majority(
    scores: Array, labels: Array, problem_type: str, names: Sequence[str]
) -> None:
    """Warn where full depth is no better than no model at all; rows of one class cannot tell.

    Args:
        scores: at full depth, (rows, classes).
        labels: (rows,), or (rows, classes) of many labels.
    """
    if problem_type == REGRESSION:
        return
    right = METRICS["accuracy"].compare(predictions(scores, problem_type), labels)
    majority = np.unique(labels, axis=0, return_counts=True)[1].max() / len(labels)
    if right <= majority < 1:
        logger.warning(
            "Full depth is right on %.1f%% of %s rows, no more than always answering the most "
            "frequent answer (%.1f%%). Either the labels are mapped to the wrong classes, or the "
            "model has not learnt this task, and then what exits save means little. Its classes "
            "are %s.",
            100 * right,
            f"{len(labels):,}",
            100 * majority,
            ", ".join(f"{n}={name}" for n, name in enumerate(names)),
        )
