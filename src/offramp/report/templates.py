"""The files of this room that are filled in."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from offramp.report.words import money

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def pages() -> Environment:
    """Templates of this room; what is put into them is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("offramp", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["money"] = money
    found.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return found


def asset(name: str) -> str:
    """The text of a file of this room."""
    return files("offramp.report").joinpath(name).read_text(encoding="utf-8")
