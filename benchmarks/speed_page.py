"""docs/results/speed.md from the JSON files of speed.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from speed_study import Cell, Figure, Part, said

from offramp.storage import read_document, whole_file

PREFACE = """# Is a layer saved time saved?

What was asked of the engines, and what was measured, by

    python benchmarks/speed.py {commands}
    python benchmarks/speed.py page

Contenders take turns of about half a second, after a pass that is not counted; a turn of several
batches begins with one that is not counted. A figure is the median over passes of a ratio within
each, with its 95 % interval from their order. Where *processes* stand beside a cell, it is the
median over so many of them: one may be some percents faster than the next, which its own passes do
not show. **Yes**: the whole interval is on the right side of the target; **no**: all of it is on
the wrong side; **undecided**: neither. Counts have no interval. Some parts ran at the same time,
each on a core of its own.

Speed-up is full depth over early exit in the same engine; full depth is the fastest of ours and
of what a user has without offramp: transformers, or ONNX Runtime with its own options, or without
the two fusions that ours goes without. *Forced* depths: exits and policy run at every layer, rows
of one batch leave at different layers by a pattern. *Fixed*: from tokens to the first layer."""


class Words(NamedTuple):
    """What was asked, how it was measured, and what stands in the way where it was missed."""

    asked: str
    how: str
    way: str = ""


WORDS = {
    "share": Words(
        "Realised share of the ideal at least 0.95 at batch 1 and 0.90 at batch 32, at mean exit "
        "depths of 25, 50 and 75 %",
        "Forced depths; SST-2 dev lengths, for rxn-albert reactions of uspto_50k dev. BERT-base, "
        "ALBERT-base and MiniLM-6 have random weights, all have the exits of `attach`. How deep "
        "a row goes has little to do with its length. Nothing was asked of int8.",
        "At batch 1 in ONNX Runtime, where the ideal starts from the fastest full depth there is: "
        "exits, policy and one branch a layer (see *profile*) beside layers of 0.6 to 3 ms; the "
        "fewer layers are run, the more this weighs.",
    ),
    "full": Words(
        "At full depth no engine of ours is slower than that engine used plainly",
        "The plain runtime's time over ours. Of two that are equally fast the interval holds 1, "
        "which is undecided.",
        "In int8 ours has a scale for every token, so that no row depends on its neighbours, "
        "where plain ONNX Runtime has one for a whole batch: about thirty small operations a "
        "layer more, less those that attention no longer takes, which a layer of MiniLM at batch "
        "1 does not hide. Switching two fusions off, as ours does, is an option of plain ONNX "
        "Runtime that few know.",
    ),
    "padding": Words(
        "On SST-2 train lengths at least 2x a padded-to-batch baseline at batch 32; dev 1.6x",
        "Full depth of MiniLM-6. The baseline pads batches of 32 to their longest row, as rows "
        "arrive; ours reads 1,024 rows ahead, as `predict` does, sorts them by length and fills "
        "batches under a budget of tokens. Pairs are windows of 1,024 rows.",
    ),
    "int8": Words(
        "Early exit in int8 reaches at least 0.9 x the point's own cost reduction over plain "
        "ONNX Runtime in int8; the goal is 3x at no more than 0.5 points lost",
        "Points are chosen on what the engine in int8 says of rows that the model was not trained "
        "on, and read on dev. Plain is ONNX Runtime in the usual dynamic int8, with its own "
        "options, and without the two fusions that our engine goes without, too. In a stream it "
        "takes rows as they arrive, 32 at a time; ours sorts them by length.",
        "MiniLM has six layers of a few tenths of a millisecond: exits, branches and the scales of "
        "tokens weigh there when rows leave after layer 1 or 2. Beside ONNX Runtime with its own "
        "options they are won back; without the two fusions, which few know to switch off, plain "
        "ONNX Runtime is a sixth faster. Whether MiniLM loses half a point cannot be seen on 872 "
        "rows. The model of uspto_50k has learnt from 12,000 rows, by `offramp train --epochs 5 "
        "--learning-rate 3e-4`; one of 6,000 rows and fewer epochs could give away half a point at "
        "2.2x, not at 3x.",
    ),
    "pabee": Words(
        "Identical answers and at least 10x the throughput of a PABEE loop as the original's",
        "The loop takes one row at a time, padded to 128 tokens, layer by layer in Python, with "
        "the stock model's layers; ours runs all rows in batches. Nothing was asked of int8.",
        "Torch in fp32 spends its time on multiplications, which the loop's padding costs most; "
        "what is saved beside is small. ONNX Runtime does them faster.",
    ),
    "pool": Words(
        "Depth pool on an ALBERT: at least 0.95 of L / mean depth under a saturated stream, "
        "answers equal to one by one",
        "Rows of one length without end, that leave after layers 1 to L-1 in equal shares; see "
        "`bench_pool.py`. L / mean depth counts neither the fixed part nor exits.",
    ),
    "file": Words(
        "The single ONNX file answers as the torch engine outside a band of 1e-4; at batch 1 it "
        "is not slower than the engines",
        "The file in a plain session of ONNX Runtime with its own options; the ONNX engine goes "
        "without two fusions. The band is where some evidence or score met on the way is that "
        "near to tipping.",
    ),
    "determinism": Words(
        "Deterministic mode: 200 texts x 50 random batches, 0 differing bits; without it some "
        "differ; nothing is made anew over 1,000 requests of random batch and length",
        "Each of 50 random orders of all texts is one stream, and without the mode batches of 32; "
        "answers are compared, bit by bit, with those in the order in which the texts stand.",
    ),
    "profile": Words(
        "What we add to a layer (dispatch, exits, policy, compaction) is at most 100 "
        "microseconds on torch, 50 on ONNX",
        "A run under a policy that evaluates every exit, less what comes before the first layer, "
        "less the layers at the rows they had (each a depth-th of the plain model at so many "
        "rows), per call of a layer. *Layers that do nothing*: the torch engine on layers that "
        "give back what they get; it is exact where a layer's own time drowns the difference, "
        "and kind, since all that is read lies in the cache. *By stage*: what the time of a run "
        "goes to, per executed layer; in ONNX Runtime by its own profiler, in whole microseconds "
        "a node, in torch by clocks around our functions. *Between* is what none of them takes, "
        "the profiler's own work included.",
        "At 32 rows an exit reads every token of every row, and rows that stay are copied: this "
        "grows with the batch, as a layer does.",
    ),
}
ORDER = tuple(WORDS)
LONGEST_COMMAND = "all --sst2 FOLDER --uspto FOLDER"


def write_page(
    folder: Path, page: Path, planned: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Of all parts that lie in a folder.

    Args:
        planned: the cells of each part, so that the page names those that are not there.
    """
    found = [read_document(Part, path) for path in sorted(folder.glob("*.json"))]
    parts = sorted(found, key=lambda part: (ORDER.index(part.part), part.threads))
    with whole_file(page) as staged:
        staged.write_text("\n\n".join(_page(parts, planned or {})) + "\n", encoding="utf-8")


def _page(parts: Sequence[Part], planned: Mapping[str, Sequence[str]]) -> Iterator[str]:
    threads = sorted({part.threads for part in parts})
    extra = "".join(f" [--threads {count}]" for count in threads if count != 1)
    yield PREFACE.format(commands=LONGEST_COMMAND + extra)
    if any(part.quick for part in parts):
        yield "**Some of this was made by `--quick` and says nothing.**"
    yield _summary(parts, planned)
    for name in ORDER:
        some = [part for part in parts if part.part == name]
        if some:
            yield from _section(name, some, planned)


def _absent(part: Part, planned: Mapping[str, Sequence[str]]) -> list[str]:
    return [cell for cell in planned.get(part.part, ()) if cell not in part.cells]


def _summary(parts: Sequence[Part], planned: Mapping[str, Sequence[str]]) -> str:
    head = ["", "threads", "figures", "yes", "no", "undecided", "cells not measured"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, words in WORDS.items():
        some = [part for part in parts if part.part == name]
        for part in some:
            counted = Counter(figure.answer for figure in _figures(part) if figure.answer)
            numbers = [counted.total(), counted["yes"], counted["no"], counted["undecided"]]
            numbers.append(len(_absent(part, planned)))
            cells = " | ".join(map(str, [part.threads, *numbers]))
            lines.append(f"| [{words.asked}](#{name}) | {cells} |")
        if not some:
            lines.append(f"| {words.asked} | not measured yet | | | | | |")
    return "\n".join(lines)


def _figures(part: Part) -> Iterator[Figure]:
    for cell in part.cells.values():
        yield from cell.figures


def _section(
    name: str, parts: Sequence[Part], planned: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    words = WORDS[name]
    yield f"## {name}"
    yield f"{words.asked}. {words.how}"
    for part in parts:
        machine = ", ".join(f"{name} {value}" for name, value in part.machine.items())
        yield f"On {part.threads} thread{'s' if part.threads > 1 else ''} of {machine}:"
        yield "\n".join(_table(part))
        yield "\n".join(_facts(part))
        if absent := _absent(part, planned):
            yield f"Not measured: {'; '.join(absent)}."
    missed = any(
        figure.answer in ("no", "undecided") for part in parts for figure in _figures(part)
    )
    if missed and words.way:
        yield f"What stands in the way: {words.way}"


def _table(part: Part) -> Iterator[str]:
    yield "| cell | figure | measured [95 %] | asked | | beside |"
    yield "|---|---|---|---|---|---|"
    for name, cell in part.cells.items():
        for figure in cell.figures:
            columns = (name, figure.name, said(figure), _asked(figure), figure.beside)
            yield f"| {' | '.join(columns)} |"


def _asked(figure: Figure) -> str:
    if figure.target is None:
        return " | "
    sign = "≥" if figure.least else "≤"
    answer = figure.answer if figure.answer == "yes" else f"**{figure.answer}**"
    return f"{sign} {figure.target:g} | {answer}"


def _facts(part: Part) -> Iterator[str]:
    """Beside each cell: rows, passes, times; one line of columns that all cells share."""
    columns = list(dict.fromkeys(name for cell in part.cells.values() for name in cell.facts))
    yield f"| cell | {' | '.join([*columns, 'minutes'])} |"
    yield "|---" * (len(columns) + 2) + "|"
    for name, cell in part.cells.items():
        yield f"| {name} | {' | '.join(_row(cell, columns))} |"


def _row(cell: Cell, columns: Sequence[str]) -> Iterator[str]:
    for name in columns:
        fact = cell.facts.get(name, "")
        yield f"{fact:.4g}" if isinstance(fact, float) else f"{fact}"
    yield f"{cell.minutes:g}"
