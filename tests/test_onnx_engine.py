"""The ONNX engine finds the exits that the torch engine finds."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

from engine_fixtures import BAND, BROKEN
from onnx import TensorProto, numpy_helper

from offramp import calibrate, evaluate, tune
from offramp.backbones import Batch
from offramp.cli.tables import recorded
from offramp.engines import TorchEngine, check_backend, dtype_name, make_engine, rows_of
from offramp.engines.base import Answers
from offramp.engines.compiled import MOST
from offramp.engines.graphs import Graphs
from offramp.engines.onnx_engine import OnnxEngine
from offramp.errors import ConfigError, MissingExtraError, ModelError, PointError
from offramp.exits import ExitOutput
from offramp.methods import METHODS
from offramp.model import MultiExitModel
from offramp.policies import (
    POLICIES,
    Averaged,
    EvidencePolicy,
    Fixed,
    Full,
    MaxProbability,
    Patience,
    Policy,
    State,
    Step,
)
from offramp.prediction import Predictor
from offramp.table import ExitTable
from offramp.testing import check_engine, save_tiny_stock, tiny_texts
from offramp.testing.reference import spread_bars
from offramp.testing.tiny import tiny_batch_for, tiny_model, tiny_processor

pytest_plugins = ("engine_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bert(bert_model: MultiExitModel) -> tuple[MultiExitModel, OnnxEngine]:
    return bert_model, OnnxEngine(bert_model, progress=False)


def test_it_does_what_the_slow_twin_does(bert: tuple[MultiExitModel, OnnxEngine]) -> None:
    model, engine = bert
    policies = [MaxProbability(threshold=0.45), Patience(patience=1)]
    check_engine(lambda _: engine, model, policies, rows=16, band=BAND, compiled=True)


@pytest.mark.parametrize("arch", ["albert", "modernbert", "deberta-v2", "vit"])
def test_it_does_so_on_every_architecture(arch: str) -> None:
    model = tiny_model(arch, layers=2)
    engine, policies = OnnxEngine(model, progress=False), [MaxProbability(threshold=0.45)]
    check_engine(lambda _: engine, model, policies, rows=16, band=BAND, compiled=True)


def test_every_exit_says_what_the_model_says(bert: tuple[MultiExitModel, OnnxEngine]) -> None:
    model, engine = bert
    batch = tiny_batch_for(model.stock, 7, seed=3)
    pairs = zip(engine.all_exits(batch), TorchEngine(model).all_exits(batch), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.scores, theirs.scores, atol=BAND, rtol=0)


def test_policies_that_read_few_exits_or_remember(
    bert: tuple[MultiExitModel, OnnxEngine],
) -> None:
    model, engine = bert
    batch = tiny_batch_for(model.stock, 12, seed=4)
    rows = rows_of(batch)
    policies: list[Policy] = [
        Full(),
        Fixed(layer=2),
        Averaged(policy=MaxProbability(threshold=0.5), decide_on="average"),
    ]
    for policy in policies:
        ours, theirs = engine.run(batch, policy, rows), TorchEngine(model).run(batch, policy, rows)
        assert torch.equal(ours.exit_layers, theirs.exit_layers), policy
        torch.testing.assert_close(ours.scores, theirs.scores, atol=BAND, rtol=0)


def _apart() -> list[str]:
    """Methods, but one of those that differ in their training alone."""
    cases = {(str(METHODS[name].exits.to_dict()), METHODS[name].policy): name for name in METHODS}
    return list(cases.values())


_made: dict[str, tuple[MultiExitModel, OnnxEngine]] = {}


def _with_exits_of(name: str) -> tuple[MultiExitModel, OnnxEngine]:
    """Methods with the same exits share them, since to trace them takes long."""
    exits = METHODS[name].exits
    known = str(exits.to_dict())
    if known not in _made:
        model = tiny_model("bert", spec=exits, layers=3)
        _made[known] = model, OnnxEngine(model, progress=False)
    return _made[known]


@pytest.mark.parametrize("name", _apart())
def test_a_thousand_rows_leave_as_with_torch_under_each_method(name: str) -> None:
    method = METHODS[name]
    model, engine = _with_exits_of(name)
    torch_engine = TorchEngine(model)
    batches = [tiny_batch_for(model.stock, rows, tokens) for rows, tokens in ((900, 16), (100, 3))]
    policy = POLICIES[method.policy].variants(model.problem_type, model.depth)[0]
    if isinstance(policy, EvidencePolicy):
        policy = policy.with_bar(spread_bars(policy, torch_engine.all_exits(batches[0]), 1)[0])
    left, apart = [], 0
    for batch in batches:
        ours, theirs = engine.run(batch, policy), torch_engine.run(batch, policy)
        same = ours.exit_layers == theirs.exit_layers
        assert same[~_near(policy, torch_engine, batch, theirs)].all()
        torch.testing.assert_close(ours.scores[same], theirs.scores[same], atol=BAND, rtol=0)
        left.append(ours.exit_layers)
        apart += int((~same).sum())
    assert len(torch.cat(left).unique()) > 1
    assert apart < 10


def _near(policy: Policy, engine: TorchEngine, batch: Batch, found: Answers) -> torch.Tensor:
    """Rows that leave elsewhere if the bar is BAND higher or lower."""
    near = torch.zeros_like(found.bad)
    if isinstance(policy, EvidencePolicy):
        for bar in (policy.bar - BAND, policy.bar + BAND):
            near |= engine.run(batch, policy.with_bar(bar)).exit_layers != found.exit_layers
    return near


def test_nothing_is_made_anew_over_a_thousand_requests_of_random_shape(
    bert: tuple[MultiExitModel, OnnxEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = bert
    policy = MaxProbability(threshold=0.45)
    engine.run(tiny_batch_for(model.stock, 2), policy)
    monkeypatch.setattr(engine._graphs, "load", lambda *_: pytest.fail("a file was loaded"))
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 9, (1000,), generator=draw)
    lengths = torch.randint(3, 17, (1000,), generator=draw)
    for count, tokens in zip(rows.tolist(), lengths.tolist(), strict=True):
        asked = MaxProbability(threshold=0.4 + 0.001 * tokens)
        engine.run(tiny_batch_for(model.stock, count, tokens), asked)


def test_a_row_that_is_not_a_number_leaves_alone_and_at_once(
    bert: tuple[MultiExitModel, OnnxEngine],
) -> None:
    model, engine = bert
    batch = tiny_batch_for(model.stock, 5, seed=2)
    policy = MaxProbability(threshold=0.6)
    before = engine.run(batch, policy)
    batch["input_ids"][3, 1] = BROKEN
    after = engine.run(batch, policy)
    assert after.bad.tolist() == [False, False, False, True, False]
    assert after.exit_layers[3] == 1
    others = ~after.bad
    assert torch.equal(after.exit_layers[others], before.exit_layers[others])
    torch.testing.assert_close(after.scores[others], before.scores[others], atol=BAND, rtol=0)


def test_eight_bits_move_scores_a_little_and_no_row_by_its_neighbours(
    bert_model: MultiExitModel,
) -> None:
    model = bert_model
    engine = make_engine(model, "onnx", "int8", progress=False)
    assert (engine.name, engine.dtype) == ("onnx", dtype_name("int8"))
    batch = tiny_batch_for(model.stock, 9, seed=1)
    whole = engine.run(batch, Full())
    exact = TorchEngine(model).run(batch, Full())
    drift = (whole.scores - exact.scores).abs()
    assert 0 < drift.mean() < 0.1 * exact.scores.std()
    for row in range(9):
        mine = {name: leaf[row : row + 1] for name, leaf in batch.items()}
        alone = engine.run(mine, Full())
        torch.testing.assert_close(alone.scores[0], whole.scores[row], atol=BAND, rtol=0)


def test_files_are_made_once_and_shared_by_thresholds(
    bert: tuple[MultiExitModel, OnnxEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = bert
    batch = tiny_batch_for(model.stock, 6)
    low = engine.run(batch, MaxProbability(threshold=0.4))
    monkeypatch.setattr("offramp.engines.graphs.trace_model", None)
    again = OnnxEngine(model, progress=False)
    assert torch.equal(again.run(batch, MaxProbability(threshold=0.4)).scores, low.scores)
    assert again.run(batch, MaxProbability(threshold=1.0)).exit_layers.tolist() == [3] * 6


def test_what_is_used_stays_loaded_and_what_is_not_goes(
    bert_model: MultiExitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, loaded = OnnxEngine(bert_model, progress=False), list[tuple[Any, int]]()

    def load(policy: Policy, make: Any, deepest: int) -> Any:
        loaded.append((policy, deepest))
        return object()

    monkeypatch.setattr(engine._graphs, "load", load)
    usual = MaxProbability()
    for layer in range(1, 7):
        for deepest in range(1, 4):
            engine._session(Fixed(layer=layer), deepest)
            engine._session(usual, 3)
    assert loaded.count((usual, 3)) == 1
    assert len(loaded) > len(engine._sessions) == max(MOST, 2 * bert_model.depth)


def test_a_file_that_is_torn_is_made_anew(
    bert: tuple[MultiExitModel, OnnxEngine],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny_model("bert", layers=2)
    batch, policy = tiny_batch_for(model.stock, 3), MaxProbability(threshold=0.5)
    whole = OnnxEngine(model, progress=False).run(batch, policy)
    (file,) = tmp_path.glob("offramp/onnx/*.onnx")
    size = file.stat().st_size
    with open(file, "r+b") as handle:
        handle.truncate(size // 2)
    again = OnnxEngine(model, progress=False).run(batch, policy)
    assert torch.equal(again.scores, whole.scores)
    assert "is broken and is made anew" in caplog.text
    assert file.stat().st_size == size


def test_engines_may_be_made_in_several_threads_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny_model("bert", layers=2)
    batch, filters = tiny_batch_for(model.stock, 3), list(warnings.filters)

    def answer(_: int) -> list[int]:
        return OnnxEngine(model, progress=False).run(batch, Fixed(layer=1)).exit_layers.tolist()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(answer, range(2))) == [[1, 1, 1]] * 2
    assert list(warnings.filters) == filters
    assert len(list(tmp_path.glob("offramp/onnx/*"))) == 1


_PLUGIN = """
from offramp.policies import MaxProbability

class Mine(MaxProbability):
    def evidence(self, state, layer, output):
        return output.scores[:, 0] * 0 + {evidence}, state
"""


def test_a_policy_whose_code_has_changed_gets_another_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    model = tiny_model("bert", layers=2)
    engine = OnnxEngine(model, progress=False)
    batch = tiny_batch_for(model.stock, 2)
    assert engine.run(batch, MaxProbability(threshold=1.0)).exit_layers.tolist() == [2, 2]
    for evidence, layer in (("2.0", 1), ("0.00", 2)):
        (tmp_path / "plugin.py").write_text(_PLUGIN.format(evidence=evidence), encoding="utf-8")
        monkeypatch.delitem(sys.modules, "plugin", raising=False)
        mine = importlib.import_module("plugin").Mine(threshold=1.0)
        # it has the name and the options of a policy of ours, and is another all the same
        assert engine.run(batch, mine).exit_layers.tolist() == [layer, layer]
        engine = OnnxEngine(model, progress=False)


def test_without_a_place_for_files_it_works_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "~nowhere")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    model = tiny_model("bert", layers=2)
    engine = OnnxEngine(model, progress=False)
    batch = tiny_batch_for(model.stock, 3)
    assert engine.run(batch, Fixed(layer=1)).exit_layers.tolist() == [1, 1, 1]


class _Late(MaxProbability):
    """Its evidence and its bar do not say all."""

    name = "late"

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        said = super().step(state, layer, output)
        later = said.leave if layer >= 2 else torch.zeros_like(said.leave)
        return said._replace(leave=later)


def test_a_policy_with_a_step_of_its_own_is_asked_by_it(
    bert: tuple[MultiExitModel, OnnxEngine],
) -> None:
    model, engine = bert
    batch = tiny_batch_for(model.stock, 6)
    for threshold, layer in ((0.0, 2), (1.0, 3)):
        found = engine.run(batch, _Late(threshold=threshold))
        assert found.exit_layers.tolist() == [layer] * 6


class _Peeks(EvidencePolicy):
    """Looks at values in Python."""

    name = "peeks"

    @property
    def bar(self) -> float:
        return 0.5

    def with_bar(self, bar: float) -> EvidencePolicy:
        return self

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[torch.Tensor, State]:
        certain = [1.0 if row.max().item() > 1 else 0.0 for row in output.scores]
        return torch.tensor(certain), state


def test_a_policy_that_looks_at_values_is_refused_by_name(
    bert: tuple[MultiExitModel, OnnxEngine],
) -> None:
    model, engine = bert
    with pytest.raises(ConfigError, match=r"Policy 'peeks' cannot be a graph.*backend='torch'"):
        engine.run(tiny_batch_for(model.stock, 2), _Peeks())


def test_what_it_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"eval\(\)"):
        OnnxEngine(tiny_model("bert", layers=2).train())
    with pytest.raises(ConfigError, match="float32 on the CPU"):
        OnnxEngine(tiny_model("bert", layers=2).to(torch.bfloat16))
    with pytest.raises(ConfigError, match=r"'torch' does not compute in int8.*backend='onnx'"):
        make_engine(tiny_model("bert", layers=2), "torch", "int8")
    with pytest.raises(ConfigError, match="Did you mean 'onnx'"):
        make_engine(tiny_model("bert", layers=2), "onx")
    with pytest.raises(ConfigError, match=r"'onnx' runs on the CPU, not on 'cuda:1'\. Leave"):
        check_backend("onnx", "int8", "cuda:1")
    with monkeypatch.context() as patch:
        patch.setattr("offramp.engines.graphs.LARGEST", 1000)
        with pytest.raises(ModelError, match=r"GB in float32.*int8 or backend torch"):
            OnnxEngine(tiny_model("bert", layers=2))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"offramp\[onnx\]"):
        OnnxEngine(tiny_model("bert", layers=2))


def test_a_runtime_that_is_too_old_is_named_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")
    with pytest.raises(ConfigError, match=r"onnxruntime 1\.23\.2 .* 1\.24 or newer.*--upgrade"):
        OnnxEngine(tiny_model("bert", layers=2))


def test_tune_refuses_before_it_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_tiny_stock(tmp_path / "stock")
    rows = Dataset.from_list([{"text": text} for text in tiny_texts(20)])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"offramp\[onnx\]"):
        tune(tmp_path / "stock", rows, tmp_path / "out", max_disagreement=0.5, backend="onnx")
    assert not (tmp_path / "out").exists()


def test_what_is_measured_was_computed_as_asked() -> None:
    model = tiny_model("bert", layers=2)
    engine = make_engine(model, "onnx", "int8", progress=False)
    predictor = Predictor(model, tiny_processor("bert"), "full", engine=engine)
    rows = Dataset.from_list([{"text": text} for text in tiny_texts(20)])
    with recorded(predictor, rows, quiet=True) as table:
        kind = dtype_name("int8")
        assert (table.header.engine, table.header.dtype) == ("onnx", kind)
        table = ExitTable(table.header.model_copy(update={"role": "tune"}), table.columns)
        point = calibrate(table, max_disagreement=0.5).point
        table.header = table.header.model_copy(update={"engine": "torch", "dtype": "float32"})
        with pytest.raises(PointError, match=f"chosen on onnx in {kind}, not on torch in float32"):
            evaluate(table, point)


@pytest.mark.parametrize("threads", [0, -1, 2.5, "4", True])
def test_threads_are_a_number_from_one(bert_model: MultiExitModel, threads: object) -> None:
    with pytest.raises(ConfigError, match="give a whole number from 1"):
        make_engine(bert_model, "onnx", threads=threads)  # type: ignore[arg-type]


def test_ids_of_another_width_and_masks_of_truth_values_are_taken(
    bert: tuple[MultiExitModel, OnnxEngine],
) -> None:
    model, engine = bert
    batch = tiny_batch_for(model.stock, 5, seed=2)
    other = {
        "input_ids": batch["input_ids"].int(),
        "attention_mask": batch["attention_mask"].bool(),
    }
    assert torch.equal(engine.run(other, Full()).scores, engine.run(batch, Full()).scores)


def every_initializer(graph: Any) -> Iterator[Any]:
    """Those of bodies, too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from every_initializer(attribute.g)


@pytest.mark.parametrize("vnni", [True, False])
def test_weights_keep_seven_bits_where_sums_of_eight_would_overflow(
    bert_model: MultiExitModel, monkeypatch: pytest.MonkeyPatch, vnni: bool
) -> None:
    has = {"architecture": "x86_64", "avx512_vnni": vnni}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    kind = dtype_name("int8")
    assert kind == ("int8" if vnni else "int7")
    made = Graphs(bert_model, kind, progress=False).early_exit(Full())
    stored = [
        numpy_helper.to_array(one)
        for one in every_initializer(made.graph)
        if one.data_type == TensorProto.INT8
    ]
    assert stored
    assert max(int(abs(one.astype(int)).max()) for one in stored) == (127 if vnni else 64)
