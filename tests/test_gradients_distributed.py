"""A claim about several processes: gradients meet as those of the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from offramp.testing import save_tiny_stock

SCRIPT = """
import sys
from pathlib import Path
from accelerate import PartialState
from test_training_resume import examples
from offramp.exits import ExitSpec
from offramp.methods import METHODS, Method
from offramp.objectives import RobustExits, robust
from offramp.training import TrainOptions, train
from offramp.training.preparing import weights_fingerprint

exits = ExitSpec(hidden=True, dropout=0.0)
METHODS.register("calm", Method("calm", "RomeBERT without dropout", exits, RobustExits, "entropy"))
met = []
across = robust._across
robust._across = lambda *given: met.append(float(robust.inner(*given)) < 0) or across(*given)
source, output, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
options = TrainOptions(
    max_steps=8, batch_size=size, gradient_accumulation=2, learning_rate=1e-3,
    head_learning_rate=2e-2, quiet=True,
)
model = train(source, examples(), output / "out", method="calm", pooling="cls", options=options)
assert any(met), "no step has gradients in conflict"
(output / f"rank-{PartialState().process_index}").write_text(weights_fingerprint(model))
"""


def run(processes: int, size: int, source: Path, place: Path) -> dict[str, torch.Tensor]:
    place.mkdir()
    script = place / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(script), str(source), str(place), str(size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len({path.read_text() for path in place.glob("rank-*")}) == 1
    return load_file(place / "out" / "model.safetensors")


def test_two_processes_end_where_one_with_twice_the_batch_does(tmp_path: Path) -> None:
    source = save_tiny_stock(tmp_path / "stock", "albert")
    config = source / "config.json"
    # dropout would differ from process to process
    config.write_text(
        config.read_text()
        .replace('"hidden_dropout_prob": 0.1', '"hidden_dropout_prob": 0')
        .replace('"classifier_dropout_prob": 0.1', '"classifier_dropout_prob": 0')
    )
    one = run(1, 4, source, tmp_path / "one")
    two = run(2, 2, source, tmp_path / "two")
    start = load_file(source / "model.safetensors")
    drift = sum(float((one[f"stock.{name}"] - leaf).square().sum()) for name, leaf in start.items())
    gap = sum(float((one[name] - two[name]).square().sum()) for name in one)
    assert gap < 1e-4 * drift
