"""`offramp report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import console
from offramp.cli import options as o
from offramp.cli.tables import fingerprint_of, joined, recorded

if TYPE_CHECKING:
    from offramp.calibration import OperatingPoint

_MONEY = "Price"


def report(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|TABLE...",
            help="A multi-exit model, with rows as --data; or exit tables of one model.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "report.html"
    ),
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="Rows to measure MODEL on; with TABLE, its rows, for their texts.",
            rich_help_panel="Rows",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="With TABLE: whose point is shown.", show_default=False),
    ] = None,
    point: o.Point = "default",
    metric: o.Metric = None,
    examples: o.Examples = True,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour", help="Of the machine that is timed.", rich_help_panel=_MONEY
        ),
    ] = None,
    price_per_million: Annotated[
        float | None,
        typer.Option(
            "--price-per-million", help="Of inputs at full depth.", rich_help_panel=_MONEY
        ),
    ] = None,
    split: o.Split = None,
    text: o.Text = None,
    text_pair: o.TextPair = None,
    image: o.Image = None,
    label: o.Label = None,
    max_rows: o.MaxRows = None,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure MODEL's wall clock, too.")
    ] = True,
    device: o.Device = None,
    dtype: o.Dtype = None,
    backend: o.Backend = "torch",
    threads: o.Threads = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Write one HTML file that shows what early exit is worth: open it anywhere, send it.

    Score against cost of every policy, the chosen point, where rows leave, each exit alone,
    overthinking, drop per class, wall clock, price, and some inputs layer by layer. With
    --no-examples no text of yours is in it.

    Examples:
      offramp report my-offramp --data test.csv --price-per-hour 1.20
      offramp report my-offramp.tune --model my-offramp --no-examples
      offramp report test.table --model my-offramp --point fast --data test.csv -o fast.html
    """
    given = dict(locals())
    console.setup(quiet, verbose, threads)
    from offramp.errors import ConfigError
    from offramp.report import check_price
    from offramp.table.store import HEADER

    tables = [place for place in sources if Path(place, HEADER).is_file()]
    of_tables = len(sources) > 1 or bool(tables)
    if not of_tables and data is None:
        raise ConfigError(
            f"{sources[0]} holds no exit table, so it is taken for a model, which needs rows: "
            "give --data. Or give an exit table, made with `offramp record`."
        )
    if not of_tables and model is not None:
        raise ConfigError("--model goes with an exit table; MODEL brings its own points.")
    check_price(price_per_hour, price_per_million, timed=speed and not of_tables)
    written = _of_tables(given) if of_tables else _of_model(given)
    console.say(f"Written to {written}.")


def _of_tables(given: Mapping[str, Any]) -> Path:
    """From recorded rows: nothing is run."""
    from offramp.calibration import OperatingPoint
    from offramp.errors import PointError
    from offramp.report import write_report

    table = joined([Path(place) for place in given["sources"]])
    model, name = given["model"], given["point"]
    point: OperatingPoint | str = "full"
    if model is not None:
        table.check_model(fingerprint_of(model))
        point = point if name == "full" else OperatingPoint.load(model, name)
    elif name not in ("default", "full"):
        raise PointError(f"--point {name} lies beside a model's weights: say which with --model.")
    return write_report(
        given["output"],
        table,
        point,
        title=model.resolve().name if model else Path(given["sources"][0]).resolve().name,
        rows=_rows(given) if given["data"] is not None and given["examples"] else None,
        **_wishes(given),
    )


def _of_model(given: Mapping[str, Any]) -> Path:
    """From rows that are run through the model now."""
    from offramp.prediction import Predictor
    from offramp.report import write_report
    from offramp.tuning import facts_of, speed_on

    folder = given["sources"][0]
    how = {name: given[name] for name in ("device", "dtype", "backend")}
    predictor = Predictor.load(folder, given["point"], **how)
    rows = _rows(given)
    early = predictor.policy.name != "full"
    with recorded(predictor, rows, given["quiet"]) as table:
        clock = speed_on(predictor, rows, predictor.policy) if given["speed"] and early else None
        return write_report(
            given["output"],
            table,
            _point(folder, given["point"]),
            title=Path(folder).resolve().name if Path(folder).is_dir() else folder,
            rows=rows,
            speed=clock,
            made=facts_of(predictor, clock),
            **_wishes(given),
        )


def _point(folder: str, name: str) -> OperatingPoint | str:
    """The point of that name; without one, full depth, as `predict` does."""
    from offramp.calibration import OperatingPoint, list_points
    from offramp.model.folder import resolve

    path = resolve(folder)
    return OperatingPoint.load(path, name) if name in list_points(path) else "full"


def _rows(given: Mapping[str, Any]) -> Any:
    from offramp.data import load_examples

    return load_examples(given["data"], **o.passed(load_examples, given))


def _wishes(given: Mapping[str, Any]) -> dict[str, Any]:
    names = ("metric", "examples", "price_per_hour", "price_per_million")
    return {name: given[name] for name in names}
