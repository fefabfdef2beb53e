"""Claims about killed runs: they go on, end in the same weights, and never mix with others."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from offramp.testing import save_tiny_stock, tiny_pictures, tiny_texts
from offramp.training import TrainOptions, attach, cache, train
from offramp.training.work import WorkFolder

OPTIONS = TrainOptions(
    epochs=3, batch_size=4, gradient_accumulation=2, learning_rate=1e-3, save_steps=3, quiet=True
)


def examples(count: int = 48) -> Dataset:
    texts = tiny_texts(count, longest=12)
    return Dataset.from_dict({"text": texts, "label": [len(text) % 3 for text in texts]})


def pictures(count: int = 48) -> Dataset:
    labels = [number % 3 for number in range(count)]
    return Dataset.from_dict({"image": tiny_pictures(count), "label": labels})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def run(how: str, source: Path, output: Path, options: TrainOptions = OPTIONS) -> None:
    if how == "images":  # their exits learn alone, on standardised vectors, first and last
        train(source, pictures(), output, method="auto", options=options)
    elif how == "attach":
        attach(source, examples().remove_columns("label"), output, pooling="mean", options=options)
    elif how == "tokens":
        attach(source, examples(), output, pooling="attention", options=options)
    else:
        pooling = None if how == "elbert" else "cls"  # ELBERT's exits do not pool
        train(source, examples(), output, method=how, pooling=pooling, options=options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stock(tmp_path_factory.mktemp("stock"), "albert")


class Stopped(BaseException):
    """A kill that a test can survive."""


@pytest.fixture
def stop_every(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make every n-th update of the weights end the run."""

    def arrange(updates: int) -> None:
        count = 0
        update = torch.optim.AdamW.step

        def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count % updates == 0:
                raise Stopped
            return update(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)

    return arrange


@pytest.mark.parametrize("how", ["pabee", "deebert", "attach", "tokens", "images"])
def test_a_run_stopped_again_and_again_ends_in_the_weights_of_one_that_was_not(
    how: str, source: Path, tmp_path: Path, stop_every: Callable[[int], None]
) -> None:
    if how == "images":
        pytest.importorskip("PIL")
        source = save_tiny_stock(tmp_path / "stock", "cifar_resnet")
    run(how, source, tmp_path / "whole")
    stop_every(8)
    stops = 0
    while not (tmp_path / "cut").exists():
        try:
            run(how, source, tmp_path / "cut")
        except Stopped:
            stops += 1
    assert stops >= 2
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert not (tmp_path / "cut.work").exists()


PRESSED = """
import signal, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from test_training_resume import OPTIONS, run

update, count = torch.optim.AdamW.step, 0

def press(self, *args, **kwargs):
    global count
    count += 1
    if count == 5:
        signal.raise_signal(signal.SIGINT)
    return update(self, *args, **kwargs)

torch.optim.AdamW.step = press
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where nobody is at a terminal
try:
    run("pabee", *map(Path, sys.argv[2:]), OPTIONS.model_copy(update={"save_steps": None}))
except KeyboardInterrupt:
    print("interrupted after", count)
"""


def test_ctrl_c_leaves_a_checkpoint_of_the_running_step_and_says_so(
    source: Path, tmp_path: Path
) -> None:
    # in a process of its own: only the main thread is told, and tests may run in another
    run("pabee", source, tmp_path / "whole")
    command = [sys.executable, "-c", PRESSED, Path(__file__).parent, source, tmp_path / "cut"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.endswith("interrupted after 5\n"), done.stderr
    assert "The same command continues" in done.stderr
    last = WorkFolder(tmp_path / "cut").last_checkpoint("joint")
    assert last is not None
    assert last.name == "checkpoint-5"
    run("pabee", source, tmp_path / "cut", OPTIONS.model_copy(update={"save_steps": None}))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_checkpoints_are_written_by_the_clock(
    source: Path, tmp_path: Path, stop_every: Callable[[int], None]
) -> None:
    stop_every(9)
    always = OPTIONS.model_copy(update={"save_steps": None, "checkpoint_minutes": 1e-9})
    with pytest.raises(Stopped):
        run("pabee", source, tmp_path / "out", always)
    last = WorkFolder(tmp_path / "out").last_checkpoint("joint")
    assert last is not None
    assert last.name == "checkpoint-8"


def test_another_run_starts_anew_and_says_what_differs(
    source: Path,
    tmp_path: Path,
    stop_every: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = OPTIONS.model_copy(update={"learning_rate": 5e-4})
    run("pabee", source, tmp_path / "whole", other)
    with monkeypatch.context():
        stop_every(8)
        with pytest.raises(Stopped):
            run("pabee", source, tmp_path / "cut")
    monkeypatch.undo()
    run("pabee", source, tmp_path / "cut", other)
    assert "(different: options): starting anew" in caplog.text
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_how_often_to_save_is_no_other_run(
    source: Path, tmp_path: Path, stop_every: Callable[[int], None], caplog: Any
) -> None:
    stop_every(8)
    with pytest.raises(Stopped):
        run("pabee", source, tmp_path / "cut")
    caplog.set_level(logging.INFO, "offramp")
    with pytest.raises(Stopped):
        run("pabee", source, tmp_path / "cut", OPTIONS.model_copy(update={"save_steps": 4}))
    assert "Stage 'joint' continues from checkpoint-6" in caplog.text


@pytest.mark.parametrize("missing", ["trainer_state.json", "optimizer.pt", "rng_state.pth"])
def test_a_half_written_checkpoint_is_passed_over(
    missing: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = WorkFolder(tmp_path / "out")
    for step in (3, 12):
        folder = work.stage("joint") / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).write_bytes(b"x")
        (folder / "trainer_state.json").write_text("{}")
    (work.stage("joint") / "checkpoint-12" / missing).unlink()
    last = work.last_checkpoint("joint")
    assert last is not None
    assert last.name == "checkpoint-3"
    assert "not written to its end" in caplog.text


def test_a_checkpoint_with_a_torn_state_is_passed_over(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out")
    folder = work.stage("joint") / "checkpoint-3"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"x")
    (folder / "trainer_state.json").write_text('{"epoch": 1.')
    assert work.last_checkpoint("joint") is None


def test_vectors_are_not_computed_twice(
    source: Path,
    tmp_path: Path,
    stop_every: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_every(8)
    with pytest.raises(Stopped):
        run("attach", source, tmp_path / "cut")
    blocks = []
    compute = cache.pooled_vectors
    monkeypatch.setattr(cache, "pooled_vectors", lambda *given: blocks.append(1) or compute(*given))
    with pytest.raises(Stopped):
        run("attach", source, tmp_path / "cut")
    assert not blocks


SCRIPT = """
import sys
from test_training_resume import OPTIONS, run
from pathlib import Path
run("pabee", Path(sys.argv[1]), Path(sys.argv[2]), OPTIONS.model_copy(update={"epochs": 12.0}))
"""


def test_a_run_killed_with_kill_9_ends_in_the_weights_of_one_that_was_not(
    source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    command = [sys.executable, "-c", SCRIPT, str(source), str(output)]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths}
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    marker = WorkFolder(output).stage("joint")
    deadline = time.monotonic() + 60
    while not list(marker.glob("checkpoint-*/trainer_state.json")):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not output.exists()

    long = OPTIONS.model_copy(update={"epochs": 12.0})
    run("pabee", source, output, long)
    run("pabee", source, tmp_path / "whole", long)
    assert same(weights(output), weights(tmp_path / "whole"))
