"""Figures into one HTML file: no network, no server, nothing that a text could run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datasets import Dataset

from offramp import __version__
from offramp.calibration import OperatingPoint, Outcome, PolicySpec
from offramp.calibration.sentences import options_text, policy_text
from offramp.errors import ConfigError
from offramp.evaluation import Speed
from offramp.report.examples import choose, inputs_by_id
from offramp.report.figures import Curve, Figures, by_budget
from offramp.report.templates import write_html
from offramp.table import ExitTable


def write_report(
    path: str | Path,
    table: ExitTable,
    point: PolicySpec | OperatingPoint = "full",
    *,
    title: str = "",
    metric: str | None = None,
    rows: Dataset | None = None,
    examples: bool = True,
    speed: Speed | None = None,
    price_per_hour: float | None = None,
    price_per_million: float | None = None,
    made: Mapping[str, object] | None = None,
) -> Path:
    """Write what a policy is worth on a table, beside every other policy; gives the path.

    Every figure is of this table's rows; those with broken scores are left out.

    Args:
        table: of any role; labels are optional.
        point: a point or a policy; `full` shows the trade-off with nothing chosen.
        title: what the model is called.
        metric: by default the point's, or the task's own.
        rows: those that the table was recorded on, to show some.
        examples: False leaves inputs and their texts out.
        speed: of the same policy, if it was measured.
        price_per_hour: of the machine that was timed; needs `speed`.
        price_per_million: what a million inputs cost at full depth.
        made: what else is to be said about how it was made.

    Raises:
        ConfigError: prices that are none.
        DataError: none of the rows is in the table.
        PointError: a point that was chosen for another model.
        OutputError: the file cannot be written.
    """
    check_price(price_per_hour, price_per_million, speed is not None)
    figures = Figures(table, point, metric)
    groups = choose(figures, inputs_by_id(rows, figures)) if examples else []
    price = Price.of(figures, speed, price_per_hour, price_per_million)
    curves = figures.curves()
    chosen = point if isinstance(point, OperatingPoint) else None
    return write_html(
        Path(path),
        title=title,
        figures=figures,
        outcome=figures.evaluation.outcome,
        exits=figures.exits(),
        curves=curves,
        budgets=by_budget(curves),
        overthinking=figures.overthinking(),
        classes=figures.classes(),
        groups=groups,
        speed=speed,
        price=price,
        chosen=chosen,
        made=_made(figures, chosen) | dict(made or {}),
        data=_data(figures, curves),
    )


class Price:
    """What a million inputs cost, at full depth and at the point.

    Attributes:
        per: `hour` of the timed machine, or `million` inputs at full depth.
        given: the user's number; 1 where none was given, to be changed on the page.
        lines: (name, what a million inputs cost at a price of 1, how that is known).
    """

    def __init__(self, per: str, given: float, lines: list[tuple[str, float, str]]) -> None:
        self.per, self.given, self.lines = per, given, lines

    @classmethod
    def of(
        cls, figures: Figures, speed: Speed | None, hour: float | None, million: float | None
    ) -> Price:
        """By the clock where it was measured, unless the price says otherwise."""
        cost = figures.evaluation.outcome.cost
        if speed is not None and million is None:
            scale = 1e6 / 3600 / speed.rows
            full, early = speed.full_seconds * scale, speed.early_seconds * scale
            ideal = full / speed.ideal
            lines = [
                ("Full depth", full, "measured"),
                ("Early exit", early, "measured"),
                ("Early exit, ideal", ideal, "if time followed the cost"),
            ]
            return cls("hour", 1.0 if hour is None else hour, lines)
        lines = [("Full depth", 1.0, "given"), ("Early exit", cost, "if the bill follows the cost")]
        if speed is not None:
            lines.append(("Early exit, timed", 1 / speed.speed_up, "measured speed-up"))
        return cls("million", 1.0 if million is None else million, lines)


def check_price(hour: float | None, million: float | None, timed: bool) -> None:
    """At most one price, above 0; one per hour needs a clock. Raises ConfigError."""
    for given in (hour, million):
        if given is not None and not (math.isfinite(given) and given > 0):
            raise ConfigError(f"A price must be a number above 0, not {given:g}.")
    if hour is not None and million is not None:
        raise ConfigError("Give a price per hour or a price per million inputs, not both.")
    if hour is not None and not timed:
        raise ConfigError(
            "A price per hour needs measured times, and none were measured. Give a price per "
            "million inputs at full depth, or let the clock be measured."
        )


def _made(figures: Figures, point: OperatingPoint | None) -> dict[str, object]:
    """What the figures rest on."""
    header = figures.table.header
    facts: dict[str, object] = {"policy": policy_text(figures.policy.to_dict())}
    if point is not None:
        facts["point"] = point.name
        facts["chosen for"] = point.target or "nothing: set by hand"
        facts["chosen on"] = f"{point.rows:,} rows of role {point.role}"
    return facts | {
        "these rows": f"{figures.table.rows:,} of role {header.role}",
        "rows left out": f"{figures.judge.excluded:,}, whose scores are NaN or infinite",
        "task": header.problem_type.replace("_", " "),
        "model": header.model_fingerprint,
        "processor": header.processor_fingerprint,
        "data": header.data_fingerprint,
        "recorded with": f"offramp {header.offramp}, engine {header.engine}, {header.dtype}",
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by offramp {__version__}",
    }


def _data(figures: Figures, curves: Sequence[Curve]) -> dict[str, Any]:
    """What the script draws."""
    outcome = figures.evaluation.outcome
    return {
        "rows": figures.table.rows,
        "metric": outcome.metric,
        "spread": figures.regression,
        "chosen": None if outcome.policy.name == "full" else _dot(outcome, outcome.policy.name),
        "curves": [
            {
                "name": curve.name,
                "baseline": curve.baseline,
                "dots": [_dot(one, options_text(one.policy.to_dict())) for one in curve.outcomes],
            }
            for curve in curves
        ],
        "full": {"score": outcome.full_score, "disagreement": 0.0, "cost": 1.0},
        "exits": [
            {
                "layer": exit.layer,
                "score": exit.outcome.score,
                "disagreement": exit.outcome.disagreement,
                "auroc": exit.auroc,
            }
            for exit in figures.exits()
        ],
    }


def _dot(outcome: Outcome, said: str) -> dict[str, Any]:
    return {
        "said": said,
        "cost": outcome.cost,
        "score": outcome.score,
        "disagreement": outcome.disagreement,
        "left": list(outcome.exit_histogram),
    }
