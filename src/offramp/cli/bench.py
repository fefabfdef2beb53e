"""`offramp bench`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from offramp.cli import console
from offramp.cli import options as o
from offramp.errors import ConfigError

if TYPE_CHECKING:
    from offramp.benchmark import Bench
    from offramp.benchmark.document import Workload

T = TypeVar("T")
_WHO, _CLOCK = "What takes part", "The clock"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder or hub id of a model, or an architecture such as bert-base.",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        help="File of texts whose lengths are measured; else the built-in docstrings.",
        rich_help_panel="Rows",
        show_default=False,
    ),
]
Rows = Annotated[int, typer.Option("--rows", help="How many rows.", rich_help_panel="Rows")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Points = Annotated[
    list[str] | None,
    typer.Option(
        "--point",
        help="Operating point of the folder, for the engines it was chosen on; repeatable; "
        "else 'default'.",
        rich_help_panel=_WHO,
    ),
]
Depths = Annotated[
    str | None,
    typer.Option(
        "--depths",
        help="Mean exit depths to force in percent; else 25,50,75 where no point was chosen.",
        rich_help_panel=_WHO,
    ),
]
Backends = Annotated[
    str,
    typer.Option("--backends", help="Of torch, inductor, onnx and openvino.", rich_help_panel=_WHO),
]
Precisions = Annotated[
    str,
    typer.Option("--precisions", help="Of fp32, bf16, fp16 and int8.", rich_help_panel=_WHO),
]
BatchSizes = Annotated[
    str | None,
    typer.Option(
        "--batch-sizes",
        help="Beside a stream of rows; else 1,8,32,128, as far as there are rows.",
        rich_help_panel=_WHO,
    ),
]
Memory = Annotated[
    bool,
    typer.Option("--memory/--no-memory", help="Peak memory of each.", rich_help_panel=_WHO),
]
Passes = Annotated[
    int | None,
    typer.Option(
        "--passes", help="Over all rows; else as the time allows.", rich_help_panel=_CLOCK
    ),
]
Minutes = Annotated[
    float,
    typer.Option(
        "--minutes", help="About how long to time, 3 passes at least.", rich_help_panel=_CLOCK
    ),
]
Threads = Annotated[
    str | None,
    typer.Option(
        "--threads",
        help="Of every runtime; else torch's. Of several, such as 1,2,4, the fastest is told.",
        rich_help_panel=_CLOCK,
    ),
]


def bench(
    model: Model,
    data: Data = None,
    output: Output = Path("bench"),
    point: Points = None,
    depths: Depths = None,
    backends: Backends = "torch,onnx,openvino",
    precisions: Precisions = "fp32,int8",
    batch_sizes: BatchSizes = None,
    rows: Rows = 128,
    split: o.Split = None,
    text: o.Text = None,
    text_pair: o.TextPair = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Longest text in tokens.", rich_help_panel="Rows"),
    ] = None,
    passes: Passes = None,
    minutes: Minutes = 10.0,
    threads: Threads = None,
    memory: Memory = True,
    device: o.Device = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Time all engines and precisions side by side, and what you have without offramp.

    Latency, throughput and a stream of real lengths, at full depth and with early exit, beside
    plain transformers, ONNX Runtime, OpenVINO and half of the layers: warm, in turns, in one run.
    Where rows leave is an operating point or, on engines and in precisions that it was not chosen
    for, forced, which says what leaving saves and nothing about answers.

    Examples:
      offramp bench my-offramp --data texts.csv
      offramp bench bert-base --backends torch,onnx --threads 1,2,4
      offramp bench my-classifier --depths 50 --minutes 3 -o speed
    """
    given = dict(locals())
    console.setup(quiet, verbose)
    from offramp.benchmark import bench as run

    given["backends"] = _each(backends, "--backends", str)
    given["precisions"] = _each(precisions, "--precisions", str)
    sizes = batch_sizes
    given["batch_sizes"] = None if sizes is None else _each(sizes, "--batch-sizes", int)
    given["threads"] = None if threads is None else _each(threads, "--threads", int)
    given["depths"] = None if depths is None else _shares(depths)
    given["points"] = point or None
    columns = {name: given[name] for name in ("split", "text", "text_pair")}
    done = run(**o.passed(run, given), **columns)
    if json:
        console.say_json(done.model_dump(mode="json"))
    else:
        _show(done, output)


def _each(text: str, option: str, kind: Callable[[str], T]) -> list[T]:
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option} is '{text}'; give numbers with commas between.") from None


def _shares(text: str) -> list[float]:
    """'25,50' -> 0.25 and 0.5."""
    return [percent / 100 for percent in _each(text.replace("%", ""), "--depths", float)]


def _show(done: Bench, output: Path) -> None:
    from offramp.benchmark.words import exits, headline
    from offramp.benchmark.words import threads as told

    console.say(f"{done.model}, ms a row (median):")
    _times(done)
    if any(one.leaves for one in done.contenders):
        console.say("", "Speed-up by early exit, of the ideal, and the share realised:")
        _gains(done)
    if done.others:
        console.say("", "Fastest number of threads, and ms a row on it:")
        _by_threads(done)
        console.say("", told(done), "All other figures are those on it.")
    console.say("", headline(done), exits(done))
    for one in done.skipped:
        console.say(f"Left out: {', '.join(one.names)}. {one.why}")
    console.say(f"All of it as a page: {output / 'bench.html'} (also bench.json).")


def _times(done: Bench) -> None:
    from offramp.benchmark.words import figure

    weighed = any(one.peak_megabytes for one in done.contenders)
    head = ["contender", *(work.name for work in done.workloads), *(["peak MB"] * weighed)]
    rows = []
    for one in done.contenders:
        cells = [
            figure(work.of(one.name).ms.median) if work.has(one.name) else ""
            for work in done.workloads
        ]
        if weighed:
            cells.append("" if one.peak_megabytes is None else figure(one.peak_megabytes))
        rows.append([one.name, *cells])
    console.columns(head, rows)


def _gains(done: Bench) -> None:
    rows = []
    for one in done.contenders:
        if one.leaves is not None:
            rows.append([one.name, *(_gain(work, one.name) for work in done.workloads)])
    console.columns(["contender", *(work.name for work in done.workloads)], rows)


def _by_threads(done: Bench) -> None:
    rows = []
    for one in done.contenders:
        tried = [done.by_threads(work.name, one.name) for work in done.workloads]
        rows.append([one.name, *(_fastest(each) for each in tried)])
    console.columns(["contender", *(work.name for work in done.workloads)], rows)


def _fastest(tried: Mapping[int, float]) -> str:
    from offramp.benchmark.words import figure

    if not tried:
        return ""
    count = min(tried, key=lambda count: tried[count])
    return f"{count}: {figure(tried[count])}"


def _gain(work: Workload, name: str) -> str:
    gain = work.of(name).early if work.has(name) else None
    if gain is None:
        return ""
    share = f"{gain.realised_share:.0%}"
    return f"{gain.speed_up.median:.2f}x of {gain.ideal:.2f}x, {share:>4}"
