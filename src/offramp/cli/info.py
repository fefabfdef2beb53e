"""`offramp info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from offramp.cli import console, report
from offramp.cli import options as o


def info(
    folder: o.Model,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Say what a folder holds: a multi-exit model, a stock model, or an exit table.

    Examples:
      offramp info my-offramp
      offramp info bert-base-uncased
      offramp info my-offramp.tune --json
    """
    console.setup(quiet, verbose)
    facts = _facts(folder)
    if json:
        console.say_json(facts)
    else:
        _show(facts)


def say_made(folder: Path) -> None:
    """Tell scripts where a folder is that was just written, and what it holds."""
    console.say_json({"folder": str(folder), **_facts(str(folder))})


def _facts(folder: str) -> dict[str, Any]:
    from offramp.model.folder import is_ours, resolve
    from offramp.table.store import HEADER

    if Path(folder, HEADER).is_file():
        return _table(folder)
    path = resolve(folder)
    return _ours(path) if is_ours(path) else _stock(path)


def _table(folder: str) -> dict[str, Any]:
    from offramp.table import ExitTable

    header = ExitTable.open(folder).header
    said = header.model_dump(mode="json", exclude={"columns", "schema_version"})
    columns = {name: list(column.shape) for name, column in header.columns.items()}
    return {"is": "exit table", **said, "columns": columns}


def _ours(path: Path) -> dict[str, Any]:
    from offramp.calibration import list_points
    from offramp.engines.recording import label_names
    from offramp.model import MultiExitModel

    model = MultiExitModel.from_pretrained(path)
    added = sum(weights.numel() for weights in model.exits.parameters())
    return {
        "is": "multi-exit model",
        "architecture": model.config.stock["model_type"],
        "depth": model.depth,
        "exits": f"after layers 1 to {model.depth - 1}, and the model's own head",
        "exits_read": model.config.exit_kind().reads,
        "method": model.config.method,
        "problem_type": model.problem_type,
        "labels": list(label_names(model)),
        "parameters": model.num_parameters(),
        "parameters_added": added,
        "fingerprint": model.fingerprint(),
        "points": [_point(path, name) for name in list_points(path)],
    }


def _point(path: Path, name: str) -> dict[str, Any]:
    """A point, or why there is none: the others are told of all the same."""
    from offramp.calibration import OperatingPoint
    from offramp.errors import PointError

    try:
        return OperatingPoint.load(path, name).model_dump(mode="json")
    except PointError as problem:
        return {"name": name, "broken": str(problem)}


def _stock(path: Path) -> dict[str, Any]:
    """A stock folder: is it supported, and if not, why."""
    from offramp.engines.recording import label_names
    from offramp.errors import OfframpError
    from offramp.model import MultiExitModel
    from offramp.model.folder import CONFIG
    from offramp.storage import read_json

    config = read_json(path / CONFIG)
    facts = {"is": "stock model", "architecture": config.get("model_type")}
    try:
        model = MultiExitModel.from_pretrained(path)
    except OfframpError as problem:
        return {**facts, "supported": False, "why": str(problem)}
    return {
        **facts,
        "supported": True,
        "depth": model.depth,
        "problem_type": model.problem_type,
        "labels": list(label_names(model)),
        "parameters": model.stock.num_parameters(),
    }


def _show(facts: dict[str, Any]) -> None:
    from offramp.calibration import OperatingPoint

    points = facts.pop("points", None)
    console.facts({name.replace("_", " "): _said(value) for name, value in facts.items()})
    if points is None:
        return
    if not points:
        console.say("", "No operating point yet. Make one: offramp tune, offramp calibrate.")
        return
    sound = [point for point in points if "broken" not in point]
    if sound:
        heads = ["name", "policy", "chosen on", "metric", "full depth", "score", "cost reduction"]
        console.say("", "Operating points:")
        console.columns([f"  {heads[0]}", *heads[1:], "for"], [_row(point) for point in sound])
    for point in points:
        if "broken" in point:
            console.say("", f"{point['name']} cannot be used: {point['broken']}")
        elif promise := OperatingPoint.model_validate(point).promise():
            console.say("", f"{point['name']}: {promise}")


def _row(point: dict[str, Any]) -> list[str]:
    scored = point["score"] is not None
    return [
        f"  {point['name']}",
        report.policy_text(point["policy"]),
        f"{point['rows']:,} rows",
        point["metric"] or "no labels",
        f"{point['full_score']:.4f}" if scored else "",
        f"{point['score']:.4f}" if scored else "",
        f"{point['cost_reduction']:.2f}x",
        f"{point['engine']}, {point['dtype']}",
    ]


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value[:8])) + (f", ... ({len(value)})" if len(value) > 8 else "")
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(part)}" for name, part in value.items())
    return str(value)
