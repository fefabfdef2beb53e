"""What a released folder shows of its operating points: a part of its model card, and a picture.

The picture names the points that are drawn in it, each with a fingerprint, so that it can be told
when it is no longer true.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from offramp.calibration.sentences import options_text
from offramp.card import (
    README,
    escaped,
    markdown_table,
    read_card,
    say_untouched,
    with_front,
    with_part,
    write_card,
)
from offramp.storage import fingerprint

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from offramp.calibration.point import OperatingPoint

logger = logging.getLogger("offramp")

PART, PICTURE = "points", "trade-off.svg"
_DRAWN = re.compile(r'data-points="([^"]*)"')
_HUB = {
    "f1_micro": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "neg_mse": "mse",
    "neg_mae": "mae",
}
"""Metrics that have another name on the hub."""

_NONE = """\
There is none yet, so every row runs to full depth. To choose one on rows of your own:

```console
$ offramp tune . --data rows.csv --max-drop 1%
```"""


def refresh(folder: Path, points: Sequence[OperatingPoint]) -> None:
    """Make card and picture of a released folder true again; a card that is not ours stays."""
    keeps = picture_fits(folder, points)
    if not keeps and drawn(folder) is not None:
        (folder / PICTURE).unlink()
    old = read_card(folder / README)
    if old is None:
        return
    text = with_part(old, PART, points_text(points, keeps))
    text = text and with_front(text, lambda data: set_metrics(data, points))
    if text is None:
        say_untouched(folder / README)
    elif text != old:
        write_card(folder / README, text)


def stamp(points: Sequence[OperatingPoint]) -> str:
    """Names of points and fingerprints of what is in them."""
    return " ".join(f"{p.name}={fingerprint(p.model_dump_json())[:16]}" for p in points)


def drawn(folder: Path) -> set[str] | None:
    """The stamps in a folder's picture; None where there is no picture of ours."""
    try:
        text = (folder / PICTURE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    found = _DRAWN.search(text)
    return set(found[1].split()) if found else None


def picture_fits(folder: Path, points: Sequence[OperatingPoint]) -> bool:
    """Whether there is a picture, and every point in it is still what it was."""
    shown = drawn(folder)
    return shown is not None and shown <= set(stamp(points).split())


def set_metrics(data: ModelCardData, points: Sequence[OperatingPoint]) -> None:
    """Name the metrics that were measured, as the hub calls them."""
    metrics = {point.metric for point in points if point.metric is not None}
    data.metrics = sorted({_HUB.get(metric, metric) for metric in metrics}) or None


def points_text(points: Sequence[OperatingPoint], picture: bool) -> str:
    """The card's part on operating points."""
    if not points:
        return f"## Operating points\n\n{_NONE}"
    said = [
        "## Operating points",
        f"A point says which policy decides where rows leave, and how strict it is. {_use(points)}",
        _table(points),
        _notes(points),
    ]
    if picture:
        what = "Disagreement with full depth" if points[0].score is None else "Score"
        said.append(f"![{what} against cost of every policy that was tried]({PICTURE})")
    return "\n\n".join(said)


def _use(points: Sequence[OperatingPoint]) -> str:
    names = [point.name for point in points]
    other = next((name for name in names if name != "default"), None)
    if other is None:
        return '`default` is used unless a call says `point="full"`, which is full depth.'
    how = f'`point="{other}"` in Python and `--point {other}` on the command line'
    if "default" in names:
        return f"`default` is used unless another is named, with {how}; `full` is full depth."
    return f"None here is called `default`, so name one, with {how}; else rows run to full depth."


def _table(points: Sequence[OperatingPoint]) -> str:
    head = ["point", "policy", "setting", "target", "rows", "metric", "full depth", "score"]
    return markdown_table([*head, "disagreement", "cost reduction"], [_row(p) for p in points])


def _row(point: OperatingPoint) -> list[str]:
    regression = point.problem_type == "regression"
    return [
        f"`{point.name}`",
        escaped(point.policy["name"]),
        escaped(options_text(point.policy)),
        escaped(point.target or "none, set by hand"),
        f"{point.rows:,}",
        escaped(point.metric or "no labels"),
        "" if point.full_score is None else f"{point.full_score:.4f}",
        "" if point.score is None else f"{point.score:.4f}",
        f"{point.disagreement:.4f}" if regression else f"{point.disagreement:.2%}",
        f"{point.cost_reduction:.2f}x",
    ]


def _notes(points: Sequence[OperatingPoint]) -> str:
    if points[0].problem_type == "regression":
        strayed = "the mean distance from the answers of full depth, in their standard deviations"
    else:
        strayed = "the share of answers that are not those of full depth"
    said = [
        "All figures are of the rows on which a point was chosen, which flatters it a little, "
        "unless a proof is named.",
        "Cost reduction is the FLOPs of full depth over those executed: counted, not timed.",
        f"Disagreement is {strayed}.",
    ]
    if any((point.metric or "").startswith("neg_") for point in points):
        said.append("A metric that begins with `neg_` is minus an error: higher is better.")
    if any(point.policy["name"] == "full" for point in points):
        said.append("The policy `full` means that early exit did not pay at that target.")
    said += [
        f"`{point.name}`: {point.promise()} Its figures are of the rows of the proof."
        for point in points
        if point.certificate is not None
    ]
    said += [
        f"Thresholds depend on what computes the scores: `{point.name}` is for `--backend "
        f"{point.engine} --dtype {point.dtype}` alone."
        for point in points
        if point.dtype != "float32"
    ]
    return " ".join(said)
