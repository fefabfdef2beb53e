"""The menu of the documentation, for mkdocs: `folder/*` stands for the pages of that folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Spell the menu out; a new page needs no line of its own."""
    config.nav = [*_spelt_out(config.nav, Path(config.docs_dir))]
    return config


def _spelt_out(menu: list[Any], docs: Path) -> Iterator[Any]:
    for item in menu:
        if isinstance(item, str) and item.endswith("/*"):
            folder = docs / item.removesuffix("/*")
            yield from (str(page.relative_to(docs)) for page in sorted(folder.glob("*.md")))
        elif isinstance(item, dict):
            yield {
                title: [*_spelt_out(inner, docs)] if isinstance(inner, list) else inner
                for title, inner in item.items()
            }
        else:
            yield item
