"""Fail where a built site would load something from elsewhere.

    python tools/check_site.py FOLDER

Links that a reader may click are fine; scripts, styles, fonts and images must lie in the folder.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
NOT_LOADED = {"canonical", "next", "prev", "alternate"}
ELSEWHERE = re.compile(r"^\s*(?:https?:)?//", re.IGNORECASE)
IN_STYLES = re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


class _Page(HTMLParser):
    """Collects what a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        address = given.get(LOADS.get(tag, ""), "")
        loaded = tag != "link" or not set(given.get("rel", "").split()) <= NOT_LOADED
        if loaded and ELSEWHERE.match(address):
            self.found.append(address)
        self.found += IN_STYLES.findall(given.get("style", ""))


def elsewhere(path: Path) -> Iterator[str]:
    """Addresses that a page or style sheet loads from another host."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".html":
        page = _Page()
        page.feed(text)
        yield from page.found
    yield from IN_STYLES.findall(text)


def main(folder: str) -> int:
    """Name what is loaded from elsewhere; 1 if anything is."""
    pages = [path for path in sorted(Path(folder).rglob("*")) if path.suffix in (".html", ".css")]
    found = [f"{path}: {address}" for path in pages for address in elsewhere(path)]
    for line in found:
        print(line, file=sys.stderr)
    print(f"{folder}: {len(pages)} pages and styles, {len(found)} loads from elsewhere")
    return 1 if found or not pages else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
