"""From a file of examples to a file of answers."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm

from offramp.data import data_fingerprint, load_examples
from offramp.engines import UNLIMITED, Budget
from offramp.errors import ConfigError, OutputError
from offramp.prediction.formats import columns as output_columns
from offramp.prediction.formats import writer_for
from offramp.prediction.kept import Kept
from offramp.prediction.labels import Labels
from offramp.prediction.partial import PartialFile
from offramp.prediction.predictor import Answer, Point, Predictor
from offramp.prediction.ready import ReadyPoint
from offramp.prediction.stream import ahead, blocks, labels_of, opened, rows_of_examples
from offramp.storage import fingerprint, whole_file


@dataclass
class Summary:
    """What a run wrote.

    Attributes:
        rows: in the output; `errors` of them have an error instead of an answer, and `forced` the
            one that their budget left them.
        resumed: rows that an earlier, interrupted run had done.
        seconds: of this run, from the first text to the finished file.
        exit_histogram: rows answered after layer 1, 2, ..., depth.
    """

    output: str
    rows: int = 0
    errors: int = 0
    forced: int = 0
    resumed: int = 0
    seconds: float = 0.0
    exit_histogram: list[int] = field(default_factory=list)

    @property
    def mean_exit_layer(self) -> float | None:
        answered = sum(self.exit_histogram)
        layers = sum(n * layer for layer, n in enumerate(self.exit_histogram, start=1))
        return layers / answered if answered else None

    @property
    def rows_per_second(self) -> float:
        return (self.rows - self.resumed) / self.seconds


def predict_file(
    model: Predictor | str | os.PathLike[str],
    data: str | Path | Dataset | DatasetDict,
    output: str | Path,
    *,
    point: Point | None = None,
    scores: bool = False,
    sets: bool = False,
    device: Any = None,
    dtype: Any = None,
    backend: str = "torch",
    budget: Budget = UNLIMITED,
    progress: bool = True,
    **columns: Any,
) -> Summary:
    """Answer every row of `data` into a file, one row per row, in order.

    A run that was interrupted goes on where it stopped when it is called again with the same
    settings; the output appears whole when the last row is done. A row whose scores are not
    finite has `error` and no answer.

    Args:
        model, point, scores, sets, device, dtype, backend, budget: as of `predict`.
        data: a file, hub id or dataset as `load_examples` takes them.
        output: .jsonl, .csv or .parquet; .jsonl and .csv also as .gz.
        columns: `text`, `text_pair`, `image`, `split`, `keep` ... as of `load_examples`.

    Raises:
        OutputError: unknown format, a place that cannot be written, or the data itself.
    """
    output = Path(output)
    write = writer_for(output)
    if isinstance(data, str | Path) and Path(data).resolve() == output.resolve():
        raise OutputError(
            f"{output} holds the examples and would be overwritten. Name another file."
        )
    examples = load_examples(data, **columns)
    predictor, ready = opened(model, point, device=device, dtype=dtype, backend=backend)
    labels = labels_of(predictor, ready, scores, sets, budget)
    kept = Kept(examples, output_columns(labels))
    settings = _settings(predictor, ready, examples, labels, budget)
    start = time.perf_counter()
    with PartialFile(output, settings) as part:
        summary = Summary(str(output), resumed=part.rows)
        _run(part, predictor, ready, examples, labels, budget, progress)
        summary.exit_histogram = [0] * predictor.model.depth
        with whole_file(output) as staged:
            compress = output.suffix.lower() == ".gz"
            entries = kept.beside(_counted(part.entries(), summary))
            write(staged, kept.fields, entries, compress)
        part.discard()
    summary.seconds = time.perf_counter() - start
    return summary


def _settings(
    predictor: Predictor, point: ReadyPoint, examples: Dataset, labels: Labels, budget: Budget
) -> dict[str, Any]:
    """All that decides what the rows of the output say."""
    points = examples["point"][:] if "point" in examples.column_names else []
    if points and labels.sets is not None:
        raise ConfigError("Sets belong to one point, so they do not go with a column of points.")
    of_rows = {name: _told(predictor.ready(name)) for name in sorted({*points} - {None})}
    policy, temperatures = _told(point)
    return {
        "schema_version": 1,
        "model": predictor.model.fingerprint(),
        "processor": predictor.processor_fingerprint,
        "data": data_fingerprint(examples),
        "policy": policy,
        "points": fingerprint(json.dumps([points, of_rows], sort_keys=True)) if points else None,
        "budget": asdict(budget),
        "temperatures": temperatures,
        "engine": predictor.engine.name,
        "dtype": predictor.engine.dtype,
        "max_length": predictor.max_length,
        "scores": labels.scores,
        "sets": labels.sets and labels.sets.model_dump(mode="json"),
    }


def _told(point: ReadyPoint) -> tuple[dict[str, Any], tuple[float, ...] | None]:
    """What of a point decides what is said of its rows."""
    warm = point.temperatures
    return point.policy.to_dict(), None if warm is None else warm.values


def _run(
    part: PartialFile,
    predictor: Predictor,
    point: ReadyPoint,
    examples: Dataset,
    labels: Labels,
    budget: Budget,
    progress: bool,
) -> None:
    """Append the answers of all rows that are not there yet."""
    bar = tqdm(
        total=len(examples),
        initial=part.rows,
        desc="predict",
        unit="row",
        disable=None if progress else True,
    )
    seen: Counter[int] = Counter()

    def show(answers: Sequence[Answer]) -> None:
        seen.update(answer.exit_layer for answer in answers)
        bar.set_postfix_str(f"mean exit layer {_mean(seen):.2f}", refresh=False)
        bar.update(len(answers))

    watch = predictor.watched
    with bar, nullcontext() if watch is None else watch.when_kept() as keep:
        rows = ahead(predictor, rows_of_examples(examples, first=part.rows))
        for block in blocks(predictor, rows, point, labels, budget, show):
            part.append(block)
            if keep is not None:
                keep()


def _mean(counts: Counter[int]) -> float:
    return sum(layer * count for layer, count in counts.items()) / counts.total()


def _counted(entries: Iterator[dict[str, Any]], summary: Summary) -> Iterator[dict[str, Any]]:
    for entry in entries:
        summary.rows += 1
        if "error" in entry:
            summary.errors += 1
        else:
            summary.forced += entry.get("forced", False)
            summary.exit_histogram[entry["exit_layer"] - 1] += 1
        yield entry
