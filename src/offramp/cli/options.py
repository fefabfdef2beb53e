"""Options that several commands share, with one wording each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also what other libraries have to say.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
