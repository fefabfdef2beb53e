"""The files of a room that are filled in; those of this room serve the others, too."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.errors import OutputError
from offramp.report.words import money
from offramp.storage import whole_file

if TYPE_CHECKING:
    from jinja2 import Environment

_ROOM = "report"


@cache
def pages(room: str = _ROOM) -> Environment:
    """Templates of a room, then those of this one; what is put into them is escaped."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=ChoiceLoader([PackageLoader("offramp", name) for name in (room, _ROOM)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["money"] = money
    found.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return found


def asset(name: str, room: str = _ROOM) -> str:
    """The text of a file of a room, or nothing where it has none of that name."""
    file = files(f"offramp.{room}").joinpath(name)
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def write_html(path: Path, room: str = _ROOM, **values: Any) -> Path:
    """Fill in the page of a room, in the look of this one, and write it, whole or not at all.

    Args:
        path: of the file.
        room: has `page.html`, `page.css` and, where it needs one, `page.js`, the only script that
            the page allows.
        values: what the page names; `title` and `data` among them.

    Raises:
        OutputError: the path is a folder, or cannot be written.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file, such as {room}.html.")
    script = asset("page.js", room)
    text = (
        pages(room)
        .get_template("page.html")
        .render(
            script=script,
            style="".join(asset("page.css", name) for name in dict.fromkeys((_ROOM, room))),
            digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            **values,
        )
    )
    with whole_file(path) as staged:
        # a lone surrogate, which JSON may hold, becomes a question mark
        staged.write_bytes(text.encode("utf-8", "replace"))
    return path
