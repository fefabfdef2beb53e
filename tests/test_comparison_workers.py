"""What is told of the processes of a comparison when they end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_comparison_grid import plan, result

from offramp.comparison import cell as cell_module
from offramp.comparison import workers
from offramp.comparison.plan import RESULT, STOPPED, Cell, Grid
from offramp.comparison.workers import LOG, Try, Workers
from offramp.storage import write_document

CELL = Cell("pabee", 1e-4, 1)


def ended(log: Path, code: int, said: str = "", before: str = "") -> Try:
    log.write_text(before + said)
    process: Any = SimpleNamespace(returncode=code)
    return Try(process, log, len(before))


def test_the_reason_of_a_run_is_the_sentence_that_it_gave(tmp_path: Path) -> None:
    log = tmp_path / LOG
    assert ended(log, 2, "step 1\nError: No rows.\n").why() == "No rows."
    assert ended(log, 1, "KeyError: 3\n\n").why() == f"KeyError: 3 See {log}."
    assert ended(log, -9).why().startswith("ended by SIGKILL. Memory may have run out")


def test_a_run_that_was_told_to_stop_says_that(tmp_path: Path) -> None:
    assert ended(tmp_path / LOG, STOPPED, "step 50 of 90").why() == "stopped"


@pytest.mark.parametrize("said", ["", "\n", "KeyError: 3\n"])
def test_what_an_earlier_try_said_is_no_reason(tmp_path: Path, said: str) -> None:
    one = ended(tmp_path / LOG, 1, said, before="Error: The moon is full.\n")
    assert one.said() == said.strip()
    assert "moon" not in one.why()


def test_a_try_begins_where_the_log_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dies:
        returncode = 1

        def __init__(self, *_: object, **__: object) -> None: ...
        def poll(self) -> int:
            return 1

    monkeypatch.setattr("offramp.comparison.workers.subprocess.Popen", Dies)
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.0)
    place = tmp_path / "cells" / CELL.name
    start = Cell("start", None, 1)
    write_document(tmp_path / "cells" / start.name / RESULT, result(start))
    place.mkdir(parents=True)
    (place / LOG).write_text("Error: The moon is full.\n")
    crew = Workers(tmp_path, most=1, quiet=True)
    crew.run(Grid(plan(fine_tunes=False, rates=(1e-4,)), ("pabee",), (1,)))
    assert crew.failed == {CELL: f"it said nothing. See {place / LOG}."}


def test_a_run_that_is_over_is_counted_among_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Done:
        returncode = 0

        def __init__(self, command: list[str], **_: object) -> None:
            cell = Cell(**json.loads(command[-1]))
            write_document(tmp_path / "cells" / cell.name / RESULT, result(cell))

        def poll(self) -> int:
            return 0

    monkeypatch.setattr("offramp.comparison.workers.subprocess.Popen", Done)
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.0)
    grid = Grid(plan(fine_tunes=False, rates=(1e-4,)), ("pabee",), (1, 2))
    with caplog.at_level("INFO", "offramp"):
        Workers(tmp_path, most=1, quiet=True).run(grid)
    assert [one.split(", ")[-1] for one in caplog.messages] == ["1 of 3.", "2 of 3.", "3 of 3."]


def test_the_memory_of_a_run_is_known_on_any_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cell_module._most_memory() > 2**20
    info = SimpleNamespace(peak_wset=7)
    there = SimpleNamespace(Process=lambda: SimpleNamespace(memory_info=lambda: info))
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    monkeypatch.setattr(cell_module, "psutil", there)
    monkeypatch.setattr(cell_module, "sys", SimpleNamespace(platform="win32"))
    assert cell_module._most_memory() == 7
