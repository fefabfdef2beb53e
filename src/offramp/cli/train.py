"""`offramp train` and `offramp attach`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import console
from offramp.cli import options as o
from offramp.cli.info import say_made

if TYPE_CHECKING:
    from offramp.training import TrainOptions


def train(
    model: o.Model,
    data: o.Data,
    output: o.Output,
    method: Annotated[
        str, typer.Option("--method", help="A method, such as pabee; or plain for no exits at all.")
    ] = "auto",
    pooling: o.Pooling = None,
    as_released: Annotated[
        bool,
        typer.Option("--as-released", help="The paper's pooling, and its code where they differ."),
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method; repeatable."),
    ] = None,
    fine_tuned: Annotated[
        bool,
        typer.Option("--fine-tuned", help="MODEL has learnt these data already."),
    ] = False,
    problem_type: o.ProblemType = None,
    fresh_head: o.FreshHead = False,
    layers: Annotated[
        int | None,
        typer.Option("--layers", min=1, help="Only the first so many layers of the model."),
    ] = None,
    split: o.Split = None,
    text: o.Text = None,
    text_pair: o.TextPair = None,
    image: o.Image = None,
    label: o.Label = None,
    max_rows: o.MaxRows = None,
    epochs: o.Epochs = None,
    max_steps: o.MaxSteps = None,
    batch_size: o.BatchSize = None,
    learning_rate: o.LearningRate = None,
    head_learning_rate: o.HeadLearningRate = None,
    gradient_accumulation: o.GradientAccumulation = None,
    max_length: o.MaxLength = None,
    bf16: o.Bf16 = None,
    seed: o.Seed = None,
    cache_limit: o.CacheLimit = None,
    checkpoint_minutes: o.CheckpointMinutes = None,
    report_to: o.ReportTo = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Fine-tune an encoder and its exits together on labelled examples.

    A run that was stopped continues when the same command is given again, and ends in the
    same weights.

    Examples:
      offramp train bert-base-uncased --data reviews.csv --output reviews-offramp
      offramp train my-encoder -d train.tsv --text sentence --label gold -o out --epochs 2
      offramp train bert-base-uncased -d train.csv -o out --method jei_dnn --set trade_off=0.3
      torchrun --nproc-per-node 2 -m offramp train roberta-base -d train.jsonl -o out
    """
    given = dict(locals())
    console.setup(quiet, verbose)
    options = training_options(given)
    check_pooling(pooling)
    given["settings"] = _settings(settings or [])
    from offramp.training import train as run

    run(model, options=options, **o.passed(run, given))
    if json:
        say_made(output)
    elif method != "plain":
        say_next(output)


def attach(
    model: o.Model,
    data: o.Data,
    output: o.Output,
    pooling: o.Pooling = None,
    split: o.Split = None,
    text: o.Text = None,
    text_pair: o.TextPair = None,
    image: o.Image = None,
    label: o.Label = None,
    max_rows: o.MaxRows = None,
    epochs: o.Epochs = None,
    max_steps: o.MaxSteps = None,
    batch_size: o.BatchSize = None,
    learning_rate: o.LearningRate = None,
    max_length: o.MaxLength = None,
    bf16: o.Bf16 = None,
    seed: o.Seed = None,
    cache_limit: o.CacheLimit = None,
    checkpoint_minutes: o.CheckpointMinutes = None,
    report_to: o.ReportTo = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Hang exits on a fine-tuned classifier, which stays as it is.

    The exits learn from the classifier's own answers, so the text needs no labels; where there
    are some, exits learn from them as well. Full-depth answers do not change. A run that was
    stopped continues when the same command is given again.

    Examples:
      offramp attach my-classifier --data texts.csv --output my-classifier-offramp
      offramp attach my-classifier -d texts.jsonl.gz -o out --pooling mean --max-rows 20000
    """
    given = dict(locals())
    console.setup(quiet, verbose)
    options = training_options(given)
    check_pooling(pooling)
    from offramp.training import attach as run

    run(model, options=options, **o.passed(run, given))
    if json:
        say_made(output)
    else:
        say_next(output)


def _settings(given: Sequence[str]) -> dict[str, Any]:
    """Names and values; what is not a number, true or false is a word. Raises ConfigError."""
    from offramp.errors import ConfigError

    found: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise ConfigError(f"--set {pair}: write NAME=VALUE, such as --set trade_off=0.3.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def training_options(given: Mapping[str, Any]) -> TrainOptions:
    """Those training options that were given, checked. Raises ConfigError."""
    from offramp.storage import parse_document
    from offramp.training import TrainOptions

    known = {
        name: value
        for name, value in given.items()
        if name in TrainOptions.model_fields and value is not None
    }
    if "cache_limit" in known:
        known["cache_limit"] = _bytes(known["cache_limit"])
    return parse_document(TrainOptions, known, "Training options")


def _bytes(gigabytes: float) -> int:
    if not math.isfinite(gigabytes):
        from offramp.errors import ConfigError

        raise ConfigError(f"--cache-limit is {gigabytes:g}; give gigabytes, such as 8.")
    return int(gigabytes * 1e9)


def check_pooling(pooling: str | None) -> None:
    """Refuse a pooling that no exit has. Raises ConfigError."""
    from offramp.errors import ConfigError
    from offramp.exits import POOLINGS
    from offramp.registry import nearest

    if pooling is not None and pooling not in POOLINGS:
        hint = nearest(pooling, list(POOLINGS))
        raise ConfigError(f"Unknown pooling '{pooling}'.{hint} Known: {', '.join(POOLINGS)}.")


def say_next(output: Path) -> None:
    console.say(
        f"{output} answers after every layer. Next, choose where rows leave:",
        f"  offramp tune {quote(str(output))} --data OTHER_ROWS --max-drop 1%",
    )
