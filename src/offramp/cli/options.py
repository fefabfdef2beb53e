"""Options that several commands share, with one wording each."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def passed(to: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that a function takes under the same name: the words are the same."""
    known = inspect.signature(to).parameters
    found = {name: value for name, value in given.items() if name in known}
    if "policies" in found:
        found["policies"] = specs(found["policies"])
    return found


def specs(policies: list[str] | None) -> list[Any] | None:
    """What --policy was given, each a name or options."""
    return None if policies is None else [_policy(text) for text in policies]


def _policy(text: str) -> Any:
    """A name, or a policy with its options as JSON. Raises ConfigError."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as problem:
        from offramp.errors import ConfigError

        raise ConfigError(
            f"--policy {text}: not JSON: {problem}. Give a name, or options as "
            """'{"name": "patience", "patience": 3}'."""
        ) from None


_ROWS = "Rows"
_TRAINING = "Training"
_RUN = "Where and how it runs"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub id of a model.", show_default=False)
]
Folder = Annotated[
    str,
    typer.Argument(
        metavar="FOLDER", help="Folder or hub id of a multi-exit model.", show_default=False
    ),
]

Data = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        help="CSV, TSV, JSONL or Parquet file (plain or .gz), folder of images, hub id, "
        "'docstrings' or 'digits'.",
        rich_help_panel=_ROWS,
        show_default=False,
    ),
]
Split = Annotated[
    str | None,
    typer.Option("--split", help="Which split, where there are several.", rich_help_panel=_ROWS),
]
Text = Annotated[
    str | None,
    typer.Option("--text", help="Column of the text, if not found.", rich_help_panel=_ROWS),
]
TextPair = Annotated[
    str | None,
    typer.Option("--text-pair", help="Column of the second text.", rich_help_panel=_ROWS),
]
Image = Annotated[
    str | None,
    typer.Option(
        "--image", help="Column of the image or its path, if not found.", rich_help_panel=_ROWS
    ),
]
Label = Annotated[
    str | None,
    typer.Option("--label", help="Column of the label, if not found.", rich_help_panel=_ROWS),
]
EvalData = Annotated[
    str | None,
    typer.Option(
        "--eval-data", help="Rows to choose on, instead of a part.", rich_help_panel=_ROWS
    ),
]
EvalSplit = Annotated[
    str | None,
    typer.Option("--eval-split", help="Split to choose on.", rich_help_panel=_ROWS),
]
TuneShare = Annotated[
    float,
    typer.Option("--tune-share", help="Part kept to choose on.", rich_help_panel=_ROWS),
]
TestData = Annotated[
    str | None,
    typer.Option("--test-data", help="Rows to rank on, instead of a part.", rich_help_panel=_ROWS),
]
TestSplit = Annotated[
    str | None,
    typer.Option("--test-split", help="Split to rank on.", rich_help_panel=_ROWS),
]
TestShare = Annotated[
    float,
    typer.Option("--test-share", help="Part kept to rank on.", rich_help_panel=_ROWS),
]
MaxRows = Annotated[
    int | None,
    typer.Option("--max-rows", help="Use a sample of this many rows.", rich_help_panel=_ROWS),
]

ProblemType = Annotated[
    str | None,
    typer.Option("--problem-type", help="As in transformers, where labels do not tell."),
]
FreshHead = Annotated[
    bool, typer.Option("--fresh-head", help="A new head for the labels of the data.")
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)
]
Pooling = Annotated[
    str | None,
    typer.Option("--pooling", help="Of the exits: cls, pooler, mean or attention."),
]
Epochs = Annotated[
    float | None,
    typer.Option("--epochs", help="Passes over the rows.", rich_help_panel=_TRAINING),
]
MaxSteps = Annotated[
    int | None,
    typer.Option("--max-steps", help="End after this many updates.", rich_help_panel=_TRAINING),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", help="Rows per update.", rich_help_panel=_TRAINING),
]
LearningRate = Annotated[
    float | None,
    typer.Option("--learning-rate", help="At its peak.", rich_help_panel=_TRAINING),
]
HeadLearningRate = Annotated[
    float | None,
    typer.Option(
        "--head-learning-rate",
        help="Of exits and new heads, which start from nothing.",
        rich_help_panel=_TRAINING,
    ),
]
GradientAccumulation = Annotated[
    int | None,
    typer.Option("--gradient-accumulation", help="Batches per update.", rich_help_panel=_TRAINING),
]
Bf16 = Annotated[
    bool | None,
    typer.Option(
        "--bf16/--no-bf16",
        help="Train in bfloat16; else where a GPU supports it.",
        rich_help_panel=_TRAINING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Of new weights and the order of rows.", rich_help_panel=_TRAINING),
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", help="Longest text in tokens.", rich_help_panel=_TRAINING),
]
CheckpointMinutes = Annotated[
    float | None,
    typer.Option(
        "--checkpoint-minutes",
        help="A killed run loses at most about this much.",
        rich_help_panel=_TRAINING,
    ),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option("--report-to", help="Trackers, such as tensorboard.", rich_help_panel=_TRAINING),
]
CacheLimit = Annotated[
    float | None,
    typer.Option(
        "--cache-limit",
        help="GB of disk that pooled vectors may take; 0 computes them anew every epoch.",
        rich_help_panel=_TRAINING,
    ),
]

TargetSpeedup = Annotated[
    float | None,
    typer.Option("--target-speedup", help="Cost reduction wanted: 2 halves the FLOPs."),
]
MaxDrop = Annotated[
    str | None,
    typer.Option("--max-drop", help="Loss of the metric allowed against full depth: 1% or 0.01."),
]
MaxDisagreement = Annotated[
    str | None,
    typer.Option(
        "--max-disagreement",
        help="Share of answers that may differ from full depth; needs no labels.",
    ),
]
_BUDGET = "What a row may take"
MaxDepth = Annotated[
    int | None,
    typer.Option(
        "--max-depth",
        help="The most layers of a row; who has run them is answered there, as 'forced'.",
        rich_help_panel=_BUDGET,
        show_default=False,
    ),
]
MaxSeconds = Annotated[
    float | None,
    typer.Option(
        "--max-seconds",
        help="The most time of a batch; who runs out of it is answered there, as 'forced'.",
        rich_help_panel=_BUDGET,
        show_default=False,
    ),
]
PointColumn = Annotated[
    str | None,
    typer.Option(
        "--point-column",
        help="Column of the operating point that a row asks for; empty: that of --point.",
        rich_help_panel=_BUDGET,
        show_default=False,
    ),
]
_WATCH = "Does the point still hold?"
Watch = Annotated[
    Path | None,
    typer.Option(
        "--watch",
        help="File of what was seen of the point, made where it is missing.",
        rich_help_panel=_WATCH,
        show_default=False,
    ),
]
Audit = Annotated[
    str,
    typer.Option(
        "--audit",
        help="With --watch: share of rows to run to full depth as well.",
        rich_help_panel=_WATCH,
    ),
]
OnAlarm = Annotated[
    str,
    typer.Option(
        "--on-alarm",
        help="With --watch: warn, full (depth from then on), or another point.",
        rich_help_panel=_WATCH,
    ),
]
_PROMISE = "A promise"
MaxRisk = Annotated[
    str | None,
    typer.Option("--max-risk", help="Mean of a loss allowed, with --risk.", show_default=False),
]
Risk = Annotated[
    str | None,
    typer.Option(
        "--risk",
        help="What --max-risk limits, such as brier_distance or hellinger.",
    ),
]
Confidence = Annotated[
    str | None,
    typer.Option(
        "--confidence",
        help="Promise the limit for rows like these, with this confidence: 95%.",
        rich_help_panel=_PROMISE,
    ),
]
Proof = Annotated[
    Path | None,
    typer.Option(
        "--proof",
        help="Exit table, role calibrate, that proves it; else every second row of TABLE.",
        rich_help_panel=_PROMISE,
        show_default=False,
    ),
]
Procedure = Annotated[
    str,
    typer.Option(
        "--procedure",
        help="fixed_sequence, holm, bonferroni; or expectation, which promises less.",
        rich_help_panel=_PROMISE,
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        help="accuracy, f1, f1_micro, matthews, pearson, spearman, ...; else the task's own.",
    ),
]
PerClass = Annotated[
    bool,
    typer.Option("--per-class", help="--max-drop also holds for the recall of every class."),
]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        help="Search only this one, such as patience, entropy, margin, window, fixed; repeatable. "
        "With options of its own, as JSON, it is tried as it is. "
        "'all' searches whatever fits, with averages, temperatures and a bar for each exit.",
    ),
]
Name = Annotated[str, typer.Option("--name", help="Of the operating point.")]
Sets = Annotated[
    str | None,
    typer.Option(
        "--sets",
        help="Keep half the rows for sets of classes that hold the right one this often: 90%.",
    ),
]
Temperatures = Annotated[
    bool,
    typer.Option(
        "--temperatures",
        help="Also fit a temperature for each exit, so that scores are true probabilities.",
    ),
]
Point = Annotated[
    str, typer.Option("--point", help="Operating point of the folder, or 'full' for full depth.")
]

Examples = Annotated[
    bool,
    typer.Option("--examples/--no-examples", help="Show some of the inputs in the report."),
]

Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1; else a GPU if there.", rich_help_panel=_RUN),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="fp32, bf16 or fp16; int8 with onnx or openvino; else the model's.",
        rich_help_panel=_RUN,
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        help="What computes: torch, inductor (torch.compile), onnx, openvino.",
        rich_help_panel=_RUN,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="Processor threads that a call uses; torch's choice unless given.",
        rich_help_panel=_RUN,
    ),
]

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also what other libraries have to say.")
]
