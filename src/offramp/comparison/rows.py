"""The rows of a comparison: to train on, to choose on, to rank on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoConfig

from offramp.data import Task, drop_overlap, encode_labels, load_examples, split_examples
from offramp.errors import ConfigError, DataError, NonFiniteError
from offramp.model import Head
from offramp.storage import whole_folder
from offramp.table import ExitTable


def cut(
    whole: Dataset,
    given: dict[str, Dataset | None],
    shares: dict[str, float],
    max_rows: int | None,
) -> tuple[dict[str, Dataset], list[str]]:
    """Rows by role, no input in two of them; and which were left out for that, in words."""
    wanted = {role: shares[role] for role, part in given.items() if part is None}
    if not all(0 < share < 1 for share in wanted.values()) or sum(wanted.values()) >= 1:
        raise ConfigError("Shares of tune and test must be above 0 and leave rows to train on.")
    others = {role: part for role, part in given.items() if part is not None}
    left_out = []
    if others:
        whole, gone = drop_overlap(whole, *others.values())
        left_out += [f"{gone} of the data that are also in {' or '.join(others)}"] if gone else []
    if not len(whole):
        raise DataError("All rows are also among those to choose or rank on. Give other rows.")
    parts = {"train": 1 - sum(wanted.values()), **wanted}
    rows = split_examples(whole, parts, 0) if wanted else {"train": whole}
    if "tune" in others and "test" in others:
        others["tune"], gone = drop_overlap(others["tune"], others["test"])
        left_out += [f"{gone} of tune that are also in test"] if gone else []
    rows |= others
    for role, part in rows.items():
        if not len(part):
            raise DataError(f"There are no rows for '{role}'. Give more rows, or other shares.")
        if "label" not in part.column_names:
            raise DataError(
                f"The rows for '{role}' have no labels; name their column with --label."
            )
    if max_rows is not None:
        rows["train"] = load_examples(rows["train"], max_rows=max_rows)
    return {role: rows[role] for role in ("train", "tune", "test")}, left_out


def keep(folder: Path, rows: dict[str, Dataset]) -> None:
    """Write the rows where every process reads them."""
    for role, part in rows.items():
        place = folder / "rows" / role
        if not (place / "state.json").is_file():
            with whole_folder(place) as staged:
                part.save_to_disk(str(staged))


def check_labels(rows: Mapping[str, Dataset], source: Path, head: Head | None) -> Task:
    """The task of a new head, or of a classifier, whose labels all rows must have."""
    if head is not None:
        made: dict[str, Any] = {"problem_type": head.problem_type, "labels": head.labels}
    else:
        config: Any = AutoConfig.from_pretrained(source)
        names = tuple(str(config.id2label[key]) for key in sorted(config.id2label))
        kind = "regression" if len(names) == 1 else "single_label_classification"
        kind = config.problem_type or kind
        made = {"problem_type": kind, "labels": () if kind == "regression" else names}
    task = Task(**made)
    known: dict[str, Any] = {}
    for part in rows.values():
        kind, read = str(part.features["label"]), encode_labels(part, task)["label"][:]
        for given, found in zip(part["label"][:], read, strict=True):
            if known.setdefault(f"{kind} {given}", found) != found:
                raise DataError(
                    f"Label {given!r} is a class's name among some rows and a number among others. "
                    f"Name the classes as the model does: {', '.join(task.labels)}."
                )
    return task


def check_scores(table: ExitTable) -> None:
    """Refuse scores that are not finite. Raises NonFiniteError."""
    broken = int((~np.isfinite(table.scores).all(axis=(1, 2))).sum())
    if broken:
        raise NonFiniteError(
            f"{broken} of {table.rows} {table.header.role} rows have scores that are not finite."
        )
