"""`attack`: how far somebody who means harm can delay the exits of a model."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset

from offramp.attacks.base import ATTACKS, MAX_TOKENS, Attack, Victim, make_attacks
from offramp.attacks.document import AttackReport, Tried
from offramp.attacks.figures import (
    at_savings,
    budget_for,
    compare,
    metric_of,
    refuse_fitted,
    score_of,
)
from offramp.attacks.kept import Kept
from offramp.attacks.page import to_markdown
from offramp.calibration.frontier import PolicySpec, applicable
from offramp.data import data_fingerprint, load_examples
from offramp.engines import record
from offramp.errors import ConfigError, OutputError
from offramp.metrics import METRICS, REGRESSION
from offramp.model import MultiExitModel
from offramp.policies import POLICIES, Policy, make_policy
from offramp.prediction import Predictor
from offramp.storage import alone_in, whole_file, write_document
from offramp.table import ExitTable, replay

logger = logging.getLogger("offramp")

JSON, PAGE, TABLES = "attack.json", "attack.md", "tables"
MAX_ROWS = 200
USUAL = ("embedding", "characters")


def attack(
    model: str | os.PathLike[str] | Predictor,
    data: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    kinds: Sequence[str] | None = None,
    target_speedup: float = 2.0,
    policies: Sequence[PolicySpec] | None = None,
    points: Sequence[str] = (),
    max_depth: int | None = None,
    metric: str | None = None,
    max_rows: int | None = MAX_ROWS,
    seed: int = 0,
    device: str | None = None,
    quiet: bool = False,
    split: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    image: str | None = None,
    label: str | None = None,
    **options: Any,
) -> AttackReport:
    """Change rows so that they leave late, and say what that does to policies.

    Every policy gets the bar that saves as much as asked for on the rows as they are, since a
    model that never leaves early cannot be slowed. Beside it stands what a depth budget makes of
    the same rows: nobody takes more than that, whatever was done to the row.

    Args:
        model: folder or hub id of a multi-exit model; or a predictor with backend torch.
        data: rows, as `load_examples` takes them, with the columns named.
        output: folder for `attack.json`, `attack.md`, the exit tables and the changed texts.
            Given again, a search that was killed goes on. None writes nothing.
        kinds: attacks by name, see `offramp.attacks.ATTACKS`; else `embedding`, for texts also
            `characters`, and `words` where `synonyms` are given.
        target_speedup: cost reduction on the rows as they are.
        policies: names whose bars are set to that, or policies with options as they are; else
            all that fit the model.
        points: names of operating points of the folder, judged as they are.
        max_depth: the budget in layers; else the least depth that costs as much as was asked for.
        metric: of the scores; by default the task's own. Needs labels.
        max_rows: rows to attack, a sample by `seed`; None takes all.
        options: of the attacks, such as `eps`, `steps`, `objective`, `synonyms` or `share`; `seed`
            is passed on as well.

    Raises:
        ConfigError: an option that makes no sense, regression, a model of one layer, or an output
            folder that holds another attack.
        DataError, ModelError, PointError: what is wrong with rows or synonyms, model or point.
        OutputError: the folder cannot be written.
    """
    if not 1 < target_speedup < math.inf:
        raise ConfigError(f"target_speedup must be above 1 and finite, not {target_speedup:g}.")
    predictor = model
    if not isinstance(predictor, Predictor):
        predictor = Predictor.load(predictor, "full", device=device)
    tried = _wanted(predictor, kinds, options, seed)
    _check_depth(max_depth, predictor.model)
    if metric is not None:
        METRICS[metric].check(predictor.model.problem_type)
    if policies is not None and not (policies or points):
        raise ConfigError("There is no policy to attack. Name a policy or a point.")
    known = [(point, predictor.policy_of(point)) for point in points]
    wanted = None if policies is None else _policies(policies, predictor.model)
    columns = {"text": text, "text_pair": text_pair, "image": image, "label": label}
    rows = load_examples(data, split=split, **cast(Any, columns))
    sample = load_examples(rows, max_rows=max_rows, seed=seed, **_own(rows))
    if len(sample) < len(rows):
        logger.info(
            "Attacked is a sample of %d of %d rows; max_rows takes more.", len(sample), len(rows)
        )
    wishes = Wishes(target_speedup, known, wanted, max_depth, metric)
    with _place(output) as folder:
        return _Run(predictor, sample, folder, output is not None, wishes, quiet).all(tried)


@dataclass(frozen=True)
class Wishes:
    """What policies are judged, and within which budget; as in `attack`.

    Attributes:
        points: their names and policies.
        policies: names of those whose bars are to be set, or policies as they are; None is all
            that fit the model.
    """

    target_speedup: float
    points: Sequence[tuple[str, Policy]]
    policies: Sequence[str | Policy] | None
    max_depth: int | None
    metric: str | None


@dataclass(frozen=True)
class _Run:
    predictor: Predictor
    rows: Dataset
    folder: Path
    keeps: bool
    wishes: Wishes
    quiet: bool

    def all(self, attacks: Sequence[Attack]) -> AttackReport:
        model = self.predictor.model
        clean = self._record("clean", self.rows, None)
        judged = self._judged(clean)
        depth = self.wishes.max_depth
        if depth is None:
            depth = budget_for(clean, self.wishes.target_speedup)
        named = None if clean.labels is None else metric_of(clean, self.wishes.metric).name
        tried, found = [], []
        for one in attacks:
            table, told = self._attack(one, clean, [policy for _, policy in judged])
            tried.append(told)
            found += [
                compare(one.name, clean, table, policy, depth, point, self.wishes.metric)
                for point, policy in judged
            ]
        report = AttackReport(
            model_fingerprint=model.fingerprint(),
            data_fingerprint=data_fingerprint(self.rows),
            depth=model.depth,
            rows=len(self.rows),
            target_speedup=self.wishes.target_speedup,
            max_depth=depth,
            metric=named,
            full_score=score_of(clean, clean.scores[:, -1], self.wishes.metric),
            attacks=tuple(tried),
            policies=tuple(found),
        )
        if self.keeps:
            _write(report, self.folder)
        return report

    def _judged(self, clean: ExitTable) -> list[tuple[str | None, Policy]]:
        """Points, and policies at the savings asked for."""
        wanted = self.wishes.policies
        if wanted is None:
            wanted = [name for name in applicable(clean) if name != "full"]
        judged: list[tuple[str | None, Policy]] = [*self.wishes.points]
        for one in wanted:
            if isinstance(one, str):
                (one,) = at_savings(clean, [one], self.wishes.target_speedup)
            one.check_signals(clean.header.signals)
            judged.append((None, one))
        return judged

    def _attack(
        self, one: Attack, clean: ExitTable, policies: Sequence[Policy]
    ) -> tuple[ExitTable, Tried]:
        victim = Victim(self.predictor.model, self.predictor.processor, not self.quiet)
        head = {
            "attack": one.identity(),
            "model": clean.header.model_fingerprint,
            "rows": data_fingerprint(self.rows),
        }
        keep = self.keeps and one.searches
        kept = Kept(self.folder / f"{one.name}.jsonl" if keep else None, head)
        rows, engine = one.on(victim, self.rows, kept)
        table = self._record(one.name, rows, engine, clean)
        if kept.rows:
            for name, which in (("exit_layer", clean), ("exit_layer_attacked", table)):
                layers = np.mean([replay(which, each).exit_layers for each in policies], axis=0)
                kept.note(name, layers.tolist())
        changed = [found["words_changed"] for found in kept.rows.values()]
        told = Tried(
            name=one.name,
            options=one.identity(),
            queries=victim.queries / len(self.rows),
            words_changed=float(np.mean(changed)) if changed else None,
            full_score=score_of(table, table.scores[:, -1], self.wishes.metric),
        )
        return table, told

    def _record(
        self, name: str, rows: Dataset, engine: Any, clean: ExitTable | None = None
    ) -> ExitTable:
        """An exit table; that of changed rows gets the labels afterwards, since being wrong on
        such rows says nothing about the labels."""
        known = clean is not None and "label" in rows.column_names
        with tempfile.TemporaryDirectory() as place:
            table = record(
                self.predictor.model,
                rows.remove_columns("label") if known else rows,
                Path(place, "table"),
                "test",
                processor=self.predictor.processor,
                engine=engine,
                max_tokens=MAX_TOKENS,
                progress=not self.quiet,
            ).take(np.arange(len(rows)))
        table = _labelled(table, clean) if clean is not None else table
        if self.keeps:
            table.save(self.folder / TABLES / name)
        return table


def _labelled(table: ExitTable, like: ExitTable) -> ExitTable:
    """The table with the labels of another of the same rows, if it has any."""
    if like.labels is None:
        return table
    columns = {**table.header.columns, "labels": like.header.columns["labels"]}
    header = table.header.model_copy(update={"columns": columns})
    return ExitTable(header, {**table.columns, "labels": like.labels})


def _wanted(
    predictor: Predictor, kinds: Sequence[str] | None, options: dict[str, Any], seed: int
) -> list[Attack]:
    """Attacks with their options, if they are for the model."""
    if kinds is None:
        reads = predictor.model.backbone.reads
        kinds = [name for name in USUAL if reads in ATTACKS[name].reads]
        kinds += ["words"] if "synonyms" in options else []
    if not kinds:
        raise ConfigError(f"There is no attack to try. Name one of: {', '.join(ATTACKS)}.")
    if any("seed" in ATTACKS[name].model_fields for name in kinds):
        options = {**options, "seed": seed}
    made = make_attacks(kinds, options)
    for one in made:
        _check(one, predictor.model)
    return made


def _policies(specs: Sequence[PolicySpec], model: MultiExitModel) -> list[str | Policy]:
    """Names, and policies as they are. Raises ConfigError for what is not for the model's task."""
    refuse_fitted(specs)
    judged: list[str | Policy] = []
    for spec in specs:
        if isinstance(spec, str):
            POLICIES[spec]  # raises for an unknown name
            judged.append(spec)
        else:
            policy = make_policy(spec)
            policy.check(model.problem_type, model.depth)
            judged.append(policy)
    return judged


def _check_depth(max_depth: int | None, model: MultiExitModel) -> None:
    if max_depth is not None and not 1 <= max_depth <= model.depth:
        raise ConfigError(f"max_depth={max_depth}: give a layer of the model, 1 to {model.depth}.")


def _check(one: Attack, model: MultiExitModel) -> None:
    if model.problem_type == REGRESSION:
        raise ConfigError(
            "This is a regression model: one number has no uniform answer that exits could be "
            "driven to, so there is nothing to attack. Give a model with classes."
        )
    if model.depth < 2:
        raise ConfigError("The model has one layer, so nobody leaves early. Give a deeper one.")
    one.check(model)


def _own(rows: Dataset) -> dict[str, Any]:
    """The columns of examples by their own names, which are not to be guessed again."""
    names = ("text", "text_pair", "image", "label")
    return {name: name for name in names if name in rows.column_names}


@contextlib.contextmanager
def _place(output: str | os.PathLike[str] | None) -> Iterator[Path]:
    if output is None:
        with tempfile.TemporaryDirectory() as place:
            yield Path(place)
        return
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; give the name of a folder.")
    with alone_in(folder, "Another attack"):
        yield folder


def _write(report: AttackReport, folder: Path) -> None:
    write_document(folder / JSON, report)
    with whole_file(folder / PAGE) as page:
        page.write_text(to_markdown(report), encoding="utf-8")
