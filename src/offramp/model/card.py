"""What `save_pretrained` says of a model in the README.md of its folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import try_to_load_from_cache

from offramp.calibration import OperatingPoint
from offramp.calibration.listing import PART, points_text, set_metrics
from offramp.card import (
    README,
    escaped,
    part,
    read_card,
    say_untouched,
    with_front,
    with_part,
    without_part,
)
from offramp.methods import METHODS

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData
    from jinja2 import Template

    from offramp.model.modeling import MultiExitModel

CARD = "card"
LIBRARY, TAGS = "offramp", ("offramp", "early-exit", "dynamic-depth")
LABELS = 20
_HINT = "<!-- This part is written anew with every save. What you write above or below stays. -->"
_TASKS = {
    "single_label_classification": "one label",
    "multi_label_classification": "any number of labels",
    "regression": "a number",
}


def card_for(
    model: MultiExitModel, folder: Path, points: Sequence[OperatingPoint], picture: bool
) -> str | None:
    """The text of the folder's card; None where the README.md there is the owner's own.

    Args:
        points, picture: what will lie in the folder.
    """
    path = folder / README
    old = read_card(path) if os.path.lexists(path) else ""
    if old is not None and not old.strip():
        old = part(CARD, "") + "\n"
    text = old and with_part(old, CARD, f"{_HINT}\n\n{_text(model, points, picture)}")
    text = text and with_front(text, lambda data: _set_front(data, model, points))
    if text is None:
        say_untouched(path)
    return text


def stock_card(folder: Path) -> str | None:
    """What stays of the folder's card under a stock model: what its owner wrote.

    None where the README.md there is the owner's own, or none at all.
    """
    old = read_card(folder / README)
    text = old and without_part(old, CARD)
    return text and with_front(text, _unset_front)


def _set_front(
    data: ModelCardData, model: MultiExitModel, points: Sequence[OperatingPoint]
) -> None:
    """What the hub sorts models by; tags join those of the owner, whose base model stays."""
    data.base_model = data.base_model or base_model(str(model.stock.name_or_path or ""))
    data.library_name = LIBRARY
    data.pipeline_tag = f"{'image' if _sees_images(model) else 'text'}-classification"
    data.tags = list(dict.fromkeys([*(data.tags or []), *TAGS, model.config.stock["model_type"]]))
    set_metrics(data, points)


def _unset_front(data: ModelCardData) -> None:
    data.library_name = data.metrics = None
    data.tags = [tag for tag in data.tags or [] if tag not in TAGS] or None


def base_model(source: str) -> str | None:
    """The hub id by which a stock model was loaded; None for a folder that is no download."""
    place = Path(source)
    kind, *owner_and_name = place.parent.parent.name.split("--")
    if place.parent.name == "snapshots" and kind == "models":
        return "/".join(owner_and_name)
    try:
        known = None if place.exists() else try_to_load_from_cache(source, "config.json")
    except (ValueError, OSError):
        return None
    return source if isinstance(known, str) else None


def _sees_images(model: MultiExitModel) -> bool:
    return model.stock.main_input_name == "pixel_values"


def _text(model: MultiExitModel, points: Sequence[OperatingPoint], picture: bool) -> str:
    images, regression = _sees_images(model), model.problem_type == "regression"
    example = '"photo.png"' if images else '"A dull story."'
    return _template().render(
        architecture=escaped(model.config.stock["model_type"]),
        task=f"{'an image' if images else 'text'} in, {_TASKS[model.problem_type]} out",
        depth=model.depth,
        regression=regression,
        example=example,
        points=part(PART, points_text(points, picture)),
        parameters=model.num_parameters(),
        added=sum(weights.numel() for weights in model.exits.parameters()),
        exits=_exits(model.depth),
        reads=_reads(model),
        method=_method(str(model.config.method)),
        labels="" if regression else _labels(model),
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    pages = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = files("offramp.model").joinpath("card.md").read_text(encoding="utf-8")
    return pages.from_string(text)


def _exits(depth: int) -> str:
    own = f"the model's own head after layer {depth}"
    if depth == 1:
        return own
    return f"one after {'layer 1' if depth == 2 else f'each of layers 1 to {depth - 1}'}, and {own}"


def _reads(model: MultiExitModel) -> str:
    return model.config.exit_kind().reads


def _method(name: str) -> str:
    if name == "attach":
        return (
            "`attach`: exits that learned the answers of a finished model, which stayed as it was"
        )
    if name in METHODS:
        return f"`{name}`: {escaped(METHODS[name].paper)}"
    return escaped(name)


def _labels(model: MultiExitModel) -> str:
    names = {int(number): name for number, name in (model.config.id2label or {}).items()}
    said = [escaped(names[number]) for number in sorted(names)[:LABELS]]
    more = f", and {len(names) - LABELS} more, see config.json" if len(names) > LABELS else ""
    return ", ".join(said) + more
