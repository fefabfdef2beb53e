"""Files that leave early by themselves, for ONNX Runtime or OpenVINO where offramp is not."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp import __version__
from offramp.engines import INTEGERS, dtype_name
from offramp.engines.exporting import BAR, BARS, bars_given
from offramp.errors import ConfigError, ModelError, OutputError, PointError
from offramp.policies import Policy
from offramp.prediction.labels import Labels
from offramp.prediction.predictor import DEFAULT, Point, Predictor
from offramp.prediction.ready import ReadyPoint
from offramp.storage import check_place, whole_file

if TYPE_CHECKING:
    from onnx import ModelProto

FORMATS = {"onnx": ".onnx", "openvino": ".xml"}
"""How the file's name ends; the weights of an .xml lie in a .bin beside it."""
_KINDS = "token_type_ids"


@dataclass(frozen=True, slots=True)
class Exported:
    """A written file.

    Attributes:
        path: of the file; an .xml has its .bin beside it.
        inputs, outputs: their names.
        bytes: its size, the .bin included.
        bar: what evidence must be above for a row to leave, unless a call says otherwise; None
            where the policy has none.
        bars: the same for each exit before the last, where each has its own; with None at exits
            that let nobody leave.
        policy: {"name": ..., its options}.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bytes: int
    bar: float | None
    bars: tuple[float | None, ...] | None
    policy: dict[str, Any]


def export(
    model: str | os.PathLike[str] | Predictor,
    output: str | os.PathLike[str],
    *,
    point: Point | None = None,
    dtype: str | None = None,
    format: str = "onnx",
    progress: bool = True,
) -> Exported:
    """Write a model with an operating point as one ONNX file, or as OpenVINO's .xml and .bin.

    It runs in plain ONNX Runtime or plain OpenVINO, in any language, on batches of any size.
    Inputs: what the tokenizer gives (`attention_mask` always) and `bar`, a float32 number:
    evidence above it lets a row leave, NaN means the point's own. Under the policy `per_exit` these
    are `bars`, one for each exit before the last or one for all. Outputs: `answer` (rows,) int64,
    the label's index; for several labels (rows, labels) bool, for regression (rows,) float32;
    `scores` (rows, classes) raw; `exit_layer` (rows,) int64, 1-based; `bad` (rows,) bool, rows
    whose scores are no numbers.
    Labels, policy, bars, fingerprints and, where the point has them, the temperatures by which the
    scores of each exit layer are divided stand in the file's metadata, OpenVINO's `rt_info`.

    Args:
        model: folder or hub id of a multi-exit model, or a `Predictor`.
        output: the file, .onnx or .xml.
        point: an operating point of the folder, a point, a policy or `full`; None is `default`.
        dtype: `fp32` or `int8`; a point belongs to the one it was chosen in.
        format: `onnx` or `openvino`.

    Raises:
        ConfigError: an unknown format, or a policy that cannot be in a file.
        ModelError: a part of the model that the format has no words for.
        PointError: a point chosen in another dtype.
        OutputError: the file cannot be written.
    """
    from offramp.engines.graphs import Graphs

    path = _path_for(output, format)
    if dtype is not None and dtype_name(dtype) not in ("float32", *INTEGERS):
        raise ConfigError(f"A file computes in fp32 or int8, not in {dtype}: leave the dtype out.")
    if not isinstance(model, Predictor):
        model = _loaded(model, point or DEFAULT, format, dtype)
        point = None
    _check_engine(model, format, dtype)
    ready = model.ready(point)
    policy = ready.policy
    check_place(path)
    graphs = Graphs(model.model, model.engine.dtype, progress, runtime=format)
    file = _with_answer(graphs.load(policy, _read), model.model.problem_type)
    _fill_in(file, model.processor)
    bars = _with_bars(file, policy, model.model.depth)
    _refuse_rows(file, policy)
    size = _WRITERS[format](file, _described(model, ready, bars), path)
    return Exported(
        path,
        tuple(value.name for value in file.graph.input),
        tuple(value.name for value in file.graph.output),
        size,
        bars.get(BAR),
        bars.get(BARS),
        policy.to_dict(),
    )


def _loaded(
    model: str | os.PathLike[str], point: Point, format: str, dtype: str | None
) -> Predictor:
    try:
        return Predictor.load(model, point, backend=format, dtype=dtype)
    except PointError as problem:
        if dtype is None:
            raise
        raise PointError(
            f"{problem} For a file, leave the dtype out, or name a point that was chosen in it."
        ) from None


def _path_for(output: str | os.PathLike[str], format: str) -> Path:
    """Raises ConfigError for a format, OutputError for a name."""
    if format not in FORMATS:
        raise ConfigError(f"Unknown format '{format}'. Known: {', '.join(FORMATS)}.")
    path, ends = Path(output), FORMATS[format]
    if path.suffix != ends or path.is_dir():
        other = [name for name, suffix in FORMATS.items() if suffix == path.suffix]
        mend = f", or choose format '{other[0]}'" if other else ""
        raise OutputError(f"{path}: for {format}, name a file that ends with {ends}{mend}.")
    return path


def _check_engine(model: Predictor, format: str, dtype: str | None) -> None:
    """Refuse a file that would compute in another way than the predictor. Raises ConfigError."""
    engine = model.engine
    same = engine.dtype == "float32" or engine.name == format
    if same and (dtype is None or dtype_name(dtype) == engine.dtype):
        return
    wanted = dtype or (engine.dtype if engine.dtype in INTEGERS else "fp32")
    raise ConfigError(
        f"The predictor computes in {engine.dtype} on {engine.name}, and so will the file, not in "
        f"{wanted} on {format}. Load it with backend='{format}' and dtype='{wanted}'."
    )


def _read(file: bytes | Path) -> ModelProto:
    import onnx

    return onnx.load_from_string(file) if isinstance(file, bytes) else onnx.load(file)


def _with_answer(file: ModelProto, problem_type: str) -> ModelProto:
    """Add what the scores mean: the label, the labels, or the number."""
    from onnx import TensorProto, helper

    if problem_type == "multi_label_classification":
        zero = helper.make_tensor("answer.zero", TensorProto.FLOAT, [], [0.0])
        file.graph.initializer.append(zero)
        node = helper.make_node("Greater", ["scores", "answer.zero"], ["answer"])
        value = helper.make_tensor_value_info("answer", TensorProto.BOOL, [None, None])
    elif problem_type == "regression":
        axis = helper.make_tensor("answer.axis", TensorProto.INT64, [1], [1])
        file.graph.initializer.append(axis)
        node = helper.make_node("Squeeze", ["scores", "answer.axis"], ["answer"])
        value = helper.make_tensor_value_info("answer", TensorProto.FLOAT, [None])
    else:
        node = helper.make_node("ArgMax", ["scores"], ["answer"], axis=1, keepdims=0)
        value = helper.make_tensor_value_info("answer", TensorProto.INT64, [None])
    file.graph.node.append(node)
    file.graph.output.insert(0, value)
    return file


def _fill_in(file: ModelProto, processor: Any) -> None:
    """What a model reads and its own tokenizer does not give: all tokens are of the first kind."""
    from onnx import helper

    given = getattr(processor, "model_input_names", [_KINDS])
    inputs = {value.name: value for value in file.graph.input}
    if _KINDS in inputs and _KINDS not in given:
        file.graph.input.remove(inputs[_KINDS])
        file.graph.node.insert(0, helper.make_node("Sub", ["input_ids", "input_ids"], [_KINDS]))


def _with_bars(file: ModelProto, policy: Policy, depth: int) -> dict[str, Any]:
    """Let NaN stand for the point's own thresholds; these, by the name of their input.

    An input with a default would be the usual way, but onnxruntime-node takes the default
    without a word even where a value is given.
    """
    from onnx import helper, numpy_helper

    from offramp.engines.assembly import read_instead

    inputs = {value.name for value in file.graph.input}
    bars = {name: bar for name, bar in bars_given(policy, depth).items() if name in inputs}
    for name, own in bars.items():
        none, chosen, used = f"{name}.none", f"{name}.own", f"{name}.used"
        read_instead(file.graph.node, {name: used})
        file.graph.initializer.append(numpy_helper.from_array(np.array(own, np.float32), chosen))
        file.graph.node.insert(0, helper.make_node("Where", [none, chosen, name], [used]))
        file.graph.node.insert(0, helper.make_node("IsNaN", [name], [none]))
    return {
        name: tuple(map(_finite, own)) if isinstance(own, tuple) else _finite(own)
        for name, own in bars.items()
    }


def _finite(bar: float) -> float | None:
    return bar if math.isfinite(bar) else None


def _refuse_rows(file: ModelProto, policy: Policy) -> None:
    if {"row_id", "length"} & {value.name for value in file.graph.input}:
        raise ConfigError(
            f"Policy '{policy.name}' reads which row it is, which a file cannot know. Choose "
            "another policy, such as max_probability or patience."
        )


def _described(model: Predictor, ready: ReadyPoint, bars: dict[str, Any]) -> dict[str, str]:
    """What the file says of itself to whoever loads it."""
    warm = [] if ready.temperatures is None else list(ready.temperatures.values)
    return {
        "problem_type": model.model.problem_type,
        "labels": json.dumps(Labels(model.model).names, ensure_ascii=False),
        "policy": json.dumps(ready.policy.to_dict()),
        **{name: _as_text(bars.get(name)) for name in (BAR, BARS)},
        "temperatures": json.dumps(warm) if warm else "",
        "dtype": model.engine.dtype,
        "depth": str(model.model.depth),
        "max_length": "" if model.max_length is None else str(model.max_length),
        "model_fingerprint": model.model.fingerprint(),
        "processor_fingerprint": model.processor_fingerprint,
    }


def _as_text(bars: Any) -> str:
    return "" if bars is None else json.dumps(bars)


def _write_onnx(file: ModelProto, said: dict[str, str], path: Path) -> int:
    """Write a file; its size in bytes."""
    dotted = {f"offramp.{name}": text for name, text in said.items()}
    for name, text in {"offramp": __version__, **dotted}.items():
        entry = file.metadata_props.add()
        entry.key, entry.value = name, text
    with whole_file(path) as staged:
        staged.write_bytes(file.SerializeToString())
    return path.stat().st_size


def _write_openvino(file: ModelProto, said: dict[str, str], path: Path) -> int:
    """Write .xml and .bin; their size in bytes."""
    import openvino

    weights = path.with_suffix(".bin")
    if weights.is_dir():
        raise OutputError(f"{weights} is a folder, and the weights would go there.")
    try:
        model = openvino.Core().read_model(BytesIO(file.SerializeToString()))
    except Exception as problem:  # its errors have no base of their own
        reason = str(problem).strip().split("\n")[0][:200]
        raise ModelError(f"OpenVINO cannot take this model ({reason}). Use format onnx.") from None
    for name, text in {"version": __version__, **said}.items():
        model.set_rt_info(text, ["offramp", name])
    with whole_file(path) as graph, whole_file(weights) as numbers:
        with TemporaryDirectory(prefix=f".{path.name}.", suffix=".part", dir=path.parent) as place:
            made = Path(place, path.name)  # it insists on the ending
            _save(model, made)
            os.replace(made, graph)
            os.replace(made.with_suffix(".bin"), numbers)
        # the new weights come before the new .xml, and must not meet the old one
        path.unlink(missing_ok=True)
    return path.stat().st_size + weights.stat().st_size


def _save(model: Any, path: Path) -> None:
    import openvino

    try:
        openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as problem:  # so it calls a full disk
        raise OSError(str(problem)) from problem


_WRITERS = {"onnx": _write_onnx, "openvino": _write_openvino}
