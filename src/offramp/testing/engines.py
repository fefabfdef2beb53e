"""What every engine must keep: early exits are those that the slow twin finds, row by row."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from offramp.backbones import Backbone, Batch
from offramp.engines import Answers, Budget, Engine, Exitable, rows_of
from offramp.exits import ExitOutput
from offramp.model import MultiExitModel
from offramp.policies import Patience, Policy, Rows
from offramp.testing.backbones import BAND
from offramp.testing.echo import EchoModel, Scripted, echo_batch
from offramp.testing.reference import (
    Outputs,
    Walked,
    ensure,
    select,
    spread_policies,
    stack_rows,
    walk,
    walk_alone,
)
from offramp.testing.streams import check_stream, check_stream_bookkeeping
from offramp.testing.tiny import tiny_batch_for

MakeEngine = Callable[[Exitable], Engine]


@torch.inference_mode()
def check_engine(
    make_engine: MakeEngine,
    model: MultiExitModel,
    policies: Sequence[Policy] | None = None,
    rows: int = 48,
    band: float = BAND,
    compiled: bool = False,
) -> None:
    """Check an engine on a model: replay equals live, rows are independent, nothing mixes.

    Its `stream` is checked where it has one.

    Args:
        make_engine: from a model to the engine that runs it.
        model: in evaluation mode, with a vocabulary of at least that of the tiny models.
        policies: those to run, at bars where rows leave at many layers. Unless given, those
            that a search tries for the task, and whatever reads the model's signals.
        rows: of the batch it runs.
        band: by how much scores may differ between shapes. A row may leave elsewhere only if
            a change of that size moves its exit.
        compiled: it makes a graph of a model, so that no Python code can watch rows from inside;
            a scripted policy does what the echo model would.

    Raises:
        AssertionError: saying under which policy which rows went wrong.
    """
    engine = make_engine(model)
    batch = tiny_batch_for(model.stock, rows, tokens=24, seed=5)
    alone = stack_rows(model.all_exits(_row(batch, row)) for row in range(rows))
    together = model.all_exits(batch)
    policies = policies or _usual(spread_policies(model.problem_type, together))
    for policy in policies:
        whole = engine.run(batch, policy, rows_of(batch))
        _check_twin(policy, whole, together, rows_of(batch), band, "replay of the same batch")
        _check_twin(policy, whole, alone, rows_of(batch), band, "the rows run one at a time")
        _check_companies(engine, policy, batch, alone, band)
        if not compiled:
            _check_broken(make_engine, model, policy, batch)
    for policy in policies[:1] if compiled else policies:
        _check_budget(engine, policy, batch, model.depth)
    _check_threads(engine, policies, batch)
    if compiled:
        _check_script(engine, model.depth, batch, together, band)
    else:
        check_bookkeeping(make_engine)
    if hasattr(engine, "stream"):

        def compare(policy: Policy, live: Walked, what: str) -> None:
            _check_twin(policy, live, alone, rows_of(batch), band, f"the rows alone, in {what}")

        check_stream(make_engine, model, policies, batch, compare)
        check_stream_bookkeeping(make_engine)


def _check_budget(engine: Engine, policy: Policy, batch: Batch, depth: int) -> None:
    """Nobody runs deeper than allowed, who would have is told apart, and the others are let be."""
    deepest, rows = max(1, depth // 2), rows_of(batch)
    free = engine.run(batch, policy, rows)
    short = engine.run(batch, policy, rows, Budget(depth=deepest))
    late = free.exit_layers > deepest
    forced = torch.zeros_like(late) if short.forced is None else short.forced
    same = torch.equal(short.scores[~late].nan_to_num(), free.scores[~late].nan_to_num())
    ensure(
        same
        and torch.equal(short.exit_layers, free.exit_layers.clamp_max(deepest))
        and torch.equal(forced, late),
        f"Under {policy!r} a depth budget of {deepest} is not kept, or moves rows within it.",
    )


def _usual(policies: Sequence[Policy]) -> list[Policy]:
    return [policy for policy in policies if policy.searched or policy.needs]


def _row(batch: Batch, row: int) -> Batch:
    alone = _select(batch, torch.tensor([row]))
    return {name: leaf for name, leaf in alone.items() if name != "attention_mask"}


def _select(batch: Batch, chosen: Tensor) -> Batch:
    """Some rows, padded only as far as the longest of them."""
    if "attention_mask" not in batch:
        return {name: value[chosen] for name, value in batch.items()}
    tokens = int(batch["attention_mask"][chosen].sum(dim=1).max())
    return {name: value[chosen, :tokens] for name, value in batch.items()}


def _check_twin(
    policy: Policy, live: Answers | Walked, outputs: Outputs, rows: Rows, band: float, what: str
) -> None:
    """Equal to the slow twin, but for rows that a change within the band would move."""
    twin = walk_alone(policy, outputs, rows)
    moved = live.exit_layers != twin.exit_layers
    excused = moved & _fragile(policy, outputs, rows, band) if moved.any() else moved
    ensure(
        torch.equal(excused, moved) and int(moved.sum()) <= 1 + moved.shape[0] // 100,
        f"Under {policy!r} rows {moved.nonzero().flatten().tolist()[:8]} leave after other "
        f"layers than in {what}.",
    )
    scale = max(1.0, twin.scores.abs().max().item())
    gap = (live.scores - twin.scores)[~moved].abs().max().item() if not moved.all() else 0.0
    ensure(gap <= band * scale, f"Under {policy!r} scores differ by {gap:.1e} from {what}.")
    ensure(torch.equal(live.bad, twin.bad), f"Under {policy!r} other rows are bad than in {what}.")


def _fragile(policy: Policy, outputs: Outputs, rows: Rows, band: float) -> Tensor:
    """Rows whose exit moves when their scores move by no more than the band."""
    draw = torch.Generator().manual_seed(0)
    exits = walk(policy, outputs, rows).exit_layers
    fragile = torch.zeros_like(exits, dtype=torch.bool)
    for _ in range(16):
        nudged = [
            ExitOutput(
                _nudged(output.scores, band, draw),
                {name: _nudged(leaf, band, draw) for name, leaf in output.signals.items()},
            )
            for output in outputs
        ]
        fragile |= walk(policy, nudged, rows).exit_layers != exits
    return fragile


def _nudged(values: Tensor, band: float, draw: torch.Generator) -> Tensor:
    return values + band * (2 * torch.rand(values.shape, generator=draw) - 1)


def _check_companies(
    engine: Engine, policy: Policy, batch: Batch, alone: Outputs, band: float
) -> None:
    """Any neighbours, any order, any padding: the row's own answer, in the row's own place."""
    rows = rows_of(batch)
    count = rows.ids.shape[0]
    draw = torch.Generator().manual_seed(2)
    for size in (1, 2, 7, count // 2, count):
        chosen = torch.randperm(count, generator=draw)[:size]
        part = Rows(rows.ids[chosen], rows.lengths[chosen])
        live = engine.run(_select(batch, chosen), policy, part)
        outputs = select(alone, chosen)
        _check_twin(policy, live, outputs, part, band, f"the rows run alone, not {size} at once")


def _check_script(engine: Engine, depth: int, batch: Batch, outputs: Outputs, band: float) -> None:
    """Every row leaves where a script says, with what its own exit there says."""
    rows = rows_of(batch)
    draw = random.Random(0)
    layers = tuple(draw.choices(range(1, depth + 1), k=len(rows.ids)))
    script = Scripted(layers=layers, inner=Patience())
    _check_twin(script, engine.run(batch, script, rows), outputs, rows, band, "the script")


class _Poisoned:
    """A model whose exit after one layer gives one row a score that is no number.

    The place of each row travels in the memory between exits, so it is known after any
    compaction.
    """

    def __init__(self, model: Exitable, layer: int, row: int, value: float) -> None:
        self._model = model
        self._where = (layer, row, value)

    @property
    def backbone(self) -> Backbone:
        return self._model.backbone

    @property
    def depth(self) -> int:
        return self._model.depth

    def all_exits(self, batch: Batch) -> tuple[ExitOutput, ...]:
        raise NotImplementedError

    def exit_at(self, layer: int) -> Callable[..., tuple[ExitOutput, Any]]:
        poisoned, row, value = self._where

        def answer(
            hidden: Tensor, mask: Tensor | None, carry: Any = None
        ) -> tuple[ExitOutput, Any]:
            carry = carry or {"place": torch.arange(hidden.shape[0]), "inner": None}
            output, inner = self._model.exit_at(layer)(hidden, mask, carry["inner"])
            scores = output.scores.clone()
            if layer == poisoned:
                scores[carry["place"] == row, -1] = value
            return ExitOutput(scores, output.signals), {**carry, "inner": inner}

        return answer


def _check_broken(
    make_engine: MakeEngine, model: MultiExitModel, policy: Policy, batch: Batch
) -> None:
    """A broken row gets its flag; its neighbours get their answers, bit for bit."""
    few = _select(batch, torch.arange(8))
    layers = [n for n in range(1, model.depth + 1) if n == model.depth or policy.reads(n)]
    for number, value in enumerate((math.nan, math.inf, -math.inf)):
        layer, row = layers[number * (len(layers) - 1) // 2], 2 * number + 1
        # the row leaves there with or without the poison, so the shapes stay the same
        wanted = tuple(layer if place == row else model.depth for place in range(8))
        script = Scripted(layers=wanted, inner=policy)
        clean = make_engine(model).run(few, script)
        harmed = make_engine(_Poisoned(model, layer, row, value)).run(few, script)
        ensure(
            harmed.bad.tolist() == [place == row for place in range(8)],
            f"Under {policy!r} a score of {value} after layer {layer} in row {row} marks rows "
            f"{harmed.bad.nonzero().flatten().tolist()} as bad.",
        )
        others = ~harmed.bad
        same = torch.equal(harmed.scores[others], clean.scores[others]) and torch.equal(
            harmed.exit_layers, clean.exit_layers
        )
        ensure(same, f"Under {policy!r} the broken row {row} changes its neighbours' answers.")


def _check_threads(engine: Engine, policies: Sequence[Policy], batch: Batch) -> None:
    """Eight threads, each with a policy of its own, get what one thread gets, bit for bit."""
    jobs = [policy for policy in policies for _ in range(3)]
    serial = [engine.run(batch, policy) for policy in jobs]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda policy: engine.run(batch, policy), jobs))
    for policy, one, other in zip(jobs, serial, parallel, strict=True):
        same = torch.equal(one.scores, other.scores) and torch.equal(
            one.exit_layers, other.exit_layers
        )
        ensure(same, f"Under {policy!r} answers change when other threads use the engine.")


def check_bookkeeping(
    make_engine: MakeEngine, patterns: int = 100, threads: int = 1, seed: int = 0
) -> None:
    """Run random exit patterns on the echo model and look for a row with another's answer.

    Args:
        make_engine: from a model to the engine that runs it.
        patterns: batches of 1 to 64 rows with an exit layer drawn for each row.
        threads: that share one engine.
        seed: of the patterns.
    """
    engine = make_engine(EchoModel())
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda number: _echo(engine, number), range(seed, seed + patterns)))


def _echo(engine: Engine, seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 64)
    ids = draw.sample(range(256), count)
    layers = tuple(draw.choices(range(1, 13), k=256))
    script = Scripted(layers=layers, inner=Patience())
    rows = Rows(torch.tensor(ids), torch.ones(count, dtype=torch.long))
    answers = engine.run(echo_batch(ids), script, rows)
    wanted = [[float(row), float(layers[row])] for row in ids]
    ensure(answers.scores.tolist() == wanted, f"Pattern {seed}: rows got each other's answers.")
    left = answers.exit_layers.tolist()
    ensure(left == [layers[row] for row in ids], f"Pattern {seed}: exit layers are mixed up.")
