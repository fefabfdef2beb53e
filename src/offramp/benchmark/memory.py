"""The peak memory of each contender, in a process of its own."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from offramp.benchmark.contenders import NEEDS, Shop
from offramp.benchmark.document import Contender
from offramp.benchmark.subject import Rows as Data
from offramp.benchmark.subject import open_model
from offramp.engines import rows_of
from offramp.evaluation.speed import Job
from offramp.policies import Full
from offramp.storage import parse_document

logger = logging.getLogger("offramp")

BATCH = 32
_ORDER, _TOKENS = "order.json", "tokens.safetensors"
_MEGABYTE = 1e6


def with_memory(
    shop: Shop, model: str, contenders: Sequence[Contender], data: Data, quiet: bool
) -> list[Contender]:
    """The contenders with their peaks: of loading, and of the longest rows in one batch.

    Rows that leave early need no more than full depth, and what is cut off is loaded first, so
    neither is measured. On a GPU it is what tensors take there while rows are answered.
    """
    longest = data.lengths.argsort(kind="stable")[-BATCH:]
    save_file(dict(data.batch(longest.tolist())), shop.place / _TOKENS)
    peaks: dict[str, float] = {}
    whole = [one for one in contenders if one.layers == shop.model.depth]
    todo = [one for one in whole if one.leaves is None]
    with tqdm(todo, desc="memory", disable=quiet or None, leave=False) as bar:
        for one in bar:
            bar.set_postfix_str(one.name)
            peak = _measured(shop, model, one)
            if peak is not None:
                peaks[one.name] = peak
    return [one.model_copy(update={"peak_megabytes": peaks.get(one.name)}) for one in contenders]


def _measured(shop: Shop, model: str, contender: Contender) -> float | None:
    order = {
        "model": model,
        "contender": contender.model_dump(),
        "threads": shop.threads,
        "device": str(shop.device),
        "libraries": [
            type(shop.model.stock).__module__,
            *NEEDS[contender.runtime],
        ],  # not the model's memory
    }
    (shop.place / _ORDER).write_text(json.dumps(order), encoding="utf-8")
    command = [sys.executable, "-m", "offramp.benchmark.memory", str(shop.place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    with suppress(ValueError, IndexError):
        return float(done.stdout.strip().splitlines()[-1])
    said = done.stderr.strip().splitlines() or ["it said nothing"]
    logger.warning("%s: its memory could not be measured: %s", contender.name, said[-1])
    return None


def _main(place: Path) -> None:
    """Load and run one contender, and print its peak in megabytes."""
    order = json.loads((place / _ORDER).read_text(encoding="utf-8"))
    contender = parse_document(Contender, order["contender"], _ORDER)
    device = torch.device(order["device"])
    torch.set_num_threads(order["threads"])
    for name in order["libraries"]:
        import_module(name)
    batch = load_file(place / _TOKENS)

    def prepare() -> Job:
        shop = Shop(lambda: open_model(order["model"]), batch, place, order["threads"], device)
        return shop.prepare(contender).job(batch, rows_of(batch), Full())

    taken = _taken(prepare) if device.type == "cpu" else _taken_on_gpu(prepare, device)
    print(taken / _MEGABYTE)


def _taken(prepare: Callable[[], Job]) -> float:
    """Most bytes above those that the process has now."""
    gc.collect()
    before = psutil.Process().memory_info().rss
    _forget_peak()
    _answer(prepare())
    return _peak() - before


def _taken_on_gpu(prepare: Callable[[], Job], device: torch.device) -> float:
    """Most bytes of tensors there, without what loading takes in another number format."""
    job = prepare()
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    _answer(job)
    return float(torch.cuda.max_memory_allocated(device))


@torch.inference_mode()
def _answer(job: Job) -> None:
    for _ in range(2):  # some engines get ready for good at the second call
        job()


def _forget_peak() -> None:
    """Let the peak begin anew, where the system can; else imports may hide a small model."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _peak() -> float:
    """Most bytes that this process has had in memory."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        line = next(one for one in lines if one.startswith("VmHWM"))
        return 1024 * float(line.split()[1])
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return float(memory.peak_wset)
    import resource

    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(taken if sys.platform == "darwin" else 1024 * taken)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
