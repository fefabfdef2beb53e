"""The built-in set: real English prose, and which library it documents.

Rows are docstrings of seven libraries that come with this package, read from their
installed files with `ast`; nothing of them is imported or run. Code, tables and markup are
cut and every name that would tell is masked, so the words have to. The same versions give
the same rows, on every machine.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.util
import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from offramp.data.hashing import input_id, split_examples
from offramp.errors import DataError, OutputError
from offramp.storage import cache_folder, fingerprint, whole_file

log = logging.getLogger("offramp")

LIBRARIES = {  # import name -> distribution
    "networkx": "networkx",
    "pandas": "pandas",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "sympy": "sympy",
    "torch": "torch",
    "transformers": "transformers",
}
ROWS_PER_LIBRARY = 1500
FEWEST_WORDS, MOST_WORDS = 8, 80
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
SPLIT_SEED = 0


def load() -> DatasetDict:
    """The splits train, validation and test, cut by input hash; columns text and label.

    Raises:
        DataError: a library or its source files are missing.
    """
    versions = {name: _version(name) for name in LIBRARIES}
    cached = _cache_file(fingerprint(Path(__file__).read_bytes(), repr(versions)))
    table = _read_cache(cached)
    if table is None:
        log.info("Reading the built-in set from the installed libraries (about 10 seconds).")
        table = _table(build())
        _write_cache(cached, table)
    names = ClassLabel(names=list(LIBRARIES))
    columns = {name: table.column(name) for name in table.column_names}
    whole = Dataset.from_dict(columns, Features({"text": Value("string"), "label": names}))
    return DatasetDict(split_examples(whole, SHARES, SPLIT_SEED))


def build() -> list[tuple[str, str]]:
    """(text, library) of all rows, ordered by hash so that libraries mix."""
    with _no_garbage_collection():
        found = {library: _library_texts(library) for library in LIBRARIES}
    shared = Counter(text for texts in found.values() for text in texts)
    rows = []
    for library, texts in found.items():
        own = sorted((text for text in texts if shared[text] == 1), key=input_id)
        rows += [(text, library) for text in own[:ROWS_PER_LIBRARY]]
    return sorted(rows, key=lambda row: input_id(*row))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Looking for cycles among the nodes of syntax trees takes a third of the time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- from files to prose --------------------------------------------------------------

_NOT_THE_LIBRARY = {"tests", "test", "testing", "_vendor", "externals", "extern"}


def _library_texts(library: str) -> set[str]:
    """Masked prose of one library, from files in hash order until there is enough."""
    texts: set[str] = set()
    for file in _files(library):
        source = file.read_bytes()
        if b'"""' in source:
            texts.update(_texts(source))
        # Some texts will turn out to stand in another library, too.
        if len(texts) > 1.1 * ROWS_PER_LIBRARY:
            break
    if not texts:
        raise DataError(
            f"The built-in set 'docstrings' found no docstring in the library '{library}'. "
            f"Reinstall it with its source files: pip install --force-reinstall "
            f"{LIBRARIES[library]}"
        )
    return texts


def _files(library: str) -> list[Path]:
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"The built-in set 'docstrings' reads the library '{library}', which is not "
            f"installed. Install it with: pip install {LIBRARIES[library]}"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    names = [file.relative_to(root) for file in root.rglob("*.py")]
    kept = [name for name in names if not _NOT_THE_LIBRARY & set(name.parts)]
    kept.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    return [root / name for name in kept]


def _texts(source: bytes) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in (tree, *_definitions(tree)):
        text = prose(ast.get_docstring(node) or "")
        if len([word for word in text.split() if word not in ("LIB", "CODE")]) >= FEWEST_WORDS:
            yield text


_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(node: ast.Module | _Definition) -> Iterator[_Definition]:
    """Classes and functions, nested ones too; a full ast.walk takes twice as long as parsing."""
    for child in node.body:
        if isinstance(child, _Definition):
            yield child
            yield from _definitions(child)


_CODE_SIGNS = (">>>", "::", "---", "===", "|", "{", "=", "@", "<", "\\", "http")
_SENTENCE = re.compile(r"[A-Z].*[.!?]", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def prose(docstring: str) -> str:
    """The first sentences of a docstring, masked, at most MOST_WORDS words."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        if _is_prose(paragraph):
            kept += _SENTENCE_END.split(mask(" ".join(paragraph.split())))
    words = 0
    for count, sentence in enumerate(kept):
        words += len(sentence.split())
        if words > MOST_WORDS:
            return " ".join(kept[:count])
    return " ".join(kept)


def _is_prose(paragraph: str) -> bool:
    """Whole sentences, no section, parameter table, list, formula or code."""
    indented = any(line[:1].isspace() for line in paragraph.split("\n"))
    coded = any(sign in paragraph for sign in _CODE_SIGNS)
    return not indented and not coded and _SENTENCE.fullmatch(paragraph.strip()) is not None


_MARKUP = re.compile(r":[a-z:]+:(?=`)|[`*~]|\s*\[\d+\]_?|\[(?=`)|(?<=`)\]")
_REST = r"(\.\w+|\(\))*"
_LIBRARY_NAMES = re.compile(
    r"\b(networkx|nx|numpy|np|ndarrays?|pandas|pd|scipy|sp|sklearn|scikit[- ]?learn|scikits?|"
    r"sympy|sympify|pytorch|torch\w*|aten|nn|transformers?|hugging ?face|hf)\b" + _REST,
    re.IGNORECASE,
)
# snake_case, dotted.names, CamelCase and calls(): identifiers, not words.
_IDENTIFIER = re.compile(
    r"\b(?!(?:e\.g|i\.e)\b)(\w+\.\w+|\w*_\w*|\w*[a-z][A-Z]\w*|\w+(?=\(\)))" + _REST
)


def mask(text: str) -> str:
    """Names of libraries become LIB, identifiers CODE, and markup goes."""
    text = _LIBRARY_NAMES.sub("LIB", _MARKUP.sub("", text))
    return " ".join(_IDENTIFIER.sub("CODE", text).split())


# --- cache ----------------------------------------------------------------------------


def _version(library: str) -> str:
    try:
        return version(LIBRARIES[library])
    except PackageNotFoundError:
        return "unknown"


def _cache_file(recipe: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / f"docstrings-{recipe}.parquet"


def _table(rows: list[tuple[str, str]]) -> pa.Table:
    texts, libraries = zip(*rows, strict=True)
    numbers = [list(LIBRARIES).index(library) for library in libraries]
    return pa.table({"text": pa.array(texts), "label": pa.array(numbers, pa.int64())})


def _read_cache(path: Path | None) -> pa.Table | None:
    try:
        return pq.read_table(path) if path is not None and path.is_file() else None
    except (pa.ArrowException, OSError):
        return None


def _write_cache(path: Path | None, table: pa.Table) -> None:
    if path is None:
        return
    try:
        with whole_file(path) as staged:
            pq.write_table(table, staged)
    except OutputError as problem:
        log.debug("The built-in set is not cached: %s", problem)
