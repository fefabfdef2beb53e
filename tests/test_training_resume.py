"""Claims about killed runs: they go on, end in the same weights, and never mix with others."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from offramp.testing import save_tiny_stock, tiny_texts
from offramp.training import TrainOptions, attach, train
from offramp.training.cache import VectorCache
from offramp.training.work import WorkFolder

OPTIONS = TrainOptions(
    epochs=3, batch_size=4, gradient_accumulation=2, learning_rate=1e-3, save_steps=3, quiet=True
)


def examples(count: int = 90) -> Dataset:
    texts = tiny_texts(count, longest=12)
    return Dataset.from_dict({"text": texts, "label": [len(text) % 3 for text in texts]})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def run(how: str, source: Path, output: Path, options: TrainOptions = OPTIONS) -> None:
    if how == "attach":
        attach(source, examples().remove_columns("label"), output, pooling="mean", options=options)
    elif how == "tokens":
        attach(source, examples(), output, pooling="attention", options=options)
    else:
        train(source, examples(), output, method=how, pooling="cls", options=options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stock(tmp_path_factory.mktemp("stock"), "albert")


@pytest.mark.parametrize("how", ["pabee", "deebert", "plain", "attach", "tokens"])
def test_a_run_stopped_at_any_step_ends_in_the_weights_of_one_that_was_not(
    how: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(how, source, tmp_path / "whole")

    class Stopped(BaseException):
        pass

    steps = 0
    optimizer_step = torch.optim.AdamW.step

    def step_or_stop(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        nonlocal steps
        steps += 1
        if steps % 8 == 0:
            raise Stopped
        return optimizer_step(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.AdamW, "step", step_or_stop)
    stops = 0
    while not (tmp_path / "cut").exists():
        try:
            run(how, source, tmp_path / "cut")
        except Stopped:
            stops += 1
    assert stops >= 2
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert not (tmp_path / "cut.work").exists()


SCRIPT = """
import sys
from test_training_resume import OPTIONS, run
from pathlib import Path
run("deebert", Path(sys.argv[1]), Path(sys.argv[2]), OPTIONS.model_copy(update={"epochs": 8.0}))
"""


def test_a_run_killed_with_kill_9_ends_in_the_weights_of_one_that_was_not(
    source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    command = [sys.executable, "-c", SCRIPT, str(source), str(output)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    marker = WorkFolder(output).stage("stock")
    deadline = time.monotonic() + 60
    while not list(marker.glob("checkpoint-*/trainer_state.json")):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not output.exists()

    long = OPTIONS.model_copy(update={"epochs": 8.0})
    run("deebert", source, output, long)
    run("deebert", source, tmp_path / "whole", long)
    assert same(weights(output), weights(tmp_path / "whole"))
