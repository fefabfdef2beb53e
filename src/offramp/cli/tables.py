"""`offramp record`, `offramp calibrate` and `offramp evaluate`."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import console, report
from offramp.cli import options as o
from offramp.cli.info import say_made

if TYPE_CHECKING:
    from datasets import Dataset

    from offramp.calibration import Calibration
    from offramp.evaluation import Evaluation, Speed
    from offramp.prediction import Predictor
    from offramp.table import ExitTable

NOT_WORTH_IT, NOT_CERTIFIED = 3, 4
ALIKE = 0.05
"""Share of a table's inputs that may be in another: some texts are simply common."""


def record(
    folder: o.Folder,
    data: o.Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the table.", show_default=False)
    ],
    role: Annotated[
        str,
        typer.Option("--role", help="What the rows may be used for: tune, calibrate or test."),
    ] = "tune",
    apart_from: Annotated[
        list[Path] | None,
        typer.Option("--apart-from", help="Drop rows that are in this table; repeatable."),
    ] = None,
    split: o.Split = None,
    text: o.Text = None,
    text_pair: o.TextPair = None,
    image: o.Image = None,
    label: o.Label = None,
    max_rows: o.MaxRows = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    backend: o.Backend = "torch",
    threads: o.Threads = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Record every exit's answer on a set of rows, once, into an exit table.

    Everything about speed is then decided on the table, in seconds, without the model.

    Examples:
      offramp record my-offramp --data tune.csv --output tune.table
      offramp record my-offramp -d test.csv -o test.table --role test --apart-from tune.table
    """
    given = dict(locals())
    console.setup(quiet, verbose, threads)
    from offramp.data import load_examples, names_source
    from offramp.engines import record as run
    from offramp.prediction import Predictor
    from offramp.table import ExitTable

    others = [ExitTable.open(path) for path in apart_from or []]
    predictor = Predictor.load(folder, "full", device=device, dtype=dtype, backend=backend)
    rows = load_examples(data, **o.passed(load_examples, given))
    with names_source(data):
        table = run(
            predictor.model,
            rows,
            output,
            role,
            processor=predictor.processor,
            engine=predictor.engine,
            others=others,
            progress=not quiet,
        )
    if json:
        say_made(output)
        return
    console.say(
        f"{output}: {table.rows:,} rows, {table.depth} exits, role {table.header.role}.",
        f"  {_next(table, output, folder)}",
    )


def _next(table: ExitTable, place: Path, folder: str) -> str:
    """The command that a recorded table is for."""
    mine, model = quote(str(place)), quote(folder)
    if table.header.role == "test":
        return f"offramp report {mine}"
    limit = "--max-disagreement" if table.labels is None else "--max-drop"
    return f"offramp calibrate {mine} --model {model} {limit} 1%"


def calibrate(
    tables: Annotated[
        list[Path],
        typer.Argument(metavar="TABLE...", help="Exit tables of one model.", show_default=False),
    ],
    model: Annotated[
        Path | None,
        typer.Option("--model", help="Write the point beside these weights.", show_default=False),
    ] = None,
    target_speedup: o.TargetSpeedup = None,
    max_drop: o.MaxDrop = None,
    max_disagreement: o.MaxDisagreement = None,
    max_risk: o.MaxRisk = None,
    risk: o.Risk = None,
    metric: o.Metric = None,
    per_class: o.PerClass = False,
    policies: o.Policies = None,
    name: o.Name = "default",
    sets: o.Sets = None,
    temperatures: o.Temperatures = False,
    confidence: o.Confidence = None,
    proof: o.Proof = None,
    procedure: o.Procedure = "fixed_sequence",
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Choose a policy and its threshold on recorded rows.

    Give one target. The cheapest policy that meets it is chosen, or for --target-speedup the
    best one. Without --model the choice is only shown. With --confidence the limit is promised
    for rows like these: policies are searched on half of them and proven on the rest.

    Examples:
      offramp calibrate tune.table --model my-offramp --max-drop 1%
      offramp calibrate tune.table --model my-offramp --target-speedup 2 --name fast
      offramp calibrate tune.table --model my-offramp --max-drop 1% --confidence 95% --policy all
      offramp calibrate a.table b.table --max-disagreement 2% --policy patience --json
    """
    given = dict(locals())
    console.setup(quiet, verbose)
    from offramp.calibration import choose
    from offramp.calibration.certifying import DEMAND
    from offramp.report import write_picture

    table = joined(tables)
    if model is not None:
        table.check_model(fingerprint_of(model))
    given["proof"] = None if proof is None else joined([proof])
    given["policies"] = o.specs(policies)
    demand = {name: given[name] for name in (*DEMAND, "proof")}
    found = choose(table, **demand, progress=not quiet)
    written = None
    if model is not None:
        written = found.point.save(model)
        write_picture(model, found)
    if json:
        console.say_json({**calibration_json(found), "written": written and str(written)})
    else:
        console.say(*found.messages, _where(written))
        report.show_histogram(found.point.exit_histogram)
    if not found.pays:
        raise typer.Exit(NOT_WORTH_IT if confidence is None else NOT_CERTIFIED)


def _where(written: Path | None) -> str:
    return f"Written to {written}." if written else "Not written: --model FOLDER says where to."


def joined(paths: list[Path]) -> ExitTable:
    """One table of all rows; the tables may differ in their rows and in nothing else."""
    from offramp.errors import TableError
    from offramp.storage import fingerprint
    from offramp.table import ExitTable, concatenate, overlap

    tables = [ExitTable.open(path) for path in paths]
    if len(tables) == 1:
        return tables[0]
    for first, second in combinations(zip(paths, tables, strict=True), 2):
        shared = overlap(first[1], second[1])
        if shared > ALIKE * min(first[1].rows, second[1].rows):
            raise TableError(
                f"{first[0]} and {second[0]} hold {shared:,} of the same rows, which would count "
                "twice. Give one of the two, or record all rows together."
            )
    rows = fingerprint(*(table.header.data_fingerprint for table in tables))
    for table in tables:
        table.check_content()
    joint = [table.header.model_copy(update={"data_fingerprint": rows}) for table in tables]
    return concatenate([ExitTable(h, one.columns) for h, one in zip(joint, tables, strict=True)])


def calibration_json(found: Calibration) -> dict[str, Any]:
    return {
        "pays": found.pays,
        "point": found.point.model_dump(mode="json"),
        "messages": list(found.messages),
    }


def fingerprint_of(folder: Path) -> str:
    """The fingerprint in a model's manifest."""
    from offramp.errors import ModelError
    from offramp.model.folder import MANIFEST, Manifest
    from offramp.storage import read_document

    return read_document(Manifest, folder / MANIFEST, ModelError).fingerprint


@contextmanager
def recorded(predictor: Predictor, rows: Dataset, quiet: bool) -> Iterator[ExitTable]:
    """A table of rows to be read only, which is gone after the block."""
    from offramp.engines import record as run

    with tempfile.TemporaryDirectory() as place:
        yield run(
            predictor.model,
            rows,
            Path(place, "table"),
            "test",
            processor=predictor.processor,
            engine=predictor.engine,
            progress=not quiet,
        )


def evaluate(
    folder: o.Folder,
    data: o.Data,
    point: o.Point = "default",
    metric: o.Metric = None,
    split: o.Split = None,
    text: o.Text = None,
    text_pair: o.TextPair = None,
    image: o.Image = None,
    label: o.Label = None,
    max_rows: o.MaxRows = None,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure the wall clock, too.")
    ] = True,
    device: o.Device = None,
    dtype: o.Dtype = None,
    backend: o.Backend = "torch",
    threads: o.Threads = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Measure an operating point on rows; nothing is chosen here.

    Score at full depth, at the point and at every exit, cost reduction, disagreement, where
    rows leave, and the measured speed-up beside the ideal.

    Examples:
      offramp evaluate my-offramp --data test.csv
      offramp evaluate my-offramp -d test.csv --point fast --no-speed --json
    """
    given = dict(locals())
    console.setup(quiet, verbose, threads)
    from offramp.data import load_examples, names_source
    from offramp.evaluation import evaluate as judge
    from offramp.prediction import Predictor
    from offramp.tuning import speed_on

    predictor = Predictor.load(folder, point, device=device, dtype=dtype, backend=backend)
    rows = load_examples(data, **o.passed(load_examples, given))
    with names_source(data), recorded(predictor, rows, quiet) as table:
        ready = predictor.point
        done = judge(table, metric=metric, **ready._asdict())
        _say_if_chosen_on(predictor, table)
    clock = speed_on(predictor, rows, predictor.policy) if speed else None
    if json:
        console.say_json({"point": point, **done.to_dict(), "speed": report.speed_json(clock)})
    else:
        _show(point, predictor.model.problem_type, done, clock)


def _say_if_chosen_on(predictor: Predictor, table: ExitTable) -> None:
    """Figures of the rows of the choice say little about others."""
    chosen = predictor.chosen
    if chosen is not None and chosen.made_with(table.header.data_fingerprint):
        logging.getLogger("offramp").warning(
            "Point '%s' was made with these very rows: they say little of others.", chosen.name
        )


def _show(point: str, problem_type: str, done: Evaluation, clock: Speed | None) -> None:
    outcome = done.outcome
    console.facts(
        {
            "rows": f"{done.rows:,}",
            "point": f"{point}: {report.policy_text(outcome.policy.to_dict())}",
            **report.outcome_facts(outcome, problem_type),
            **report.sets_facts(done.sets),
            **report.promise_facts(done.promised),
            **(report.speed_facts(clock) if clock is not None else {}),
        }
    )
    report.show_histogram(outcome.exit_histogram)
    console.say("", "Everyone leaving at one exit:")
    heads = ["  exit", outcome.metric or "", "disagreement", "cost reduction"]
    rows = [
        [
            f"  layer {layer:>2}",
            "" if one.score is None else f"{one.score:.4f}",
            f"{one.disagreement:.4f}",
            f"{one.cost_reduction:.2f}x",
        ]
        for layer, one in enumerate(done.exits, start=1)
    ]
    for head, errors in (
        ("calibration error", done.calibration_errors),
        ("with temperatures", done.calibrated_errors),
    ):
        if errors is not None:
            heads.append(head)
            rows = [[*row, f"{error:.4f}"] for row, error in zip(rows, errors, strict=True)]
    console.columns(heads, rows)
