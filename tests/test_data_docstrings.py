"""The built-in set: real prose, no tell-tale names, the same rows every time."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from offramp.data import docstrings, drop_overlap, infer_task, load_examples
from offramp.errors import DataError

SOURCE = '''"""Functions for the solving of problems that users may have."""
raise SystemExit("this module must not be run")

class Solver:
    """Solve a problem by :class:`~{name}.Solver` and nothing else, as users expect.

    The method goes back to old times [1]_, when no computer had been built.

    Parameters
    ----------
    problem : object
        The problem to be solved by this class for its users.

    >>> Solver().solve()
    """

    def solve(self):
        """Solve it with ``{name}``, e.g. by `solve_all` or `MainSolver`, of library {name}."""
'''


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two libraries that end the program when they are imported, and a cache of their own."""
    for name in ("firstlib", "secondlib"):
        folder = tmp_path / "site" / name
        folder.mkdir(parents=True)
        parts = [
            f'def f{i}():\n    """This is text {i} of {name} about a thing here."""\n'
            for i in range(60)
        ]
        (folder / "__init__.py").write_text(SOURCE.replace("{name}", name) + "\n".join(parts))
        (folder / "broken.py").write_text('"""Not Python at all"""\ndef (')
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    libraries = {name: name for name in ("firstlib", "secondlib")}
    monkeypatch.setattr(docstrings, "LIBRARIES", libraries)
    return tmp_path


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str]]:
    return docstrings.build()


def test_only_prose_is_kept_and_nothing_is_run(small: Path) -> None:
    texts = docstrings._library_texts("firstlib")
    assert (
        "Solve a problem by CODE and nothing else, as users expect. "
        "The method goes back to old times, when no computer had been built."
    ) in texts
    assert "Solve it with firstlib, e.g. by CODE or CODE, of library firstlib." in texts


def test_texts_of_two_libraries_are_of_neither(small: Path) -> None:
    shared = "Functions for the solving of problems that users may have."
    assert shared in docstrings._library_texts("firstlib")
    assert shared not in {text for text, _ in docstrings.build()}


def test_the_set_is_kept_in_the_users_cache_until_versions_change(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_examples("docstrings", split="train")
    (cached,) = (small / "cache" / "offramp").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(docstrings, "build", lambda: pytest.fail("the cache was not used"))
        assert load_examples("docstrings", split="train").to_list() == first.to_list()
    cached.write_bytes(b"broken")
    assert load_examples("docstrings", split="train").to_list() == first.to_list()
    monkeypatch.setattr(docstrings, "_version", lambda library: "another")
    load_examples("docstrings", split="train")
    assert len(list((small / "cache" / "offramp").iterdir())) == 2


@pytest.mark.parametrize("base", ["file", "~nobody/x"])
def test_a_cache_that_cannot_be_written_is_done_without(
    small: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    (small / "file").write_text("a file, no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(small / base) if base == "file" else base)
    assert len(load_examples("docstrings", split="train")) > 50


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "LIBRARIES", {"not_there": "not-there"})
    with pytest.raises(DataError, match="pip install not-there"):
        docstrings.build()


def test_the_splits_are_named_and_share_no_text(small: Path) -> None:
    with pytest.raises(DataError, match="train, validation, test"):
        load_examples("docstrings")
    parts = [load_examples("docstrings", split=name) for name in docstrings.SHARES]
    assert drop_overlap(parts[0], *parts[1:])[1] == 0
    assert infer_task(parts[0]).labels == ("firstlib", "secondlib")


def test_classes_are_balanced_and_lengths_go_from_8_to_80_words(
    rows: list[tuple[str, str]],
) -> None:
    counts = Counter(library for _, library in rows)
    assert set(counts) == set(docstrings.LIBRARIES)
    assert max(counts.values()) == docstrings.ROWS_PER_LIBRARY
    assert min(counts.values()) > 0.8 * docstrings.ROWS_PER_LIBRARY
    lengths = [len(text.split()) for text, _ in rows]
    assert 8 <= min(lengths) < max(lengths) <= 80
    assert sum(length <= 12 for length in lengths) > 0.2 * len(rows)
    assert sum(length >= 40 for length in lengths) > 0.2 * len(rows)
    assert len({text for text, _ in rows}) == len(rows)


def test_no_row_names_a_library_or_shows_code(rows: list[tuple[str, str]]) -> None:
    names = "|".join([*docstrings.LIBRARIES, "pytorch", "numpy", "scikit-learn", "np", "pd", "nx"])
    telling = re.compile(rf"\b({names})\b|>>>|`|\b\w+\.\w+\(", re.IGNORECASE)
    assert [text for text, _ in rows if telling.search(text)] == []


def test_the_set_is_neither_trivial_nor_hopeless(rows: list[tuple[str, str]]) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline

    texts, labels = zip(*rows, strict=True)
    cut = int(0.8 * len(rows))
    words = TfidfVectorizer(sublinear_tf=True)
    baseline = make_pipeline(words, SGDClassifier(loss="log_loss", alpha=1e-5, random_state=0))
    baseline.fit(texts[:cut], labels[:cut])
    assert 0.75 < baseline.score(texts[cut:], labels[cut:]) < 0.95
