"""Every error a user can cause, in one tree.

OfframpError                 anything below; the command line prints it and exits with 2
├── DataError                a file, a column, a row or a label
├── ModelError               a checkpoint, its architecture or its weights
├── ConfigError              an option, a name or a JSON file of ours
├── TableError               an exit table: wrong model, wrong role, broken file
├── PointError               an operating point that does not fit the model
├── OutputError              a place that cannot be written
├── MissingExtraError        an optional dependency that is not installed
└── NonFiniteError           a row whose scores are NaN or infinite

A message says what was given, what is allowed and what to do.
"""

from __future__ import annotations


class OfframpError(Exception):
    """Base of all errors that are the user's to mend, never a bug of ours."""


class DataError(OfframpError):
    """A data file, column, row or label is not usable."""


class ModelError(OfframpError):
    """A checkpoint is missing, incomplete, changed or of an unsupported architecture."""


class ConfigError(OfframpError):
    """An option, a name or a JSON document is not valid."""


class TableError(OfframpError):
    """An exit table is broken, of another model, or used against its role."""


class PointError(OfframpError):
    """An operating point is missing or was made for another model."""


class OutputError(OfframpError):
    """A file or folder cannot be written."""


class NonFiniteError(OfframpError):
    """A row whose exit scores are NaN or infinite; its neighbours are not affected."""


class MissingExtraError(OfframpError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"This needs the package '{package}', which is not installed. "
            f"Install it with: pip install 'offramp[{extra}]'"
        )
