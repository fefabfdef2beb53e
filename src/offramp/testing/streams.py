"""What engines that offer `stream` must keep: a row has its own answer, whenever it comes."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from offramp.backbones import Batch
from offramp.engines import Exitable, RowAnswer, rows_of
from offramp.model import MultiExitModel
from offramp.policies import Patience, Policy
from offramp.testing.echo import EchoModel, Scripted, echo_batch
from offramp.testing.reference import Walked, ensure

MakeEngine = Callable[[Exitable], Any]
Compare = Callable[[Policy, Walked, str], None]


def check_stream(
    make_engine: MakeEngine,
    model: MultiExitModel,
    policies: Sequence[Policy],
    batch: Batch,
    compare: Compare,
) -> None:
    """Check `stream` on the rows of a batch: in any order, beside a broken row, in threads.

    Args:
        make_engine: from a model to the engine that runs it.
        model: in evaluation mode.
        policies: those to run.
        batch: of rows that may be padded.
        compare: raises unless answers are those of the rows run one at a time.
    """
    engine = make_engine(model)
    rows = list(stream_rows(batch))
    for policy in policies:
        compare(policy, _gathered(engine.stream(rows, policy)), "a stream")
        ordered = list(engine.stream(rows, policy, ordered=True))
        ensure(
            [position for position, _ in ordered] == list(range(len(rows))),
            f"Under {policy!r} a stream with ordered=True gives its answers in another order.",
        )
    policy = policies[0]
    ensure(not list(engine.stream([], policy)), "A stream of no rows gives answers.")
    _check_failing_source(engine, rows, policy)
    _check_broken(make_engine, model, rows, policy)
    _check_threads(engine, rows, policies)


def stream_rows(batch: Batch) -> Iterator[tuple[int, Batch]]:
    """The rows of a batch as a stream takes them, with their places as ids."""
    for row in range(rows_of(batch).ids.shape[0]):
        yield row, {name: leaf[row : row + 1] for name, leaf in batch.items()}


def _gathered(results: Iterator[tuple[int, RowAnswer]]) -> Walked:
    """All answers in the order of the rows."""
    answers = [answer for _, answer in sorted(results, key=lambda result: result[0])]
    return Walked(
        torch.stack([answer.scores for answer in answers]),
        torch.tensor([answer.exit_layer for answer in answers]),
        torch.tensor([answer.bad for answer in answers]),
    )


def _check_failing_source(engine: Any, rows: Sequence[tuple[int, Batch]], policy: Policy) -> None:
    """Rows read before an iterable raises are answered, and its error reaches the caller."""

    def failing() -> Iterator[tuple[int, Batch]]:
        yield from rows[:5]
        raise LookupError("the source is gone")

    seen = []
    try:
        for position, _ in engine.stream(failing(), policy):
            seen.append(position)
    except LookupError:
        ensure(sorted(seen) == [0, 1, 2, 3, 4], "Rows read before an error are not answered.")
    else:
        raise AssertionError("An error of the iterable is swallowed.")


@torch.no_grad()
def _check_broken(
    make_engine: MakeEngine,
    model: MultiExitModel,
    rows: Sequence[tuple[int, Batch]],
    policy: Policy,
) -> None:
    """A row with a NaN gets its flag, and its neighbours the answers they have without it."""
    broken = 3
    if model.backbone.reads == "image":
        id, row = rows[broken]
        poisoned = {name: leaf.clone().fill_(math.nan) for name, leaf in row.items()}
        harmed = [*rows[:broken], (id, poisoned), *rows[broken + 1 :]]
    else:
        model, harmed = copy.deepcopy(model), list(rows)
        table: Any = model.stock.get_input_embeddings().weight
        token = table.shape[0] - 1
        table[token] = math.nan
        harmed = [(id, _without(row, token)) for id, row in rows]
        harmed[broken][1]["input_ids"][0, 0] = token
    answers = _gathered(make_engine(model).stream(harmed, policy))
    ensure(
        answers.bad.tolist() == [place == broken for place in range(len(rows))],
        f"Under {policy!r} a row with NaN marks rows {answers.bad.nonzero().flatten().tolist()}.",
    )


def _without(row: Batch, token: int) -> dict[str, torch.Tensor]:
    ids = row["input_ids"]
    return {**row, "input_ids": ids.where(ids != token, token - 1).clone()}


def _check_threads(
    engine: Any, rows: Sequence[tuple[int, Batch]], policies: Sequence[Policy]
) -> None:
    """Streams in eight threads answer as they do one after the other, bit for bit."""
    jobs = [policies[number % len(policies)] for number in range(8)]
    serial = [_gathered(engine.stream(rows, policy)) for policy in jobs]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda policy: _gathered(engine.stream(rows, policy)), jobs))
    for policy, one, other in zip(jobs, serial, parallel, strict=True):
        same = torch.equal(one.scores.nan_to_num(), other.scores.nan_to_num())
        same = same and torch.equal(one.exit_layers, other.exit_layers)
        ensure(same, f"Under {policy!r} answers change when other threads have streams.")


def check_stream_bookkeeping(make_engine: MakeEngine, patterns: int = 10, seed: int = 0) -> None:
    """Run random exit patterns on echo models and look for a row with another's answer.

    Args:
        make_engine: from a model to the engine that runs it.
        patterns: streams of up to 99 rows of three shapes, with an exit layer drawn for each; in
            every second one all layers share a block.
        seed: of the patterns.
    """
    for number in range(seed, seed + patterns):
        _echo(make_engine(EchoModel(shared=bool(number % 2))), number)


def _echo(engine: Any, seed: int) -> None:
    draw = random.Random(seed)
    ids = [draw.randrange(256) for _ in range(draw.randint(0, 99))]
    layers = tuple(draw.choices(range(1, 13), k=256))
    script = Scripted(layers=layers, inner=Patience())
    rows = ((id, echo_batch([id], tokens=draw.randint(1, 3))) for id in ids)
    results = sorted(engine.stream(rows, script), key=lambda result: result[0])
    wanted = [(place, [float(id), float(layers[id])]) for place, id in enumerate(ids)]
    given = [(place, answer.scores.tolist()) for place, answer in results]
    ensure(given == wanted, f"Pattern {seed}: rows of a stream got each other's answers.")
    left = [answer.exit_layer for _, answer in results]
    ensure(left == [layers[id] for id in ids], f"Pattern {seed}: exit layers are mixed up.")
