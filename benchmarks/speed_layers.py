"""Parts of speed.py about layers: `share`, `full`, `profile` and `pool`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, cast

import bench_pool
import numpy as np
import torch
from speed_stages import ProfiledOnnx, ProfiledTorch, stages
from speed_study import (
    ARCHITECTURES,
    Cell,
    Cells,
    Figure,
    Numbers,
    Options,
    Places,
    Seconds,
    Stand,
    fastest,
    ms,
    neighbours,
    rxn_albert,
    singles,
    stand,
    timed,
)
from transformers import AlbertConfig, AutoModelForSequenceClassification

from offramp.backbones import Flow
from offramp.benchmark.workloads import forced_policies
from offramp.engines import TorchEngine, cost_model
from offramp.evaluation import ideal_speed_up
from offramp.evaluation.speed import Job
from offramp.model import MultiExitModel
from offramp.policies import Full, MaxProbability, Policy, Rows

SHARES = {"25 %": 0.25, "50 %": 0.5, "75 %": 0.75}
ENGINES = (("torch", "fp32"), ("onnx", "fp32"), ("onnx", "int8"), ("inductor", "fp32"))
SHARE_TARGETS = {1: 0.95, 32: 0.90}
ADDED_TARGETS = {"torch": 100.0, "onnx": 50.0}
OURS, FIXED = "ours", "fixed"
STAGE_PASSES = 15
PATTERN = 128
"""Rows that are forced at the most; one file serves all that are fewer."""


def models(options: Options) -> list[str]:
    names = [*ARCHITECTURES, "rxn-albert"] if rxn_albert().is_dir() else [*ARCHITECTURES]
    return ["MiniLM-6"] if options.quick else names


def _batches(one: Stand, size: int, options: Options) -> list[Places]:
    """About as much work of every model: base-sized ones get fewer rows."""
    large = one.model.stock.config.hidden_size >= 768
    if size == 1:
        return singles(one.data.lengths, options.some(16 if large else 48, 4))
    return neighbours(one.data.lengths, size, options.some(1 if large else 3, 1))


def _jobs(one: Stand, runner: Any, batches: Sequence[Places], policy: Policy) -> list[Job]:
    return [runner.job(batch, rows, policy) for batch, rows in one.numbered(batches)]


# How much of the ideal


def share(options: Options) -> Cells:
    return {
        f"{name}, {runtime} {precision}, batch {size}": partial(
            _share, options, name, runtime, precision, size
        )
        for name in models(options)
        for runtime, precision in ENGINES
        for size in SHARE_TARGETS
    }


def _share(options: Options, name: str, runtime: str, precision: str, size: int) -> Cell:
    one = stand(name, options.threads, options.quick)
    batches = _batches(one, size, options)
    rows = sum(map(len, batches))
    ours, plain = one.ours(runtime, precision), one.plain(runtime, precision)
    early = dict(zip(SHARES, forced_policies(one.model, [*SHARES.values()], PATTERN), strict=True))
    jobs = {said: _jobs(one, runner, batches, Full()) for said, runner in plain.items()}
    jobs[OURS] = _jobs(one, ours, batches, Full())
    jobs[FIXED] = _jobs(one, ours.front, batches, Full())
    jobs |= {said: _jobs(one, ours, batches, policy) for said, policy in early.items()}
    executed = {said: _executed(one, jobs[said], batches, early[said]) for said in early}
    seconds = timed(jobs, options)
    full_is = fastest(seconds, [*plain, OURS])
    target = SHARE_TARGETS[size] if precision == "fp32" else None
    figures = [_realised(said, seconds, full_is, *executed[said], target=target) for said in early]
    facts = {
        "rows": rows,
        "passes": len(seconds[OURS]),
        "tokens": round(float(one.lengths_in(batches).mean()), 1),
        "full depth is": full_is,
        "full depth, ms a row": round(ms(seconds[full_is], rows), 3),
        "fixed part, ms a row": round(ms(seconds[FIXED], rows), 4),
    }
    return Cell(figures=tuple(figures), facts=facts)


def _executed(
    one: Stand, jobs: Sequence[Job], batches: Sequence[Places], policy: Policy
) -> tuple[float, float]:
    """Mean exit layer, and the executed share of full-depth FLOPs."""
    answers: list[Any] = [job() for job in jobs]
    layers = np.concatenate([found.exit_layers.numpy() for found in answers])
    cost = cost_model(one.model).share(one.lengths_in(batches), layers, policy)
    return float(layers.mean()), cost


def _realised(
    said: str, seconds: Seconds, full_is: str, layer: float, cost: float, target: float | None
) -> Figure:
    full, fixed, early = seconds[full_is], seconds[FIXED], seconds[said]
    ideal = ideal_speed_up(float(np.median(full)), float(np.median(fixed)), cost)
    beside = f"speed-up {np.median(full / early):.2f}, ideal {ideal:.2f}"
    return Figure.of(
        f"realised share, {said} deep",
        (fixed + cost * (full - fixed)) / early,
        target,
        beside=f"{beside}, mean exit layer {layer:.2f}, cost {cost:.3f}",
    )


# Nothing lost at full depth


def full(options: Options) -> Cells:
    kinds = [*ENGINES, ("openvino", "fp32")]
    return {
        f"{name}, {runtime} {precision}, batch {size}": partial(
            _full, options, name, runtime, precision, size
        )
        for name in models(options)
        for runtime, precision in kinds
        for size in SHARE_TARGETS
    }


def _full(options: Options, name: str, runtime: str, precision: str, size: int) -> Cell:
    one = stand(name, options.threads, options.quick)
    batches = _batches(one, size, options)
    rows = sum(map(len, batches))
    plain = one.plain(runtime, precision)
    jobs = {said: _jobs(one, runner, batches, Full()) for said, runner in plain.items()}
    jobs[OURS] = _jobs(one, one.ours(runtime, precision), batches, Full())
    seconds = timed(jobs, options)
    figures = [
        Figure.of(
            f"{said} / ours, time",
            seconds[said] / seconds[OURS],
            1.0,
            beside=f"{ms(seconds[said], rows):.3f} and {ms(seconds[OURS], rows):.3f} ms a row",
        )
        for said in plain
    ]
    return Cell(figures=tuple(figures), facts={"rows": rows, "passes": len(seconds[OURS])})


# What we add to a layer


def profile(options: Options) -> Cells:
    cells: Cells = {}
    for name, runtime, size in product(models(options), ADDED_TARGETS, SHARE_TARGETS):
        cell = f"{name}, {runtime}, batch {size}"
        told = runtime == "torch" or _can_tell(name, size)
        cells[cell] = partial(_profile, options, name, runtime, size) if told else _untold
        cells[f"{cell}, by stage"] = partial(_by_stage, options, name, runtime, size)
    return cells


def _can_tell(name: str, size: int) -> bool:
    """Whether 50 microseconds a layer stand out in the difference of two runs."""
    return size == 1 or name == "MiniLM-6"


def _untold() -> Cell:
    why = "a layer takes so long that 50 us are lost in the difference of two runs"
    return Cell(figures=(), facts={"cannot tell": why})


def _by_stage(options: Options, name: str, runtime: str, size: int) -> Cell:
    one = stand(name, options.threads, options.quick)
    if runtime == "torch":
        engine: Any = ProfiledTorch(one.model)
    else:
        engine = ProfiledOnnx(one.model, threads=options.threads, progress=False)
    batches = _batches(one, size, options)
    policy = forced_policies(one.model, [0.5], PATTERN)[0]
    jobs = [partial(engine.run, batch, policy, rows) for batch, rows in one.numbered(batches)]
    passes = engine.spent(jobs, options.some(STAGE_PASSES, 2))
    return Cell(figures=(), facts={"rows": sum(map(len, batches))} | stages(passes))


def _profile(options: Options, name: str, runtime: str, size: int) -> Cell:
    one = stand(name, options.threads, options.quick)
    batches = _batches(one, size, options) if size == 1 else neighbours(one.data.lengths, size, 1)
    rows = sum(map(len, batches))
    policies: dict[str, Policy] = {
        "rows leave on the way": forced_policies(one.model, [0.5], PATTERN)[0],
        "none leaves": MaxProbability(threshold=1.0),
    }
    jobs: dict[str, list[Job]] = {
        FIXED: _jobs(one, one.ours(runtime, "fp32").front, batches, Full())
    }
    found = []
    for said, policy in policies.items():
        if _can_tell(name, size):
            found.append(_by_difference(one, runtime, batches, said, policy, jobs))
        if runtime == "torch":
            found.append(_with_idle_layers(one, batches, said, policy, jobs))
    seconds = timed(jobs, options)
    target = ADDED_TARGETS[runtime]
    figures = tuple(
        Figure.of(said, 1e6 * spent(seconds) / calls, target, least=False)
        for said, calls, spent in found
    )
    return Cell(figures=figures, facts={"rows": rows, "passes": len(seconds[FIXED])})


Added = tuple[str, int, Callable[[Seconds], Numbers]]
"""Words, how many layers were called, and the seconds that were added to them all."""


def _by_difference(
    one: Stand,
    runtime: str,
    batches: Sequence[Places],
    said: str,
    policy: Policy,
    jobs: dict[str, list[Job]],
) -> Added:
    """What is left of a run without its front and its layers: dispatch, exits, policy, compaction.

    A layer's time is that of the plain model at the rows it had, without what comes before the
    first layer, over its depth; so the plain model's own head counts as a part of its layers.
    """
    ours = one.ours(runtime, "fp32")
    plain = [*one.plain(runtime, "fp32").values()][-1]
    jobs[said] = _jobs(one, ours, batches, policy)
    stages = stages_of(batches, jobs[said])
    for count, those in stages.items():
        jobs[f"{said}, {count} plain"] = _jobs(one, plain, those, Full())
        jobs[f"{said}, {count} fixed"] = _jobs(one, ours.front, those, Full())
    calls = sum(count * len(those) for count, those in stages.items())

    def spent(seconds: Seconds) -> Numbers:
        layers = sum(
            count
            / one.model.depth
            * (seconds[f"{said}, {count} plain"] - seconds[f"{said}, {count} fixed"])
            for count in stages
        )
        return seconds[said] - seconds[FIXED] - layers

    return f"added to a layer, us: {said}", calls, spent


def stages_of(batches: Sequence[Places], jobs: Sequence[Job]) -> dict[int, list[Places]]:
    """By how many layers they ran together: the rows that did."""
    stages: dict[int, list[Places]] = {}
    for places, job in zip(batches, jobs, strict=True):
        answers: Any = job()
        layers, before = answers.exit_layers.numpy(), 0
        for layer in np.unique(layers).tolist():
            running = np.asarray(places)[layers >= layer].tolist()
            stages.setdefault(layer - before, []).append(running)
            before = layer
    return stages


class Idle:
    """A backbone whose layers give back what they get; a model, as far as an engine knows."""

    def __init__(self, model: MultiExitModel) -> None:
        self._model = model
        self.backbone: Any = self

    def __getattr__(self, name: str) -> Any:
        inner = self._model.backbone
        return getattr(inner, name) if hasattr(inner, name) else getattr(self._model, name)

    def layer(self, number: int, flow: Flow) -> Flow:
        return flow


def _with_idle_layers(
    one: Stand, batches: Sequence[Places], said: str, policy: Policy, jobs: dict[str, list[Job]]
) -> Added:
    """The same without any layer's work: exact, but all that is read lies in the cache."""
    engine = TorchEngine(cast(Any, Idle(one.model)))
    name = f"{said}, idle"
    jobs[name] = [partial(engine.run, batch, policy, rows) for batch, rows in one.numbered(batches)]
    answers: list[Any] = [job() for job in jobs[name]]
    calls = sum(int(found.exit_layers.max()) for found in answers)
    words = f"added to a layer, us: {said}, layers that do nothing"
    return words, calls, lambda seconds: seconds[name] - seconds[FIXED]


# Rows of all depths in one batch


def pool(options: Options) -> Cells:
    cases = {"rxn-albert": 96, "ALBERT-base": 32}
    if options.quick or not rxn_albert().is_dir():
        cases = {"ALBERT-base": 16} if options.quick else {"ALBERT-base": 32}
    return {
        f"{name}, {tokens} tokens": partial(_pool, options, name, tokens)
        for name, tokens in cases.items()
    }


def _pool(options: Options, name: str, tokens: int) -> Cell:
    if options.quick:
        small = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
        stock = AutoModelForSequenceClassification.from_config(AlbertConfig(**small))
    else:
        stock = next(stock for case, stock in bench_pool.cases() if case == name)
    model = MultiExitModel.from_stock(stock).eval()
    race = bench_pool.Race(model, tokens, options.some(96, 24), options.some(32, 8))
    race.pool()  # until all slots are taken
    ways = {"ours": race.full, "transformers": race.stock, "pool": race.pool, FIXED: race.embed}
    seconds = timed({said: [way] for said, way in ways.items()}, options)
    full_is = fastest(seconds, ["ours", "transformers"])
    full, mean = seconds[full_is], float(race.layers.mean())
    ideal = np.array([race.ideal(*pair) for pair in zip(full, seconds[FIXED], strict=True)])
    of_ideal = full / seconds["pool"] * mean / model.depth
    rows = len(race.rows)
    figures = (
        Figure.of("throughput, of L / mean depth", of_ideal, 0.95),
        Figure.of("realised share, fixed part and exits counted", ideal / seconds["pool"]),
        Figure.count("rows answered unlike one by one", _unlike(race), 0, least=False),
    )
    facts: dict[str, Any] = {"rows": rows, "slots": race.slots, "passes": len(full)}
    facts |= {"mean exit layer": mean, "full depth is": full_is}
    facts |= {"full depth, ms a row": ms(full, rows), "fixed, ms a row": ms(seconds[FIXED], rows)}
    return Cell(figures=figures, facts=facts)


def _unlike(race: bench_pool.Race) -> int:
    """Rows of which exit layer or label differ, or scores by more than 1e-4."""
    numbered = enumerate(race.rows)
    unlike = 0
    for place, found in race.engine.stream(numbered, race.policy, slots=race.slots):
        rows = Rows(torch.tensor([place]), torch.tensor([race.rows[place]["input_ids"].shape[1]]))
        alone = race.engine.run(race.rows[place], race.policy, rows)
        near = torch.allclose(found.scores, alone.scores[0], atol=1e-4)
        same = found.scores.argmax() == alone.scores[0].argmax()
        unlike += not (near and same and found.exit_layer == int(alone.exit_layers[0]))
    return unlike
