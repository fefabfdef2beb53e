"""`offramp tune`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import console, report
from offramp.cli import options as o
from offramp.cli.tables import NOT_CERTIFIED, NOT_WORTH_IT, calibration_json
from offramp.cli.train import check_pooling, training_options

if TYPE_CHECKING:
    from offramp.tuning import Tuned


def tune(
    model: o.Model,
    data: o.Data,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write; else <MODEL's name>-offramp."),
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
    procedure: o.Procedure = "fixed_sequence",
    eval_data: o.EvalData = None,
    eval_split: o.EvalSplit = None,
    tune_share: o.TuneShare = 0.2,
    split: o.Split = None,
    text: o.Text = None,
    text_pair: o.TextPair = None,
    image: o.Image = None,
    label: o.Label = None,
    max_rows: o.MaxRows = None,
    pooling: o.Pooling = None,
    epochs: o.Epochs = None,
    learning_rate: o.LearningRate = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the cut and the training.", rich_help_panel="Rows")
    ] = 0,
    cache_limit: o.CacheLimit = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    backend: o.Backend = "torch",
    threads: o.Threads = None,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure the wall clock, too.")
    ] = True,
    examples: o.Examples = True,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """From a classifier to a model that answers easy inputs early, in one go.

    Attach exits, record an exit table, choose a point, measure. Exits are trained on one part
    of the rows and the point is chosen on another. Rows that the classifier was trained on
    flatter that choice: better give new ones as --eval-data. A model that has exits keeps
    them. Given again after a stop, the command goes on; with another target it takes seconds.

    Examples:
      offramp tune my-classifier --data reviews.csv --max-drop 1%
      offramp tune my-classifier --data reviews.csv --max-drop 2% --confidence 95%
      offramp tune my-classifier --data train.csv --eval-data held-out.csv --target-speedup 2
      offramp tune my-classifier --data unlabelled.jsonl --max-disagreement 2%
    """
    given = dict(locals())
    console.setup(quiet, verbose, threads)
    options = training_options(given)
    check_pooling(pooling)
    from offramp.tuning import tune as run

    done = run(**o.passed(run, given), options=options)
    if json:
        console.say_json(_as_json(done))
    else:
        _show(done)
    if not done.calibration.pays:
        raise typer.Exit(NOT_WORTH_IT if confidence is None else NOT_CERTIFIED)


def _as_json(done: Tuned) -> dict[str, Any]:
    return {
        "folder": str(done.folder),
        "table": str(done.table),
        **calibration_json(done.calibration),
        "evaluation": done.evaluation.to_dict(),
        "speed": report.speed_json(done.speed),
        "report": str(done.report),
    }


def _show(done: Tuned) -> None:
    point, outcome = done.calibration.point, done.evaluation.outcome
    console.facts(
        {
            "chosen point": f"{point.name}: {report.policy_text(point.policy)}, "
            f"for a {point.target}",
            **report.outcome_facts(outcome, point.problem_type),
            **(report.speed_facts(done.speed) if done.speed else {}),
        }
    )
    report.show_histogram(outcome.exit_histogram)
    # the first says what was chosen, as stands above, or why nothing was
    console.say("", *done.calibration.messages[1 if done.calibration.pays else 0 :])
    folder = quote(str(done.folder))
    options = "" if point.name == "default" else f" --point {point.name}"
    if (point.engine, point.dtype) != ("torch", "float32"):
        options += f" --backend {point.engine} --dtype {point.dtype}"
    console.say(
        "",
        f"{done.folder} is ready; {done.table} holds the recorded rows.",
        f"All of it as a page: {done.report}. Next:",
        f"  offramp predict {folder} --data NEW.csv --output answers.csv{options}",
        f"  offramp evaluate {folder} --data TEST.csv{options}",
    )
