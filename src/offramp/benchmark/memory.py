"""The peak memory of each contender, in a process of its own."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
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
from offramp.policies import Full
from offramp.storage import parse_document

logger = logging.getLogger("offramp")

BATCH = 32
_ORDER, _TOKENS = "order.json", "tokens.safetensors"
_MEGABYTE = 1e6
_CPU = torch.device("cpu")


def with_memory(
    shop: Shop, model: str, contenders: Sequence[Contender], data: Data, quiet: bool
) -> list[Contender]:
    """The contenders with their peaks: of loading, and of the longest rows in one batch.

    Rows that leave early need no more than full depth, and what is cut off is loaded first, so
    neither is measured. On a GPU nothing is: torch keeps what it has once taken.
    """
    if shop.device.type != "cpu":
        return list(contenders)
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
    torch.set_num_threads(order["threads"])
    for name in order["libraries"]:
        import_module(name)
    batch = load_file(place / _TOKENS)
    gc.collect()
    before = psutil.Process().memory_info().rss
    _forget_peak()
    shop = Shop(lambda: open_model(order["model"]), batch, place, order["threads"], _CPU)
    job = shop.prepare(contender).job(batch, rows_of(batch), Full())
    with torch.inference_mode():
        for _ in range(2):  # some engines get ready for good at the second call
            job()
    print((_peak() - before) / _MEGABYTE)


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
