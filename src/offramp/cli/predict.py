"""`offramp predict`."""

from __future__ import annotations

import json as text_of
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import console
from offramp.cli import options as o

if TYPE_CHECKING:
    from offramp.prediction import Predictor, Summary

_STDIN = 0


def predict(
    folder: o.Folder,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT]...",
            help="Texts, files of images, or - for lines of stdin.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="CSV, TSV, JSONL or Parquet file (plain or .gz), folder of images, or hub id.",
            rich_help_panel="Rows",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=".jsonl, .csv (or .gz) or .parquet; else stdout."),
    ] = None,
    point: o.Point = "default",
    scores: Annotated[
        bool, typer.Option("--scores", help="The scores of all classes, too.")
    ] = False,
    sets: Annotated[
        bool,
        typer.Option("--sets", help="The classes that may be right, too; see tune --sets."),
    ] = False,
    certified: Annotated[
        bool, typer.Option("--certified", help="Refuse a point without a certificate.")
    ] = False,
    max_depth: o.MaxDepth = None,
    max_seconds: o.MaxSeconds = None,
    points: o.PointColumn = None,
    watch: o.Watch = None,
    audit: o.Audit = "1%",
    on_alarm: o.OnAlarm = "warn",
    split: o.Split = None,
    text: o.Text = None,
    text_pair: o.TextPair = None,
    image: o.Image = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="<str>",
            help="Column to write beside each answer, as an id; may be given again.",
            rich_help_panel="Rows",
            show_default=False,
        ),
    ] = None,
    max_rows: o.MaxRows = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    backend: o.Backend = "torch",
    threads: o.Threads = None,
    json: Annotated[
        bool, typer.Option("--json", help="With --output: the summary as JSON on stdout.")
    ] = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Answer texts or images, each at the layer where the answer is good enough.

    Without --output, one JSON line per row goes to stdout. With it, a run that was stopped
    goes on where it was when the same command is given again.

    INPUT - reads lines from stdin, texts or JSON objects, and answers them as they arrive.

    Examples:
      offramp predict my-offramp "A dull story." "What a film!"
      offramp predict my-offramp --data new.jsonl.gz -o answers.parquet --point fast --keep id
      offramp predict my-offramp -d new.csv -o answers.csv --watch watch.json --audit 1%
      offramp predict my-offramp -d new.csv -o answers.csv --max-depth 6 --point-column plan
      tail -f texts.log | offramp predict my-offramp -
    """
    given = dict(locals())
    console.setup(quiet, verbose, threads)
    _check(given)
    from offramp.engines import Budget
    from offramp.prediction import Predictor

    how = {"scores": scores, "sets": sets, "budget": Budget(max_depth, max_seconds)}
    predictor = Predictor.load(
        folder, point, device=device, dtype=dtype, backend=backend, certified=certified
    )
    with _watched(predictor, watch, audit, on_alarm):
        _answer(predictor, how, given)


def _check(given: Mapping[str, Any]) -> None:
    """Refuse options that do not go together. Raises ConfigError."""
    from offramp.errors import ConfigError

    if bool(given["inputs"]) == (given["data"] is not None):
        raise ConfigError("Give either inputs or --data FILE.")
    if given["inputs"] and str(given["output"] or "-") != "-":
        raise ConfigError("--output is for --data; answers to inputs go to stdout.")
    if given["watch"] is None and (given["audit"], given["on_alarm"]) != ("1%", "warn"):
        raise ConfigError("--audit and --on-alarm need --watch FILE, which keeps what is seen.")
    if given["points"] is not None and given["inputs"] not in ([], None, ["-"]):
        raise ConfigError("--point-column is for --data and for lines of JSON; give --point.")
    if given["sets"] and given["points"] is not None:
        raise ConfigError("--sets belong to one point, so they do not go with --point-column.")
    if given["keep"] and given["data"] is None:
        raise ConfigError("--keep names a column of --data FILE.")
    if given["max_seconds"] is not None and given["backend"] not in ("torch", "inductor"):
        raise ConfigError("--max-seconds needs --backend torch or inductor: a file has no clock.")


def _answer(predictor: Predictor, how: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Lines of stdin, rows to stdout, or a file."""
    from offramp.data import load_examples
    from offramp.prediction import predict as stream
    from offramp.prediction import predict_file
    from offramp.prediction.lines import predict_lines

    inputs, data, output = given["inputs"], given["data"], given["output"]
    if inputs == ["-"]:
        named = {name: given[name] for name in ("text", "text_pair", "image", "points")}
        for entries in predict_lines(predictor, _STDIN, **how | named):
            _say(entries)
            console.flush()
        return
    columns: dict[str, Any] = {} if inputs else o.passed(load_examples, given)
    if data is None or output is None or str(output) == "-":
        _say(stream(predictor, inputs or data, **how, **columns))
        return
    quiet = given["quiet"]
    summary = predict_file(predictor, data, output, progress=not quiet, **how, **columns)
    if given["json"]:
        console.say_json(_as_json(summary))
    elif not quiet:
        _show(summary)


@contextmanager
def _watched(predictor: Predictor, path: Path | None, audit: str, on_alarm: str) -> Iterator[None]:
    """Watch the predictor's point, if a file for that is given."""
    if path is None:
        yield
        return
    watch = predictor.watch(audit, path, on_alarm)
    watch.monitor.save(path)  # a place that cannot be written is found before the work
    try:
        yield
    finally:
        watch.close()
        logging.getLogger("offramp").info("%s", watch.monitor.words())


def _say(entries: Iterable[dict[str, Any]]) -> None:
    for entry in entries:
        console.say(text_of.dumps(entry, ensure_ascii=False, allow_nan=False))


def _as_json(summary: Summary) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        **asdict(summary),
        "mean_exit_layer": summary.mean_exit_layer,
        "rows_per_second": summary.rows_per_second,
    }


def _show(summary: Summary) -> None:
    facts = {"written": f"{summary.rows:,} rows to {summary.output}"}
    if summary.errors:
        facts["errors"] = f"{summary.errors:,} rows with scores that are NaN or infinite"
    if summary.forced:
        facts["forced"] = f"{summary.forced:,} rows to leave by their budget"
    if summary.resumed:
        facts["from before"] = f"{summary.resumed:,} rows"
    if summary.mean_exit_layer is not None:
        depth = len(summary.exit_histogram)
        facts["mean exit layer"] = f"{summary.mean_exit_layer:.2f} of {depth}"
    facts["time"] = f"{summary.seconds:.1f} s, {summary.rows_per_second:,.0f} rows/s"
    console.facts(facts)
    console.say("", "Where rows leave:")
    console.histogram(summary.exit_histogram)
