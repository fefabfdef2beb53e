"""Pages as a browser would read them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


@dataclass
class Page(HTMLParser):
    """What a browser would make of it: elements, the texts in them, and the embedded data."""

    path: Path
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.source = self.path.read_bytes().decode()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        inside = self.tags[-1][0] if self.tags else ""
        if inside in ("script", "style") and data.strip():
            self.scripts.append(data)
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def headings(self) -> list[str]:
        found = re.findall(r"<h2[^>]*>(.*?)</h2>", self.source)
        return [re.sub("<.*?>", "", heading) for heading in found]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[-2])


def assert_asks_for_nothing(page: Page) -> None:
    """No address is in it but its own parts, and it forbids itself to ask for any."""
    links = [attrs[name] for _, attrs in page.tags for name in ("src", "href") if name in attrs]
    assert {link for link in links if link and not link.startswith("#")} == {"data:,"}
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", page.source)
    (policy,) = (a["content"] for _, a in page.tags if "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in policy


def assert_named(page: Page) -> None:
    """Its parts have names for those who do not see them, and each name stands once."""
    names = [tag for tag, _ in page.tags]
    assert names.count("h1") == names.count("main") == 1
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    assert all(
        attrs.get("aria-labelledby", "") in ids or "aria-label" in attrs
        for tag, attrs in page.tags
        if tag == "section"
    )
    assert {a["href"] for tag, a in page.tags if tag == "a"} <= {f"#{name}" for name in ids}
