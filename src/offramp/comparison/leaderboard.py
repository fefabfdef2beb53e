"""From the recorded runs of several methods to a leaderboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, mode

import numpy as np

from offramp.calibration.frontier import BASELINE
from offramp.calibration.judge import Judge
from offramp.comparison import curves, families, statistics
from offramp.comparison.board import (
    AREA,
    AT,
    COLUMNS,
    TARGETS,
    AtTarget,
    Board,
    Difference,
    MethodRow,
    Missing,
    Point,
    PolicyRow,
    Reading,
)
from offramp.comparison.families import Choice, Reader
from offramp.comparison.plan import PLAIN
from offramp.comparison.statistics import Floats, Resamples
from offramp.comparison.weighted import quick
from offramp.errors import ConfigError, TableError
from offramp.methods import METHODS
from offramp.metrics import METRICS, Metric, default_metric
from offramp.policies import Full, Policy
from offramp.table import ExitTable, require_role
from offramp.table.store import Array

AUTO = "auto"
FEWEST_RESAMPLES = 100
"""For families that were not chosen, where the metric is slow."""
FEW = 50
"""With fewer test rows, intervals are rough."""
FULL = "full"
Columns = dict[str, Floats]
"""Those of a curve and `full`, (1 + resamples, seeds)."""


@dataclass(frozen=True)
class Run:
    """One method trained with one seed.

    Attributes:
        tune, test: its exit tables, with labels.
        seconds: of training.
        parameters_added: by the exits.
        learning_rate: chosen on `tune`, None where there was no choice.
        layers: the exits that may be used, where each is a smaller model trained by itself.
        threads: that it was trained on, None where that is not known.
    """

    method: str
    seed: int
    tune: ExitTable
    test: ExitTable
    seconds: float
    parameters_added: int
    learning_rate: float | None
    layers: tuple[int, ...] | None = None
    threads: int | None = None

    def __str__(self) -> str:
        return f"{self.method} (seed {self.seed})"


@dataclass(frozen=True, slots=True)
class Ground:
    """What all runs are read on."""

    metric: Metric
    labels: Array
    rows: Array  # of the test tables, those with finite scores in every run
    resamples: Resamples

    @property
    def fewer_resamples(self) -> Resamples:
        """For families that were not chosen, which nothing is compared with."""
        quick = len(self.resamples.counts) > statistics.RESAMPLES
        return self.resamples if quick else self.resamples.first(FEWEST_RESAMPLES)

    def reader(self, run: Run) -> Reader:
        whole = len(self.rows) == run.test.rows
        return Reader(run.test if whole else run.test.take(self.rows))


@dataclass(frozen=True, slots=True)
class _Method:
    """A method, before it is compared."""

    name: str
    runs: list[Run]
    chosen: dict[str, str]  # column of a curve to the family that is read there
    policies: list[PolicyRow]
    tune_area: float
    columns: Columns
    fixed: Columns  # of leaving at one and the same exit, without those where that is chosen

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def own(self) -> str:
        """The family of its paper."""
        return _own(self.runs[0])


def build_board(
    runs: Sequence[Run],
    *,
    title: str,
    facts: dict[str, str],
    reference: str | None = None,
    missing: Sequence[Missing] = (),
    metric: str | None = None,
) -> Board:
    """Compare methods on the same test rows.

    Args:
        runs: of methods, and of the plain fine-tune under the name `plain`.
        reference: method that others are compared with; `auto` if it is there, else the one of
            the largest area on `tune` among those with most seeds.
        metric: a name; by default the task's own.

    Raises:
        ConfigError: no method, one seed of a method twice, an unknown reference or metric.
        TableError: tables of other rows, labels, tasks or depths; or without labels.
    """
    _check(runs)
    ground = ground_of(runs, metric)
    by_name = {
        name: sorted(of, key=lambda run: run.seed)
        for name, of in groupby(sorted(runs, key=lambda run: run.method), lambda run: run.method)
    }
    plain = by_name.pop(PLAIN, [])
    methods = {name: _method(name, of, ground) for name, of in by_name.items()}
    first = _reference(methods, reference)
    return Board(
        title=title,
        facts=facts | _left_out(runs, ground) | _few(ground),
        metric=ground.metric.name,
        depth=runs[0].test.depth,
        seeds=tuple(sorted({run.seed for run in runs})),
        test_rows=len(ground.rows),
        guess=_guess(runs, ground),
        plain=statistics.figure(_full_depth(plain, ground)) if plain else None,
        reference=first,
        methods=_rows(methods, first, plain, ground),
        missing=tuple(missing),
    )


def _check(runs: Sequence[Run]) -> None:
    if all(run.method == PLAIN for run in runs):
        raise ConfigError("There is no method to compare: no run of any is there.")
    seen: set[tuple[str, int]] = set()
    for run in runs:
        require_role(run.tune, ("tune", "calibrate"), "choose a policy")
        if (run.method, run.seed) in seen:
            raise ConfigError(f"{run} is there twice. Give each seed of a method once.")
        seen.add((run.method, run.seed))
        _check_same(runs[0], run)


def _check_same(one: Run, other: Run) -> None:
    first, second = one.test, other.test
    if first.labels is None or second.labels is None or other.tune.labels is None:
        raise TableError(f"{one} or {other} has no labels; methods are compared by their scores.")
    if not np.array_equal(first.ids, second.ids):
        raise TableError(
            f"{one} and {other} were recorded on different test rows, or in another order. "
            "Record all methods on the same rows."
        )
    same = first.problem_type == second.problem_type and first.depth == second.depth
    if not (same and np.array_equal(first.labels, second.labels)):
        raise TableError(f"{one} and {other} differ in their test labels, their task or depth.")


def ground_of(runs: Sequence[Run], name: str | None = None) -> Ground:
    """What these runs are read on, by a metric or the task's own.

    Raises TableError where no test row has finite scores in all runs.
    """
    first = runs[0].test
    metric = default_metric(first.problem_type) if name is None else METRICS[name]
    metric.check(first.problem_type)
    fine = np.ones(first.rows, dtype=bool)
    for run in runs:
        fine &= np.isfinite(run.test.scores).all(axis=(1, 2))
    if not fine.any():
        raise TableError("No test row has finite scores in all runs.")
    rows = np.flatnonzero(fine)
    labels = np.asarray(first.labels)[rows]
    return Ground(metric, labels, rows, statistics.resamples_for(metric, len(rows)))


def _left_out(runs: Sequence[Run], ground: Ground) -> dict[str, str]:
    gone = runs[0].test.rows - len(ground.rows)
    return {"test rows left out": f"{gone}, with NaN or infinite scores"} if gone else {}


def _few(ground: Ground) -> dict[str, str]:
    rows = len(ground.rows)
    return {"few rows": f"{rows} to rank on: intervals and p are rough"} if rows < FEW else {}


def _guess(runs: Sequence[Run], ground: Ground) -> float:
    """Of the commonest answer of each seed's `tune` rows, mean over seeds."""
    of_seed = {run.seed: run for run in runs}
    return fmean(
        families.score_of_guess(ground.metric, _commonest(run), ground.labels)
        for run in of_seed.values()
    )


def _own(run: Run) -> str:
    return BASELINE if run.layers else families.own_family(run.method, run.tune.problem_type)


def _commonest(run: Run) -> Array:
    return families.commonest(np.asarray(run.tune.labels), run.tune.problem_type)


def _method(name: str, runs: list[Run], ground: Ground) -> _Method:
    """Choose on `tune`, then read on test."""
    chosen = [choices(run, ground.metric) for run in runs]
    on_tune = families.tune_scores(chosen)
    best = {key: families.best_family(on_tune, key) for key in COLUMNS}
    readers = [ground.reader(run) for run in runs]
    policies, columns = [], dict[str, Columns]()
    for one in on_tune:
        compared = one == BASELINE or one in best.values()
        resamples = ground.resamples if compared else ground.fewer_resamples
        traces = [
            _Trace.read(run, reader, made[one], ground.metric, resamples)
            for run, reader, made in zip(runs, readers, chosen, strict=True)
        ]
        found = {
            key: np.stack([t.columns[key] for t in traces], axis=1) for key in traces[0].columns
        }
        policies.append(_policy_row(one, on_tune[one], traces, found))
        columns[one] = found
    mine = {key: columns[one][key] for key, one in best.items()}
    mine[FULL] = columns[best[AREA]][FULL]
    fixed = {
        key: columns[BASELINE][key]
        for key, one in best.items()
        if one != BASELINE and BASELINE in columns
    }
    return _Method(name, runs, best, policies, on_tune[best[AREA]][AREA], mine, fixed)


def choices(run: Run, metric: Metric) -> dict[str, Choice]:
    """What every family of policies chooses on the `tune` rows of a run."""
    judge = Judge(run.tune, metric.name)
    judge.metric = quick(metric)
    labels = np.asarray(judge.table.labels)
    guess = families.score_of_guess(metric, _commonest(run), labels)
    if run.layers is not None:
        return {BASELINE: families.choose_layers(judge, run.layers, guess)}
    found = families.families(run.tune, _own(run))
    return {name: families.choose(judge, family, guess) for name, family in found.items()}


@dataclass(frozen=True, slots=True)
class _Trace:
    """One family on the test rows of one run."""

    curve: tuple[Point, ...]
    readings: dict[float, Reading]
    auroc: tuple[float | None, ...]
    columns: Columns

    @classmethod
    def read(
        cls, run: Run, reader: Reader, choice: Choice, metric: Metric, resamples: Resamples
    ) -> _Trace:
        done = reader.read([*choice.corners, *choice.reached.values()])
        corners = [policy for _, policy in choice.corners]
        read = [done[policy] for policy in corners]
        costs, scores = places(run, reader, read, metric, resamples)
        return cls(
            curve=_curve(costs[0], scores[0], [None, *corners, Full()]),
            readings={
                target: _reading(run.seed, policy, *done[policy], reader, metric)
                for target, (_, policy) in choice.reached.items()
            },
            auroc=reader.auroc(choice.start),
            columns=_columns(costs, scores),
        )


def places(
    run: Run,
    reader: Reader,
    read: Sequence[tuple[Array, Array]],
    metric: Metric,
    resamples: Resamples,
) -> tuple[Floats, Floats]:
    """Costs and scores of a curve's points on test, each (1 + resamples, 2 + policies).

    The first point is the commonest answer of `tune`, at no cost, the last is full depth.

    Args:
        read: predictions and executed FLOPs of the policies between, as a reader gives them.
    """
    guess = families.guessed(_commonest(run), len(reader.labels))
    answers = [guess, *(predicted for predicted, _ in read), reader.full]
    full = reader.full_cost
    executed = [np.zeros_like(full), *(cost for _, cost in read), full]
    return (
        resamples.costs(np.stack(executed), full),
        resamples.scores(metric, np.stack(answers), reader.labels),
    )


def _curve(costs: Floats, scores: Floats, policies: Sequence[Policy | None]) -> tuple[Point, ...]:
    order = np.argsort(costs, kind="stable")
    documents = [policy.to_dict() if policy else None for policy in policies]
    return tuple(Point(cost=costs[one], score=scores[one], policy=documents[one]) for one in order)


def _reading(
    seed: int, policy: Policy, predicted: Array, executed: Array, reader: Reader, metric: Metric
) -> Reading:
    return Reading(
        seed=seed,
        policy=policy.to_dict(),
        score=metric.compare(predicted, reader.labels),
        cost_reduction=float(reader.full_cost.sum() / executed.sum()),
    )


def _columns(costs: Floats, scores: Floats) -> Columns:
    return {**curves.columns(costs, scores), FULL: scores[:, -1]}


def _policy_row(
    name: str, on_tune: Mapping[str, float], traces: Sequence[_Trace], columns: Columns
) -> PolicyRow:
    return PolicyRow(
        name=name,
        area=statistics.figure(columns[AREA]),
        tune_area=on_tune[AREA],
        at=tuple(
            AtTarget(
                target=target,
                score=statistics.figure(columns[column]),
                tune=on_tune[column],
                readings=tuple(t.readings[target] for t in traces if target in t.readings),
            )
            for target, column in zip(TARGETS, AT, strict=True)
        ),
        auroc=tuple(map(_mean_known, zip(*(trace.auroc for trace in traces), strict=True))),
        curves=tuple(trace.curve for trace in traces),
    )


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _reference(methods: Mapping[str, _Method], asked: str | None) -> str:
    if asked is not None and asked not in methods:
        raise ConfigError(
            f"The reference '{asked}' is not among the methods: {', '.join(methods)}. "
            "Name one of these."
        )
    if asked is None and AUTO in methods:
        return AUTO
    return asked or max(methods, key=lambda one: (len(methods[one].runs), methods[one].tune_area))


def _full_depth(runs: Sequence[Run], ground: Ground) -> Floats:
    """Scores of full depth, (1 + resamples, seeds)."""
    full = np.stack([ground.reader(run).full for run in runs])
    return ground.resamples.scores(ground.metric, full, ground.labels)


@dataclass(frozen=True, slots=True)
class _Rivals:
    """What methods are compared with, column by column.

    Attributes:
        seeds: of the rival.
        columns: column of a method to the column of the rival that it is held against.
    """

    seeds: list[int]
    columns: Columns

    def against(self, methods: Mapping[str, _Method]) -> dict[str, dict[str, Difference]]:
        """Method to its differences, over the seeds that both have."""
        found: dict[str, dict[str, Difference]] = {name: {} for name in methods}
        for column, rival in self.columns.items():
            apart = {
                name: self._apart(method, column, rival)
                for name, method in methods.items()
                if not set(self.seeds).isdisjoint(method.seeds)
            }
            for name, difference in statistics.differences(apart).items():
                found[name][column] = difference
        return found

    def _apart(self, method: _Method, column: str, rival: Floats) -> Floats:
        common = sorted(set(self.seeds) & set(method.seeds))
        mine = [method.seeds.index(seed) for seed in common]
        theirs = [self.seeds.index(seed) for seed in common]
        return method.columns[column][:, mine] - rival[:, theirs]


def _rows(
    methods: Mapping[str, _Method], reference: str, plain: Sequence[Run], ground: Ground
) -> tuple[MethodRow, ...]:
    """Those of most seeds first, then by area."""
    first = methods[reference]
    rivals = _Rivals(first.seeds, {key: first.columns[key] for key in COLUMNS})
    others = {name: method for name, method in methods.items() if name != reference}
    against = rivals.against(others)
    against_plain: dict[str, dict[str, Difference]] = {}
    if plain:
        full = dict.fromkeys((FULL, *AT), _full_depth(plain, ground))
        rivals = _Rivals([run.seed for run in plain], full)
        against_plain = rivals.against(methods)
    against_fixed = _against_fixed(methods)
    rows = [
        _row(method, against.get(name, {}), against_plain.get(name, {}), against_fixed[name], plain)
        for name, method in methods.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.seeds, -row.row.area.value)))


def _against_fixed(methods: Mapping[str, _Method]) -> dict[str, dict[str, Difference]]:
    """Method to its differences from the cheapest baseline there is, its own exits without a
    policy."""
    found: dict[str, dict[str, Difference]] = {name: {} for name in methods}
    for column in COLUMNS:
        apart = {
            name: method.columns[column] - method.fixed[column]
            for name, method in methods.items()
            if column in method.fixed
        }
        for name, difference in statistics.differences(apart).items():
            found[name][column] = difference
    return found


def _row(
    method: _Method,
    against: dict[str, Difference],
    against_plain: dict[str, Difference],
    against_fixed: dict[str, Difference],
    plain: Sequence[Run],
) -> MethodRow:
    runs, name = method.runs, method.name
    return MethodRow(
        name=name,
        paper=METHODS[name].paper if name in METHODS else "",
        learning_rate=mode(run.learning_rate for run in runs),
        own=method.own,
        chosen=method.chosen[AREA],
        chosen_at={key: one for key, one in method.chosen.items() if key != AREA},
        policies=tuple(method.policies),
        full_score=statistics.figure(method.columns[FULL]),
        seconds=fmean(run.seconds for run in runs),
        times_plain=_times(runs, plain),
        parameters_added=mode(run.parameters_added for run in runs),
        against=against,
        against_plain=against_plain,
        against_fixed=against_fixed,
    )


def _times(runs: Sequence[Run], plain: Sequence[Run]) -> float | None:
    """Seconds by those of the plain fine-tune, over the seeds that both ran on equal threads."""
    ours = {(run.seed, run.threads): run.seconds for run in runs}
    theirs = {(run.seed, run.threads): run.seconds for run in plain}
    both = ours.keys() & theirs.keys()
    total = sum(theirs[one] for one in both)
    return sum(ours[one] for one in both) / total if total > 0 else None
