"""Claims about the scripts in tools/ that CI calls: they find what they are there to find."""

from __future__ import annotations

from pathlib import Path

import check_site
import house_style
import pytest

GOOD = '''"""A room."""

__all__ = ["add"]


def add(a: int) -> int:
    """One more."""
    return a + 1
'''


def _long(lines: int) -> str:
    return GOOD + "\n\ndef long() -> None:\n" + "    print()\n" * (lines - 1)


def test_a_tidy_room_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "__init__.py").write_text(_long(80))
    assert house_style.main(str(tmp_path)) == 1  # half of its functions are long
    assert "longest function" not in capsys.readouterr().err
    (tmp_path / "__init__.py").write_text(GOOD)
    assert house_style.main(str(tmp_path)) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (_long(81), "long: 81 lines"),
        (GOOD + "#\n" * 500, "508 lines"),
        (GOOD.replace("a: int", "a"), "add: no type for a"),
        (GOOD.replace(" -> int", ""), "add: no type for return"),
        (GOOD.replace('    """One more."""\n', ""), "add: no docstring"),
        (GOOD.replace('"""A room."""', ""), "no docstring"),
        (GOOD + "\n\nclass Thing:\n    pass\n", "Thing: no docstring"),
    ],
)
def test_a_breach_is_named(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "__init__.py").write_text(text)
    assert house_style.main(str(tmp_path)) == 1
    assert said in capsys.readouterr().err


def test_a_drawer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "__init__.py").write_text(GOOD)
    (tmp_path / "utils.py").write_text(GOOD)
    assert house_style.main(str(tmp_path)) == 1
    assert "utils.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    "loads",
    [
        '<script src="https://example.org/a.js"></script>',
        '<link rel="stylesheet" href="//example.org/a.css">',
        '<link rel="preconnect" href="https://example.org">',
        '<img src="http://example.org/a.png">',
        '<p style="background: url(https://example.org/a.png)">',
        "<style>@import 'https://example.org/a.css'</style>",
    ],
)
def test_a_page_that_loads_from_elsewhere_is_found(loads: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(f"<p>{loads}")
    assert check_site.main(str(tmp_path)) == 1


def test_links_and_own_files_are_fine(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        '<a href="https://example.org">out</a><script src="a.js"></script>'
        '<link rel="canonical" href="https://example.org/page.html">'
    )
    assert check_site.main(str(tmp_path)) == 0
    assert check_site.main(str(tmp_path / "nothing")) == 1
