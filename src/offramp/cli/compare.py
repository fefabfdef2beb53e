"""`offramp compare`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from offramp.cli import console
from offramp.cli import options as o
from offramp.errors import ConfigError

if TYPE_CHECKING:
    from offramp.comparison import Compared
    from offramp.comparison.board import Board, MethodRow

T = TypeVar("T")
_UNITS = {"s": 1, "m": 60, "h": 3600}
UNFINISHED = 3

Methods = Annotated[str, typer.Option("--methods", help="Names with commas between, or all.")]
Seeds = Annotated[int, typer.Option("--seeds", help="How often each is trained.")]
Budget = Annotated[
    str | None,
    typer.Option("--budget", help="Stop after this time, such as 90m or 2h, to go on later."),
]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference", help="Method to compare the others with; else auto, or the best on tune."
    ),
]
MaxRows = Annotated[
    int | None,
    typer.Option("--max-rows", help="Train on so many of them.", rich_help_panel="Rows"),
]
Epochs = Annotated[
    float,
    typer.Option("--epochs", help="Of every method.", rich_help_panel="Training"),
]
StartEpochs = Annotated[
    float | None,
    typer.Option(
        "--start-epochs",
        help="Of the fine-tune they start from; else as many.",
        rich_help_panel="Training",
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", help="Rows per update.", rich_help_panel="Training")
]
Rates = Annotated[
    str,
    typer.Option(
        "--rates",
        help="Learning rates to try, with commas between.",
        rich_help_panel="Training",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        help="Runs at once; else one per core as memory allows, one on a GPU.",
        rich_help_panel="Where and how it runs",
    ),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        help="Module to import first, which registers methods of your own; repeatable.",
        rich_help_panel="Where and how it runs",
    ),
]


def compare(
    model: o.Model,
    data: o.Data,
    output: o.Output,
    methods: Methods = "all",
    seeds: Seeds = 3,
    budget: Budget = None,
    reference: Reference = None,
    metric: o.Metric = None,
    test_data: o.TestData = None,
    test_split: o.TestSplit = None,
    test_share: o.TestShare = 0.2,
    eval_data: o.EvalData = None,
    eval_split: o.EvalSplit = None,
    tune_share: o.TuneShare = 0.2,
    split: o.Split = None,
    text: o.Text = None,
    text_pair: o.TextPair = None,
    image: o.Image = None,
    label: o.Label = None,
    max_rows: MaxRows = None,
    problem_type: o.ProblemType = None,
    fresh_head: o.FreshHead = False,
    pooling: o.Pooling = None,
    epochs: Epochs = 2.0,
    start_epochs: StartEpochs = None,
    batch_size: BatchSize = 32,
    rates: Rates = "1e-4,3e-4",
    max_length: o.MaxLength = None,
    bf16: o.Bf16 = None,
    workers: Workers = None,
    plugin: Plugins = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Train methods side by side on your data and say which is best.

    All start from one fine-tune per seed and have equal epochs and learning rates to choose
    from. Learning rates, policies and thresholds are chosen on one part of the rows, and the
    methods are ranked on another. A run that was stopped goes on when the same command is given
    again, also with more methods or seeds.

    Examples:
      offramp compare bert-base-uncased --data train.csv --test-data test.csv -o which
      offramp compare my-classifier -d rows.csv -o which --methods pabee,deebert --seeds 5
      offramp compare roberta-base -d train.tsv -o which --budget 2h --max-rows 5000
    """
    given = dict(locals())
    console.setup(quiet, verbose)
    from offramp.comparison import compare as run

    given["methods"] = [name.strip() for name in methods.split(",") if name.strip()]
    given["rates"] = _each(rates, "--rates", float)
    given["budget"] = None if budget is None else seconds(budget)
    given["plugins"] = plugin or ()
    done = run(**o.passed(run, given))
    if json:
        console.say_json(_as_json(done))
    else:
        _show(done)
    if not done.complete:
        raise typer.Exit(UNFINISHED)


def seconds(text: str) -> float:
    """'90m' -> 5400. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not found or not float(found[1]):
        raise ConfigError(f"--budget is '{text}'; give a time such as 90m, 2h or 600s.")
    return float(found[1]) * _UNITS[found[2]]


def _each(text: str, option: str, kind: Callable[[str], T]) -> list[T]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} is '{text}'; give numbers with commas between.") from None


def _as_json(done: Compared) -> dict[str, object]:
    return {
        "folder": str(done.folder),
        "complete": done.complete,
        "missing": [one.model_dump(mode="json") for one in done.missing],
        "board": None if done.board is None else done.board.model_dump(mode="json"),
    }


def _show(done: Compared) -> None:
    if done.board is not None:
        from offramp.comparison.words import headline

        _table(done.board)
        console.say("", headline(done.board))
        console.say(f"All of it as a page: {done.folder / 'leaderboard.html'} (also .md, .json).")
    if done.missing:
        console.say("", f"Not done: {_missing(done)}", "The same command goes on with these.")


def _missing(done: Compared) -> str:
    """Failures one by one; what was not reached, in one phrase."""
    from offramp.comparison.running import NOT_YET

    later = [one.method for one in done.missing if one.why == NOT_YET]
    said = [
        f"{one.method} (seed {one.seed}: {one.why})" for one in done.missing if one.why != NOT_YET
    ]
    if later:
        runs = "1 run" if len(later) == 1 else f"{len(later)} runs"
        said.append(f"{runs} of {', '.join(dict.fromkeys(later))} ({NOT_YET})")
    return ", ".join(said)


def _table(board: Board) -> None:
    """One line a method; all scores x 100."""
    from offramp.comparison.words import partial

    head = ["method", "policy", "area", "full", "1.5x", "2x", "3x", "4x", "training"]
    rows = []
    for method in board.methods:
        at = [f"{100 * one.score.value:.1f}{_mark(method, one.target)}" for one in method.at]
        training = "" if method.times_plain is None else f"{method.times_plain:.2f}x"
        area, full = method.row.area.value, method.full_score.value
        lacking = partial(board, method)
        name = f"{method.name} ({lacking})" if lacking else method.name
        scores = [f"{100 * one:.1f}" for one in (area, full)]
        rows.append([name, method.chosen, *scores, *at, training])
    console.columns(head, rows)
    if any(_mark(method, one.target) for method in board.methods for one in method.at):
        console.say("* by another policy, the best there on tune: the page names it.")


def _mark(method: MethodRow, target: float) -> str:
    return "*" if method.family_at(target) != method.chosen else ""
