"""What the parts of speed.py share: figures with intervals, cells that are kept, models, clocks."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from scipy.stats import binom
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from offramp.backbones import Batch
from offramp.benchmark.contenders import Shop
from offramp.benchmark.document import Contender, Lengths, Side
from offramp.benchmark.race import REST_SECONDS
from offramp.benchmark.runners import Ours, Runner, with_mask
from offramp.benchmark.running import _machine
from offramp.benchmark.subject import Rows as Data
from offramp.benchmark.subject import Subject, open_rows, open_subject
from offramp.benchmark.workloads import numbered
from offramp.engines import Engine
from offramp.evaluation import laps
from offramp.evaluation.speed import Job
from offramp.model import MultiExitModel
from offramp.policies import Rows
from offramp.storage import Strict, fingerprint_of_files, read_document, write_document

SHARED = Path(os.environ.get("OFFRAMP_SHARED", "../shared"))
FEWEST, MOST = 7, 41
"""Passes: of fewer than six, no order gives an interval of 95 %."""
Verdict = Literal["yes", "no", "undecided", ""]
Numbers = npt.NDArray[np.float64]
Seconds = Mapping[str, Numbers]
Places = Sequence[int]


class Figure(Strict):
    """A measured number beside what was asked for.

    Attributes:
        name: what was measured.
        value, low, high: the median over passes and its 95 % interval; a count is all three.
        target: None where nothing was asked for.
        least: the target is to be reached, else not to be passed.
        beside: what goes with it, in words.
    """

    name: str
    value: float
    low: float
    high: float
    target: float | None = None
    least: bool = True
    beside: str = ""

    @classmethod
    def of(cls, name: str, passes: npt.ArrayLike, target: float | None = None, **more: Any) -> Self:
        """From one number of each pass."""
        value, low, high = middle(np.asarray(passes, dtype=np.float64))
        return cls(name=name, value=value, low=low, high=high, target=target, **more)

    @classmethod
    def count(cls, name: str, number: float, target: float | None = None, **more: Any) -> Self:
        return cls(name=name, value=number, low=number, high=number, target=target, **more)

    def over(self, values: Iterable[float]) -> Self:
        """The same from one number of each process."""
        value, low, high = middle(np.array([*values]))
        return self.model_copy(update={"value": value, "low": low, "high": high})

    @property
    def answer(self) -> Verdict:
        """Yes where the whole interval is on the right side of the target, no on the wrong one."""
        if self.target is None:
            return ""
        worst, best = (self.low, self.high) if self.least else (-self.high, -self.low)
        bar = self.target if self.least else -self.target
        if worst >= bar:
            return "yes"
        return "no" if best < bar else "undecided"


def middle(passes: Numbers) -> tuple[float, float, float]:
    """The median and its 95 % interval from the order of the passes: whatever a few disturbed
    passes come to, they do not move it."""
    ordered = np.sort(passes)
    rank = max(int(binom.ppf(0.025, len(ordered), 0.5)), 1)
    return float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[-rank])


class Cell(Strict):
    """What was measured in one go.

    Attributes:
        weights: of the trained model, a name for them.
        minutes: that it took, all in all.
    """

    figures: tuple[Figure, ...]
    facts: Mapping[str, str | int | float] = Field(default_factory=dict)
    weights: str = ""
    minutes: float = 0.0


class Part(Strict):
    """The cells of one part and number of threads."""

    schema_version: Literal[1] = 1
    part: str
    threads: int
    quick: bool
    machine: dict[str, str]
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        minutes: of timing, for a cell.
        processes: each cell is measured in, see `in_processes`.
        work: a folder for what can be made again.
        folders: of trained models, by set.
        tune: files of rows to choose points on, by set.
    """

    threads: int = 1
    quick: bool = False
    minutes: float = 1.0
    processes: int = 1
    work: Path = Path("runs/speed")
    folders: Mapping[str, Path] = field(default_factory=dict)
    tune: Mapping[str, Path] = field(default_factory=dict)

    def some(self, number: int, quick: int) -> int:
        return quick if self.quick else number

    def weights(self, name: str) -> str:
        """Of the trained model that a cell or a set of this name is about."""
        folders = [folder for kind, folder in self.folders.items() if name.startswith(kind)]
        return _weights(folders[0]) if folders else ""


@lru_cache
def _weights(folder: Path) -> str:
    return fingerprint_of_files(folder / "model.safetensors")[:8]


Cells = dict[str, Callable[[], Cell]]


def run_part(
    name: str, cells: Cells, out: Path, options: Options, again: bool, only: str = ""
) -> None:
    """Measure what is not there yet; each cell is written as it is done."""
    path = out / f"{name}-{options.threads}.json"
    done = dict(read_document(Part, path).cells) if path.is_file() else {}
    for cell, measure in cells.items():
        kept = cell in done and done[cell].weights == options.weights(cell)
        if only not in cell or (kept and not again):
            continue
        started = time.perf_counter()
        measured = in_processes(measure, options) if options.processes > 1 else measure()
        minutes = round((time.perf_counter() - started) / 60, 2)
        done[cell] = measured.model_copy(
            update={"minutes": minutes, "weights": options.weights(cell)}
        )
        machine = _machine(torch.device("cpu"))
        document = Part(
            part=name, threads=options.threads, quick=options.quick, machine=machine, cells=done
        )
        write_document(path, document)
        print(f"{name}, {cell} ({minutes:g} min)", flush=True)
        for one in measured.figures:
            print(f"  {one.name}: {said(one)} {one.answer}  {one.beside}", flush=True)


def in_processes(measure: Callable[[], Cell], options: Options) -> Cell:
    """A cell measured in several processes, one after the other: one may be some percents faster
    than the next, which its own passes do not show."""
    fresh = ProcessPoolExecutor(
        1, get_context("spawn"), torch.set_num_threads, (options.threads,), max_tasks_per_child=1
    )
    with fresh as pool:
        return joined([pool.submit(measure).result() for _ in range(options.processes)])


def joined(cells: Sequence[Cell]) -> Cell:
    """Figures and intervals from the medians of several cells; all else is of the one whose first
    figure is in the middle."""
    found = sorted(cells, key=lambda cell: cell.figures[0].value)
    usual = found[len(found) // 2]
    figures = [
        one.over(cell.figures[place].value for cell in found)
        for place, one in enumerate(usual.figures)
    ]
    facts = {**usual.facts, "processes": len(found)}
    return usual.model_copy(update={"figures": tuple(figures), "facts": facts})


def said(figure: Figure) -> str:
    if figure.low == figure.high:
        return f"{figure.value:,.4g}"
    return f"{figure.value:.4g} [{figure.low:.4g}, {figure.high:.4g}]"


# Clocks


def timed(jobs: Mapping[str, Sequence[Job]], options: Options) -> Seconds:
    """Seconds of each contender in each pass, after one that is not counted."""
    running = laps(jobs, rest=REST_SECONDS if options.threads > 1 else 0.0)
    next(running)
    first = next(running)
    fit = int(options.minutes * 60 / sum(first.values()))
    passes = 2 if options.quick else min(max(fit, FEWEST), MOST)
    taken = [first, *islice(running, passes - 1)]
    return {name: np.array([lap[name] for lap in taken]) for name in jobs}


def fastest(seconds: Seconds, names: Sequence[str]) -> str:
    return min(names, key=lambda name: float(np.median(seconds[name])))


def ms(seconds: Numbers, rows: int) -> float:
    """A row, median over passes."""
    return 1000 * float(np.median(seconds)) / rows


# Models and rows

ARCHITECTURES = {"BERT-base": "bert-base", "ALBERT-base": "albert-base", "MiniLM-6": "minilm-l6"}
QUICK = "bert-tiny"
FILES = {"sst2": ("sentence", "label"), "uspto_50k": ("reaction", "label")}
_FUSIONS = ("SkipLayerNormFusion", "BiasGeluFusion")
"""That our ONNX engine goes without."""


def data_file(name: str, part: str = "dev") -> Path:
    return SHARED / "data" / name / f"{part}.tsv.gz"


def rxn_albert() -> Path:
    return SHARED / "weights" / "rxn-albert"


def with_head(folder: Path) -> Path:
    """A pretrained encoder as a classifier whose head knows nothing."""
    made = Path(tempfile.mkdtemp()) / folder.name
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(made)
    AutoTokenizer.from_pretrained(folder).save_pretrained(made)
    return made


class PlainOnnx:
    """A file in ONNX Runtime with its own options, but for the number of threads."""

    def __init__(self, path: Path, threads: int, without: Sequence[str] = ()) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=[*without]
        )
        self._names = [value.name for value in self.session.get_inputs()]

    def job(self, batch: Batch, rows: Any = None, policy: Any = None) -> Job:
        whole = with_mask(batch)
        feed = {name: whole[name].numpy() for name in self._names}
        return lambda: self.session.run(None, feed)


@dataclass
class Stand:
    """A model with rows, and everything that can run it."""

    subject: Subject
    data: Data
    lengths: Lengths
    threads: int

    @property
    def model(self) -> MultiExitModel:
        return self.subject.model

    @cached_property
    def _place(self) -> Any:
        return tempfile.TemporaryDirectory(prefix="offramp-speed-")

    @cached_property
    def shop(self) -> Shop:
        return Shop(
            lambda: self.model,
            with_mask(self.data.batch([0, 1])),
            Path(self._place.name),
            self.threads,
            torch.device("cpu"),
        )

    def _runner(self, side: Side, runtime: Any, precision: str) -> Any:
        depth = self.model.depth
        one = Contender(name="", side=side, runtime=runtime, precision=precision, layers=depth)
        return self.shop.prepare(one)

    def ours(self, runtime: str, precision: str) -> Ours:
        return self._runner("offramp", runtime, precision)

    def engine(self, runtime: str, precision: str = "fp32") -> Engine:
        return self.ours(runtime, precision).engine

    def plain(self, runtime: str, precision: str) -> dict[str, Runner | PlainOnnx]:
        """What a user has without offramp, by what it is called."""
        if runtime != "onnx":
            runtime = "torch" if runtime == "inductor" else runtime
            name = {"torch": "transformers", "openvino": "OpenVINO"}[runtime]
            return {name: self._runner("plain", runtime, precision)}
        path = self.shop.exported(precision, self.model.depth)
        return {
            "ONNX Runtime": PlainOnnx(path, self.threads),
            "ONNX Runtime, fusions off": PlainOnnx(path, self.threads, _FUSIONS),
        }

    def numbered(self, batches: Sequence[Places]) -> Iterator[tuple[Batch, Rows]]:
        """Batches with rows numbered, as forced policies want them."""
        for places, rows in zip(batches, numbered(self.data.lengths, batches), strict=True):
            yield self.data.batch(places), rows

    def lengths_in(self, batches: Sequence[Places]) -> npt.NDArray[np.int64]:
        return self.data.lengths[np.concatenate([list(places) for places in batches])]


@lru_cache(maxsize=1)
def stand(name: str, threads: int, quick: bool = False, rows: int = 256) -> Stand:
    """A model by the name the page gives it, or a trained folder, with rows of real lengths."""
    reactions = name == "rxn-albert" or "uspto" in name
    source = with_head(rxn_albert()) if name == "rxn-albert" else ARCHITECTURES.get(name, name)
    subject = open_subject(QUICK if quick and name in ARCHITECTURES else source)
    kind = "uspto_50k" if reactions else "sst2"
    return with_rows(subject, kind, "dev", threads, rows)


def with_rows(subject: Subject, kind: str, part: str, threads: int, rows: int) -> Stand:
    """A model on rows of a set; on the built-in docstrings where the set is not there."""
    file = data_file(kind, part)
    if file.is_file():
        text, label = FILES[kind]
        data, lengths = open_rows(subject, str(file), rows, None, text=text, label=label)
    else:
        data, lengths = open_rows(subject, None, rows, None)
    return Stand(subject, data, lengths, threads)


def singles(lengths: npt.NDArray[np.int64], count: int) -> list[Places]:
    """Rows of all lengths, one by one, short and long ones in turn."""
    order = np.argsort(lengths, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]
    return [[int(place)] for place in np.random.default_rng(0).permutation(chosen)]


def neighbours(lengths: npt.NDArray[np.int64], size: int, count: int) -> list[Places]:
    """Full batches of rows of like lengths, taken evenly from short to long."""
    order = np.argsort(lengths, kind="stable").tolist()
    batches = [order[first : first + size] for first in range(0, len(order) - size + 1, size)]
    chosen = np.linspace(0, len(batches) - 1, count + 2)[1:-1] if count < len(batches) else None
    return batches if chosen is None else [batches[round(float(place))] for place in chosen]
