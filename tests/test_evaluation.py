"""Claims about evaluation: figures of a table, and a speed-up that is wall clock alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from typing import Any

import numpy as np
import pytest
import torch
from test_certificates import table_of

from offramp.backbones import Batch
from offramp.calibration import calibrate, certify
from offramp.engines import Answers, TorchEngine, cost_model
from offramp.errors import ConfigError, PointError
from offramp.evaluation import Speed, evaluate, laps, measure_speed
from offramp.policies import Fixed, Full, MaxProbability, Policy
from offramp.table import ExitTable, replay
from offramp.testing import Scripted, tiny_batch, tiny_model


def make_table(role: str = "test", model: str = "a model", seed: int = 0) -> ExitTable:
    """500 rows, 5 exits, 3 classes; later exits are right more often."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, 500)
    truth = np.eye(3)[labels][:, None, :] * np.linspace(0.5, 4, 5)[:, None]
    scores = truth + draw.normal(size=(500, 5, 3))
    return ExitTable.from_arrays(
        scores,
        problem_type="single_label_classification",
        labels=labels,
        role=role,
        model_fingerprint=model,
    )


def test_an_evaluation_tells_the_policy_full_depth_and_every_exit_apart() -> None:
    table, policy = make_table(), MaxProbability(threshold=0.9)
    done = evaluate(table, policy)
    replayed = replay(table, policy)
    assert done.outcome.score == np.mean(replayed.answers.argmax(axis=1) == table.labels)
    assert done.outcome.full_score == np.mean(table.scores[:, -1].argmax(axis=1) == table.labels)
    assert done.outcome.cost == pytest.approx(replayed.share)
    assert done.outcome.cost_reduction == pytest.approx(1 / replayed.share)
    assert done.outcome.exit_histogram == replayed.histogram
    for layer, alone in enumerate(done.exits):
        assert alone.score == np.mean(table.scores[:, layer].argmax(axis=1) == table.labels)
    assert done.exits[-1].score == done.outcome.full_score
    assert (done.role, done.rows) == ("test", 500)


def test_rows_that_are_broken_are_counted_and_not_scored() -> None:
    table = make_table()
    table.columns["scores"][:3, 1] = np.nan
    done = evaluate(table, MaxProbability(threshold=0.9))
    assert (done.rows, done.rows_excluded) == (497, 3)
    assert sum(done.outcome.exit_histogram) == 497


def test_cost_reduction_is_never_called_speed_up() -> None:
    said = json.dumps(evaluate(make_table(), "max_probability").to_dict())
    assert "cost_reduction" in said
    assert "speed" not in said


def test_a_point_brings_its_metric_and_is_refused_on_the_table_of_another_model() -> None:
    point = calibrate(make_table("tune", seed=1), target_speedup=1.5, metric="f1").point
    done = evaluate(make_table(), point)
    assert done.outcome.metric == "f1"
    assert done.outcome.policy == point.build_policy()
    with pytest.raises(PointError, match="was chosen for model"):
        evaluate(make_table(model="another"), point)


class Waiting:
    """An engine that only waits, so that the times are known: 20 ms full, 5 ms early."""

    def run(self, batch: Batch, policy: Policy, *how: Any) -> Answers:
        time.sleep(0.02 if isinstance(policy, Full) else 0.005)
        count = batch["input_ids"].shape[0]
        layers = torch.full((count,), 6 if isinstance(policy, Full) else 2)
        return Answers(torch.zeros(count, 3), layers, torch.zeros(count, dtype=torch.bool))


def speed(**changes: object) -> Speed:
    model = tiny_model()
    slow = {"stock": 0.06} | {k: v for k, v in changes.items() if k == "stock"}
    model.stock.forward = lambda **batch: time.sleep(slow["stock"])  # type: ignore[method-assign]
    return measure_speed(Waiting(), model, [tiny_batch(4), tiny_batch(8)], Fixed(layer=2), 4)


def test_a_speed_up_is_full_over_early_with_an_interval_around_it() -> None:
    measured = speed()
    assert measured.full_is == "ours"
    assert 2 < measured.speed_up < 5
    low, high = measured.interval
    assert low <= measured.speed_up <= high
    assert measured.full_seconds == pytest.approx(2 * 0.02, rel=0.5)
    assert (measured.rows, measured.passes, measured.mean_exit_layer) == (12, 4, 2)


def test_full_depth_is_the_stock_model_where_that_is_faster() -> None:
    measured = speed(stock=0.0)
    assert measured.full_is == "stock"
    assert measured.speed_up < 1


def test_the_ideal_spares_the_fixed_time_and_takes_the_executed_share_of_the_rest() -> None:
    measured = dataclasses.replace(speed(), full_seconds=10.0, fixed_seconds=2.0, cost=0.25)
    assert measured.ideal == 10 / (2 + 0.25 * 8)
    assert measured.realised_share == measured.speed_up / measured.ideal


def test_the_cost_of_a_speed_is_that_of_the_rows_it_ran() -> None:
    model, batch = tiny_model(), tiny_batch(6, 20)
    policy = Scripted(layers=(1, 2, 3, 4, 5, 6), inner=MaxProbability())
    measured = measure_speed(TorchEngine(model), model, [batch], policy, passes=2)
    lengths = batch["attention_mask"].sum(dim=1).numpy()
    assert measured.cost == cost_model(model).share(lengths, np.arange(1, 7), policy)
    assert measured.mean_exit_layer == 3.5


def test_a_speed_needs_batches_and_more_than_one_pass() -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="at least 2 passes"):
        measure_speed(TorchEngine(model), model, [tiny_batch(2)], Full(), passes=1)
    with pytest.raises(ConfigError, match="needs batches"):
        measure_speed(TorchEngine(model), model, [], Full())


def test_contenders_take_turns_and_another_begins_every_pass() -> None:
    """Batch by batch at first, then with as many quick ones in a row as fit into a turn, which
    one more begins that does not count."""
    seen: list[str] = []
    jobs = {
        name: [lambda name=name, n=n: seen.append(f"{name}{n}") for n in range(count)]
        for name, count in (("a", 2), ("b", 3))
    }
    taken = list(itertools.islice(laps(jobs), 2))
    assert " ".join(seen) == "a0 b0 a1 b1 b2 b0 b0 b1 b2 a0 a0 a1"
    assert [sorted(lap) for lap in taken] == [["a", "b"], ["a", "b"]]
    assert all(seconds > 0 for lap in taken for seconds in lap.values())


def test_what_was_promised_stands_beside_what_other_rows_lose() -> None:
    found = certify(table_of(2000), max_disagreement=0.05)
    said = evaluate(table_of(4000, seed=1), found.point).to_dict()
    assert said["promised"]["limit"] == 0.05
    assert said["promised"]["loss"] == said["disagreement"]
    assert "Guaranteed with 95% confidence" in said["promised"]["claim"]


def test_what_takes_labels_is_promised_and_not_known_without() -> None:
    found = certify(table_of(2000), max_drop=0.05)
    promised = evaluate(table_of(500, seed=1, labelled=False), found.point).promised
    assert promised is not None
    assert promised.loss is None
    assert evaluate(table_of(500), "patience").promised is None
