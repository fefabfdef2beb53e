"""A claim about several processes: they make one model, with the rows shared out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from offramp.model import MultiExitModel
from offramp.testing import save_tiny_stock

SCRIPT = """
import sys
from pathlib import Path
from accelerate import PartialState
from test_training_resume import OPTIONS, examples
from transformers import Trainer
from offramp.training import attach, train
from offramp.training.preparing import weights_fingerprint

saved, save = [], Trainer._save_checkpoint

def counted(self, *arguments, **options):
    saved.append(self.state.global_step)
    save(self, *arguments, **options)

Trainer._save_checkpoint = counted
source, output = Path(sys.argv[1]), Path(sys.argv[2])
clock = OPTIONS.model_copy(update={"save_steps": None, "checkpoint_minutes": 1e-6})
trained = train(source, examples(), output / "trained", options=clock)
steps = list(saved)
attached = attach(source, examples(), output / "attached", options=OPTIONS)
rank = PartialState().process_index
names = [weights_fingerprint(model) for model in (trained, attached)]
(output / f"rank-{rank}").write_text(" ".join(names))
(output / f"saved-{rank}").write_text(" ".join(map(str, steps)))
"""


def test_two_processes_make_one_model(tmp_path: Path) -> None:
    source = save_tiny_stock(tmp_path / "stock", "albert")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    output = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launch, "--standalone", str(script), str(source), str(output)]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (output / "rank-0").read_text() == (output / "rank-1").read_text()
    assert (output / "saved-0").read_text() == (output / "saved-1").read_text() != ""
    for name in ("trained", "attached"):
        MultiExitModel.from_pretrained(output / name)
        assert not (output / f"{name}.work").exists()
