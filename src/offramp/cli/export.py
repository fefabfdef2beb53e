"""`offramp export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli import console, report
from offramp.cli import options as o

if TYPE_CHECKING:
    from offramp.prediction import Exported


def export(
    folder: o.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file, .onnx or .xml.", show_default=False)
    ],
    point: o.Point = "default",
    format: Annotated[str, typer.Option("--format", help="onnx or openvino.")] = "onnx",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="fp32, or int8 for layers in 8 bits.")
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Write one ONNX file that answers easy inputs early, to run without offramp.

    It runs in plain ONNX Runtime, in any language, on batches of any size; with --format openvino
    in plain OpenVINO, as an .xml with a .bin beside it. Thresholds stay an input of each call;
    NaN stands for the point's own.

    Examples:
      offramp export my-offramp --output model.onnx
      offramp export my-offramp -o model.int8.onnx --dtype int8 --point fast
      offramp export my-offramp -o model.xml --format openvino
    """
    console.setup(quiet, verbose)
    from offramp.prediction.exporting import export as run

    done = run(
        folder, output, point=point, dtype=dtype, format=format, progress=not (quiet or json)
    )
    if json:
        console.say_json(
            {
                "file": str(done.path),
                "bytes": done.bytes,
                "inputs": done.inputs,
                "outputs": done.outputs,
                "bar": done.bar,
                "bars": done.bars,
                "policy": done.policy,
            }
        )
    elif not quiet:
        console.facts(
            {
                "written": f"{done.path}, {done.bytes / 1e6:.1f} MB",
                "policy": report.policy_text(done.policy),
                "inputs": ", ".join(done.inputs),
                "outputs": ", ".join(done.outputs),
                **_thresholds(done),
            }
        )


def _thresholds(done: Exported) -> dict[str, str]:
    said = {} if done.bar is None else {"bar": f"NaN, or a number; NaN is {done.bar:g}"}
    if done.bars is not None:
        own = ", ".join("never" if bar is None else f"{bar:g}" for bar in done.bars)
        said["bars"] = f"NaN, or a number, for each exit; NaN is {own}"
    return said
