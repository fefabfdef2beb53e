"""The ONNX engine: one call runs a batch, rows leave and layers are skipped inside the graph."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from offramp.backbones import Batch
from offramp.engines.base import Answers, Exitable
from offramp.engines.graphs import Graphs, rule_of
from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.policies import Policy, Rows

Feed = dict[str, npt.NDArray[Any]]

# Their fused kernel is slower than the operators it stands for: 54 microseconds against 16 for
# 32 tokens of width 384 on one thread, a tenth of a layer.
_WITHOUT = ["SkipLayerNormFusion", "BiasGeluFusion"]


class OnnxEngine:
    """Runs a multi-exit model in ONNX Runtime on the CPU.

    A file for each rule is made when it is first asked for, which takes up to a few minutes, and
    kept in the cache; thresholds are inputs. Any number of threads may share an engine.

    Args:
        model: in evaluation mode, fp32, on CPU.
        dtype: `float32`, or `int8` for layers in 8 bits and exits in float. Rows do not depend on
            their neighbours in either.
        threads: that one call uses; None is as many as torch's.
        progress: show a bar while a file is made.

    Raises:
        MissingExtraError: without the extra `onnx`.
        ConfigError: a model in another state.
    """

    name = "onnx"

    def __init__(
        self,
        model: Exitable,
        dtype: str = "float32",
        threads: int | None = None,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.threads = threads
        self._graphs = Graphs(model, dtype, progress)
        self._sessions: dict[str, _Session] = {}
        self._lock = threading.Lock()

    def run(self, batch: Batch, policy: Policy, rows: Rows | None = None) -> Answers:
        """Answer every row of a batch, see `TorchEngine.run`.

        Raises ConfigError for a batch without rows and for a policy that cannot be a graph.
        """
        session = self._session(policy)
        feed = _feed(batch)
        feed["bar"] = np.array(getattr(policy, "bar", 0.0), dtype=np.float32)
        if rows is not None:
            feed |= {"row_id": rows.ids.numpy(), "length": rows.lengths.numpy()}
        scores, layers, bad = session.run(feed)
        return Answers(torch.from_numpy(scores), torch.from_numpy(layers), torch.from_numpy(bad))

    def all_exits(self, batch: Batch) -> tuple[ExitOutput, ...]:
        """What every exit says of every row; each layer is run."""
        session = self._session(None)
        said = dict(zip(session.outputs, session.run(_feed(batch)), strict=True))
        return tuple(_output(said, layer) for layer in range(1, self.model.depth + 1))

    def _session(self, policy: Policy | None) -> _Session:
        rule = rule_of(policy, self.model.depth)
        if rule not in self._sessions:
            with self._lock:
                if rule not in self._sessions:
                    self._sessions[rule] = _Session(self._graphs.file(policy), self.threads)
        return self._sessions[rule]


class _Session:
    """A file loaded into ONNX Runtime, and the names of what goes in and comes out."""

    def __init__(self, file: bytes | Path, threads: int | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # a pool that spins while another works takes its cores
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            file if isinstance(file, bytes) else str(file),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=_WITHOUT,
        )
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def run(self, feed: Feed) -> list[npt.NDArray[Any]]:
        return self._session.run(None, {name: feed[name] for name in self.inputs})


def _feed(batch: Batch) -> Feed:
    """A batch as arrays, with what a tokenizer may leave out; other columns are not read."""
    feed = {name: leaf.numpy() for name, leaf in batch.items()}
    first = next(iter(feed.values()))
    if not len(first):
        raise ConfigError("The batch has no rows.")
    if "input_ids" in feed:
        feed.setdefault("attention_mask", np.ones_like(feed["input_ids"]))
        feed.setdefault("token_type_ids", np.zeros_like(feed["input_ids"]))
    feed.setdefault("row_id", np.arange(len(first)))
    feed.setdefault("length", _lengths(feed, len(first)))
    return feed


def _lengths(feed: Feed, rows: int) -> npt.NDArray[np.int64]:
    mask = feed.get("attention_mask")
    return np.ones(rows, dtype=np.int64) if mask is None else mask.sum(axis=1)


def _output(said: Mapping[str, npt.NDArray[Any]], layer: int) -> ExitOutput:
    end = f"/{layer}"
    mine = {n.removesuffix(end): torch.from_numpy(a) for n, a in said.items() if n.endswith(end)}
    scores = mine.pop("scores")
    return ExitOutput(scores, {name.removeprefix("signals/"): leaf for name, leaf in mine.items()})
