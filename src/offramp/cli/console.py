"""What goes to the terminal: results to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from offramp.errors import OutputError

_CHATTER = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
BAR = 40


def setup(quiet: bool = False, verbose: bool = False, threads: int | None = None) -> None:
    """Choose what is said on stderr, and how many threads torch and whatever follows it may use; to
    be called before torch or transformers are imported."""
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    logger = logging.getLogger("offramp")
    logger.handlers = [_Lines()]
    logger.setLevel(level)
    logger.propagate = False
    if not verbose:
        for name, value in _CHATTER.items():
            os.environ.setdefault(name, value)
        warnings.simplefilter("ignore")
    if threads is not None:
        import torch  # which reads what is set above

        torch.set_num_threads(threads)


class _Lines(logging.Handler):
    """One line a message, without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "Warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


def fail(message: str) -> None:
    """A user's mistake, as one paragraph."""
    print(f"Error: {' '.join(message.split())}", file=sys.stderr)


def say_json(data: Any) -> None:
    say(json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False))


def say(*lines: str) -> None:
    with _stdout():
        print(*lines, sep="\n")


def flush() -> None:
    """Everything said is out, or an OutputError."""
    if sys.stdout is not None:  # None where the caller has closed it
        with _stdout():
            sys.stdout.flush()


def drop_stdout() -> None:
    """Keep the interpreter from flushing into a stdout that takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _stdout() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as problem:
        drop_stdout()
        raise OutputError(f"stdout cannot be written: {problem}.") from problem


def facts(pairs: Mapping[str, object]) -> None:
    """Names and values, one pair a line, values aligned."""
    width = max(map(len, pairs))
    say(*(f"{name:<{width}}  {value}" for name, value in pairs.items()))


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table, first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        first, *others = zip(row, widths, strict=True)
        cells = [f"{first[0]:<{first[1]}}", *(f"{text:>{width}}" for text, width in others)]
        say("  ".join(cells).rstrip())


def histogram(counts: Sequence[int]) -> None:
    """How many rows left after each layer, as bars."""
    total, most = sum(counts), max(counts)
    for layer, count in enumerate(counts, start=1):
        bar = "█" * round(BAR * count / most)
        say(f"  layer {layer:>2}  {count:>7,}  {count / total:>6.1%}  {bar}".rstrip())
