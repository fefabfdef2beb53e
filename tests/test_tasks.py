"""Every method on every task and kind of network: it works end to end, or says why it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from offramp.calibration import calibrate
from offramp.data import load_examples
from offramp.engines import TorchEngine, load_processor, record
from offramp.errors import ConfigError
from offramp.methods import METHODS
from offramp.model import MultiExitModel
from offramp.policies import POLICIES
from offramp.prediction import pipeline
from offramp.table import ExitTable, replay
from offramp.testing import (
    check_method,
    save_tiny_stock,
    spread_policies,
    tiny_batch_for,
    tiny_model,
    tiny_pictures,
    tiny_texts,
)
from offramp.testing.methods import exits_on
from offramp.training import TrainOptions, train

DOCS = Path(__file__).parents[1] / "docs" / "methods"
SINGLE, MULTI, NUMBER = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
TASKS = {"text": SINGLE, "label sets": MULTI, "numbers": NUMBER, "vit": SINGLE, "resnet": SINGLE}
ALL = tuple(TASKS)
ARCH = {"vit": "vit", "resnet": "cifar_resnet"}
TABLE = {
    "auto": ALL,
    "beem": ("text", "label sets", "vit", "resnet"),
    "berxit": ALL,
    "cap": ("text", "vit", "resnet"),
    "cosee": ("text", "vit", "resnet"),
    "deebert": ("text", "label sets", "vit", "resnet"),
    "elbert": ("text", "label sets", "vit", "resnet"),
    "f_pabee": ALL,
    "fastbert": ("text", "label sets", "vit", "resnet"),
    "gpfee": ("text", "label sets", "vit", "resnet"),
    "jei_dnn": ("text", "vit", "resnet"),
    "pabee": ALL,
    "palbert": ALL,
    "pcee": ("text", "label sets", "vit", "resnet"),
    "pcee_bert": ("text", "label sets", "vit", "resnet"),
    "pondernet": ALL,
    "romebert": ("text", "label sets", "vit", "resnet"),
    "sdn": ("text", "label sets", "vit", "resnet"),
}
"""What each method works on. For all else it has a sentence."""
WORKS = [(name, task) for name, tasks in TABLE.items() for task in tasks]
REFUSES = [(name, task) for name in TABLE for task in ALL if task not in TABLE[name]]
SETS_AND_NUMBERS = [
    (name, task)
    for name in sorted(METHODS)
    for task in ("label sets", "numbers")
    if TASKS[task] in METHODS[name].problem_types
]
IMAGES = [(name, ARCH[task]) for name, task in WORKS if task in ARCH]
ROWS = 24


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def stocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small classifier for each task."""
    place = tmp_path_factory.mktemp("stocks")
    return {
        task: save_tiny_stock(place / task, ARCH.get(task, "bert"), problem_type)
        for task, problem_type in TASKS.items()
    }


def rows(task: str) -> Dataset:
    draw = np.random.default_rng(0)
    labels = {
        SINGLE: [f"label-{n % 3}" for n in range(ROWS)],
        MULTI: draw.integers(2, size=(ROWS, 3)).tolist(),
        NUMBER: draw.normal(size=ROWS).tolist(),
    }
    read = (
        {"image": tiny_pictures(ROWS)} if task in ("vit", "resnet") else {"text": tiny_texts(ROWS)}
    )
    return Dataset.from_dict({**read, "label": labels[TASKS[task]]})


def test_the_table_holds_every_method() -> None:
    assert set(TABLE) == set(METHODS)
    for name, tasks in TABLE.items():
        assert {TASKS[task] for task in tasks} == set(METHODS[name].problem_types)


@pytest.mark.parametrize(("name", "arch"), IMAGES)
def test_a_method_learns_to_read_images(name: str, arch: str) -> None:
    """On texts it is checked in the conformance matrix, for every task it declares."""
    check_method(METHODS[name], arch)


@pytest.mark.parametrize(("name", "task"), WORKS)
def test_rows_leave_by_the_methods_own_policy_live_as_in_a_replay(
    name: str, task: str, tmp_path: Path
) -> None:
    method, problem_type = METHODS[name], TASKS[task]
    model = tiny_model(
        ARCH.get(task, "bert"),
        problem_type,
        spec=exits_on(method, ARCH.get(task, "bert"), problem_type),
    )
    batch = tiny_batch_for(model.stock, ROWS)
    with torch.inference_mode():
        outputs = model.all_exits(batch)
    policies = [
        one
        for one in spread_policies(problem_type, outputs)
        if one.name == method.policy_for(problem_type)
    ]
    assert policies
    table = ExitTable.from_arrays(
        torch.stack([one.scores for one in outputs], dim=1).numpy(),
        problem_type=problem_type,
        signals={
            signal: torch.stack([one.signals[signal] for one in outputs], dim=1).numpy()
            for signal in outputs[0].signals
        },
    )
    for policy in policies:
        live, replayed = TorchEngine(model).run(batch, policy), replay(table, policy)
        assert np.array_equal(live.exit_layers.numpy(), replayed.exit_layers)
        torch.testing.assert_close(
            live.scores, torch.from_numpy(replayed.answers), atol=5e-5, rtol=0
        )


@pytest.mark.parametrize(("name", "task"), SETS_AND_NUMBERS)
def test_on_label_sets_and_numbers_a_method_trains_is_calibrated_and_answers_early(
    name: str, task: str, stocks: dict[str, Path], tmp_path: Path
) -> None:
    """By its own policy. PonderNet's `sample` has no threshold: calibration takes it as it is."""
    data, folder, policy = rows(task), tmp_path / "model", METHODS[name].policy_for(TASKS[task])
    few = TrainOptions(max_steps=2, batch_size=8, quiet=True)
    model = train(stocks[task], data, folder, method=name, options=few)
    assert isinstance(model, MultiExitModel)
    table = record(
        model,
        load_examples(data),
        tmp_path / "table",
        "tune",
        processor=load_processor(folder, "text"),
        progress=False,
    )
    assert np.array_equal(table.labels, np.asarray(data["label"][:], np.float32))

    found = calibrate(table, target_speedup=1.1, policies=[policy])
    point = found.point
    assert found.pays
    assert point.policy["name"] == policy
    assert point.metric == {"label sets": "f1_micro", "numbers": "pearson"}[task]
    point.save(folder)

    said = pipeline(folder, device="cpu")(data["text"][:])
    assert all(np.isfinite(one["score"]) for one in said)
    layers = [one["exit_layer"] for one in said]
    assert layers == replay(table, point.build_policy()).exit_layers.tolist()
    assert np.mean(layers) < model.depth


@pytest.mark.parametrize(("name", "task"), REFUSES)
def test_a_method_that_does_not_do_a_task_says_why(
    name: str, task: str, stocks: dict[str, Path], tmp_path: Path
) -> None:
    pooling = "mean" if hasattr(METHODS[name].exits, "pooling") else None
    with pytest.raises(ConfigError) as refused:
        train(stocks[task], rows(task), tmp_path / "model", method=name, pooling=pooling)
    said = str(refused.value)
    if task == "resnet":
        assert "8, 16, 32. " in said
    else:
        why = METHODS[name].why_not or POLICIES[METHODS[name].policy].why_not
        assert why.endswith(".")
        assert why.count(".") == 1
        assert f"Method '{name}' does not do {TASKS[task]}. {why} Methods that do: auto, " in said
    page = (DOCS / f"{name}.md").read_text().lower()
    assert "not for" in page or "only**" in page
    assert not (tmp_path / "model").exists()
