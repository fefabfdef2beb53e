"""The grid of a comparison: what all its runs share, and which run can be done next."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

from offramp.comparison.recipe import trained_alike
from offramp.errors import ConfigError
from offramp.storage import Strict, read_document, write_document

ALL = "all"
START, PLAIN, ATTACH, TRUNCATED = "start", "plain", "attach", "truncated"
REFERENCES = {
    PLAIN: "the start, fine-tuned on without exits",
    TRUNCATED: "its first layers alone, fine-tuned on",
    ATTACH: "exits on the start, which stays as it is",
}
"""What is no method of METHODS but belongs beside them."""
PLAN, RESULT = "plan.json", "result.json"
STOPPED = 130
"""Exit code of a run that was told to stop and has made a checkpoint."""
ROLES = ("tune", "test")
"""Of these every run of a method has a table."""


class Plan(Strict):
    """What every run of a comparison shares: `plan.json`. A folder holds runs of one plan.

    Attributes:
        model: its folder, of a model on the hub that in the cache.
        title: name of the data.
        model_fingerprint: of the weights that everything starts from.
        rows: fingerprints of the rows, by role.
        counts: how many these are.
        problem_type, max_length, fresh_head: see `train`.
        fine_tunes: the model has no head for these labels yet, so every seed starts with a
            fine-tune; otherwise the model itself is the start.
        start_epochs, epochs: of that fine-tune, and of every method.
        rates: learning rates to choose from.
        bf16: see `TrainOptions`; tables are recorded in fp32 whatever it is.
        pooling: of exits that pool; None where a probe of the start decides.
    """

    schema_version: Literal[1] = 1
    model: str
    title: str
    model_fingerprint: str
    rows: dict[str, str]
    counts: dict[str, int]
    problem_type: str
    max_length: int | None
    fresh_head: bool
    fine_tunes: bool
    start_epochs: float
    epochs: float
    batch_size: int
    rates: tuple[float, ...]
    bf16: bool | Literal["auto"]
    pooling: str | None


class Cell(NamedTuple):
    """One training run: a method from the start of a seed, with a learning rate or its own."""

    method: str
    rate: float | None
    seed: int

    @property
    def name(self) -> str:
        rate = "" if self.rate is None else f"-{self.rate:g}"
        return f"{self.method}{rate}-seed{self.seed}"


class Result(Strict):
    """What a finished run says of itself: `result.json` beside its tables.

    Attributes:
        quality: what learning rates are chosen by, on `tune`: a start's score, a method's
            best area under score over cost.
        seconds: of training, on `threads` threads.
        memory: largest resident set of the process, in bytes.
        pooling: of a start: what the probe prefers; else of its exits, if they pool.
        recipe: of the method, see `recipe`; None in what was made before there was one.
    """

    method: str
    rate: float | None
    seed: int
    quality: float
    seconds: float
    threads: int
    memory: int
    parameters_added: int
    pooling: str | None
    layers: tuple[int, ...] | None = None
    recipe: str | None = None

    @property
    def cell(self) -> Cell:
        return Cell(self.method, self.rate, self.seed)


def alike(one: Cell, other: Cell) -> bool:
    """Whether two runs train the same exits in the same way."""
    same = (one.rate, one.seed) == (other.rate, other.seed)
    return same and trained_alike(one.method, other.method)


def plug_in(name: str) -> None:
    """Import a module, from here too, that registers methods. Raises ConfigError."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        import_module(name)
    except Exception as problem:
        raise ConfigError(
            f"Plug-in '{name}' cannot be imported: {type(problem).__name__}: {problem}. Give the "
            "name of a module that `import` finds from here."
        ) from problem


def open_plan(folder: Path, plan: Plan) -> None:
    """Write the plan, or check that the folder's is the same. Raises ConfigError."""
    file = folder / PLAN
    if not file.exists():
        write_document(file, plan)
        return
    before = read_document(Plan, file).model_dump()
    changed = [name for name, value in plan.model_dump().items() if before[name] != value]
    if changed:
        raise ConfigError(
            f"{folder} holds a comparison with other settings; these differ: "
            f"{', '.join(changed)}. Give the same again to go on, or another --output."
        )


def results(folder: Path) -> dict[Cell, Result]:
    """All finished runs of a comparison."""
    found = [read_document(Result, file) for file in sorted(folder.glob(f"cells/*/{RESULT}"))]
    return {result.cell: result for result in found}


@dataclass(frozen=True)
class Grid:
    """All runs that a comparison wants.

    The learning rate of each method is chosen on the first seed, where all rates run.
    """

    plan: Plan
    methods: tuple[str, ...]
    seeds: tuple[int, ...]

    def next(self, done: Mapping[Cell, Result], failed: Iterable[Cell] = ()) -> list[Cell]:
        """Runs that are neither done nor failed, and have all that they start from.

        Of runs that are trained alike one comes first, the others wait for its tables.
        """
        over = {*done, *failed}
        found: list[Cell] = []
        for cell in self.wanted(done, failed):
            if cell not in over and not any(alike(cell, one) for one in found):
                found.append(cell)
        return found

    def wanted(self, done: Mapping[Cell, Result], failed: Iterable[Cell] = ()) -> list[Cell]:
        """Its runs as far as they are known by now, those that are over among them."""
        over = {*done, *failed}
        wanted = [*self._starts(done, over)]
        for method in self.methods:
            wanted += self._runs(method, done, over)
        return wanted

    def count(self) -> int:
        """How many runs there are in all."""
        rates, seeds = len(self.plan.rates), len(self.seeds)
        gridded = sum(map(_gridded, self.methods))
        starts = rates + seeds - 1 if self.plan.fine_tunes else 1
        return starts + gridded * (rates + seeds - 1) + (len(self.methods) - gridded) * seeds

    def start_of(
        self, seed: int, done: Mapping[Cell, Result], failed: Iterable[Cell] = ()
    ) -> Result | None:
        """What methods of a seed start from."""
        if not self.plan.fine_tunes:
            return done.get(Cell(START, None, self.seeds[0]))
        rate = self.rate_of(START, done, {*done, *failed})
        return None if rate is None else done.get(Cell(START, rate, seed))

    def chosen(
        self, method: str, done: Mapping[Cell, Result], failed: Iterable[Cell] = ()
    ) -> dict[int, Result]:
        """The runs of a method that count, by seed."""
        rate = self._rate(method, done, {*done, *failed})
        cells = {seed: Cell(method, rate, seed) for seed in self.seeds}
        return {seed: done[cell] for seed, cell in cells.items() if cell in done}

    def rate_of(
        self, method: str, done: Mapping[Cell, Result], over: Iterable[Cell]
    ) -> float | None:
        """The best learning rate on the first seed; None while some have not been tried."""
        cells = self.tried(method, done)
        found = [cell for cell in cells if cell in done]
        if not found or not set(cells) <= set(over):
            return None
        return max(found, key=lambda cell: done[cell].quality).rate

    def tried(self, method: str, done: Mapping[Cell, Result]) -> list[Cell]:
        """The runs among which a learning rate is chosen.

        A start that failed is not among them once a method is done: were it to succeed later
        and be the best, some methods would have begun elsewhere than others.
        """
        cells = [Cell(method, rate, self.seeds[0]) for rate in self.plan.rates]
        if method == START and any(cell.method != START for cell in done):
            return [cell for cell in cells if cell in done]
        return cells

    def _starts(self, done: Mapping[Cell, Result], over: set[Cell]) -> list[Cell]:
        if not self.plan.fine_tunes:
            return [Cell(START, None, self.seeds[0])]
        return self._gridded(START, done, over)

    def _runs(self, method: str, done: Mapping[Cell, Result], over: set[Cell]) -> list[Cell]:
        if _gridded(method):
            cells = self._gridded(method, done, over)
        else:
            rate = self._rate(method, done, over)
            unknown = method == TRUNCATED and rate is None
            cells = [] if unknown else [Cell(method, rate, seed) for seed in self.seeds]
        if method == TRUNCATED:
            cells = [cell for cell in cells if cell._replace(method=PLAIN) in done]
        return [cell for cell in cells if self.start_of(cell.seed, done, over) is not None]

    def _gridded(self, method: str, done: Mapping[Cell, Result], over: set[Cell]) -> list[Cell]:
        cells, others = self.tried(method, done), self.seeds[1:]
        rate = self.rate_of(method, done, over)
        return cells if rate is None else [*cells, *(Cell(method, rate, s) for s in others)]

    def _rate(self, method: str, done: Mapping[Cell, Result], over: Iterable[Cell]) -> float | None:
        if method == TRUNCATED:  # trained as `plain` is
            return self.rate_of(PLAIN, done, over)
        return self.rate_of(method, done, over) if _gridded(method) else None


def _gridded(method: str) -> bool:
    """Whether learning rates are tried: `attach` has its own, `truncated` takes that of `plain`."""
    return method not in (ATTACH, TRUNCATED)
