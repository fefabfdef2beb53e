"""Streams: rows come one by one, leave as they like, and answer as if they were alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from transformers import AlbertConfig, AutoModelForSequenceClassification, BertConfig

from offramp.backbones import Batch
from offramp.engines import RowAnswer, TorchEngine, bucket, collate, make_engine, rows_of
from offramp.errors import ConfigError
from offramp.exits import ExitOutput, ExitSpec
from offramp.model import MultiExitModel
from offramp.policies import Full, MaxProbability, Patience, Policy, State
from offramp.prediction import Predictor
from offramp.testing import (
    EchoModel,
    Scripted,
    check_engine,
    check_stream_bookkeeping,
    echo_batch,
    tiny_model,
    tiny_texts,
    tiny_tokenizer,
)

Results = Iterator[tuple[int, RowAnswer]]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_model(config: Any, spread: float = 1.0) -> MultiExitModel:
    """Wide random weights, so that rows leave at many layers."""
    torch.manual_seed(0)
    stock = AutoModelForSequenceClassification.from_config(config)
    model = MultiExitModel.from_stock(stock, ExitSpec(pooling="mean")).eval()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.Linear):
                part.weight.normal_(std=spread / part.weight.shape[1] ** 0.5)
    return model


def small_albert(width: int = 48) -> MultiExitModel:
    """Eight layers that share one block."""
    config = AlbertConfig(
        vocab_size=176,
        embedding_size=16,
        hidden_size=width,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=64,
    )
    return random_model(config, spread=1.5)


@pytest.fixture(scope="module")
def albert() -> MultiExitModel:
    return small_albert()


def texts(amount: int, seed: int = 0, longest: int = 30) -> list[tuple[int, Batch]]:
    """Rows of random tokens, padded to their bucket."""
    draw = random.Random(seed)
    rows = [draw.choices(range(5, 170), k=draw.randint(2, longest)) for _ in range(amount)]
    return [
        (number, collate({"input_ids": [row]}, pad_id=0, tokens=bucket(len(row), 64)))
        for number, row in enumerate(rows)
    ]


def bits(answer: RowAnswer) -> tuple[bytes, int]:
    return answer.scores.numpy().tobytes(), answer.exit_layer


def policy_for(model: MultiExitModel, rows: list[tuple[int, Batch]]) -> MaxProbability:
    """A bar at which these rows leave after many different layers."""
    engine = TorchEngine(model)
    for threshold in (0.6, 0.7, 0.8, 0.9, 0.95, 0.99):
        policy = MaxProbability(threshold=threshold)
        left = [answer.exit_layer for _, answer in engine.stream(rows, policy)]
        if len(set(left)) >= min(5, model.depth - 1):
            return policy
    raise AssertionError("These rows leave after few layers at any bar.")


# --- the rows' own answers ----------------------------------------------------------------


def test_an_albert_keeps_what_engines_must_keep_when_depths_mix(albert: MultiExitModel) -> None:
    assert albert.backbone.shared_weights
    assert len(albert.backbone.layers) == 1
    check_engine(TorchEngine, albert, rows=24)


def test_five_hundred_exit_patterns_and_no_row_of_a_stream_gets_anothers_answer() -> None:
    check_stream_bookkeeping(TorchEngine, patterns=500)


@pytest.mark.parametrize("slots", [1, 3, 32])
def test_rows_in_a_pool_answer_as_one_by_one(albert: MultiExitModel, slots: int) -> None:
    rows = texts(120)
    policy, engine = policy_for(albert, rows), TorchEngine(albert)
    for position, answer in engine.stream(rows, policy, slots=slots):
        alone = engine.run(rows[position][1], policy)
        assert answer.exit_layer == int(alone.exit_layers)
        assert torch.allclose(answer.scores, alone.scores[0], atol=1e-5)


# --- full batches -------------------------------------------------------------------------


class Counting(EchoModel):
    """Notes after which layer how many rows ran."""

    def __init__(self, depth: int, shared: bool) -> None:
        super().__init__(depth, shared)
        self.calls: list[tuple[int, int]] = []
        layer = self.backbone.layer

        def counted(number: int, flow: Any) -> Any:
            self.calls.append((number, len(flow.hidden)))
            return layer(number, flow)

        self.backbone.layer = counted  # type: ignore[method-assign]


def stream_echo(model: EchoModel, layers: tuple[int, ...], **options: Any) -> Results:
    rows = ((id, echo_batch([id])) for id in range(len(layers)))
    script = Scripted(layers=layers, inner=Patience())
    return TorchEngine(model).stream(rows, script, **options)


@pytest.mark.parametrize("shared", [False, True])
def test_batches_stay_as_good_as_full_until_the_rows_run_out(shared: bool) -> None:
    model = Counting(6, shared)
    layers = tuple(random.Random(0).choices(range(1, 7), k=500))
    assert len(list(stream_echo(model, layers, slots=8))) == 500
    sizes = [rows for _, rows in model.calls]
    assert sum(sizes) == sum(layers)
    least = 7 if shared else 8  # two rows that have left are replaced at once
    assert sum(size < least for size in sizes) <= 7


def test_rows_of_different_depths_share_a_call_only_where_layers_share_a_block() -> None:
    layers = tuple(random.Random(0).choices(range(1, 7), k=200))
    pooled, apart = Counting(6, shared=True), Counting(6, shared=False)
    for model in (pooled, apart):
        list(stream_echo(model, layers, slots=8))
    assert len(pooled.calls) <= sum(layers) / 7 + 6
    ran = {number: sum(rows for n, rows in apart.calls if n == number) for number in range(1, 7)}
    assert ran == {number: sum(left >= number for left in layers) for number in range(1, 7)}


def test_a_row_of_a_rare_shape_is_not_kept_waiting_for_ever() -> None:
    model = EchoModel(4)
    script = Scripted(layers=(2,) * 8, inner=Patience())
    rare = echo_batch([7], tokens=2)
    endless = ((n % 7, rare if n == 0 else echo_batch([n % 7])) for n in count())
    first = islice(TorchEngine(model).stream(endless, script, slots=4, ahead=16), 400)
    assert 0 in {position for position, _ in first}


def test_an_endless_stream_answers_while_it_goes_on_and_reads_only_so_far_ahead() -> None:
    read = []

    def endless() -> Iterator[tuple[int, Batch]]:
        for number in count():
            read.append(number)
            yield number % 5, echo_batch([number % 5])

    answers = TorchEngine(EchoModel(6)).stream(
        endless(), Scripted(layers=(1, 2, 6, 4, 3), inner=Patience()), slots=8, ahead=64
    )
    for answered, _ in enumerate(islice(answers, 1000), start=1):
        assert len(read) - answered <= 64


def test_a_stream_reads_nothing_before_it_is_asked() -> None:
    rows = iter([(0, echo_batch([0]))])
    answers = TorchEngine(EchoModel(2)).stream(rows, Full())
    assert next(rows)[0] == 0
    assert not list(answers)


def test_ordered_answers_come_in_the_order_of_the_rows() -> None:
    layers = (6, 1, 1, 5, 2, 1, 3, 1, 1, 6, 4)
    loose = [place for place, _ in stream_echo(EchoModel(6), layers, slots=4)]
    ordered = [place for place, _ in stream_echo(EchoModel(6), layers, slots=4, ordered=True)]
    assert ordered == list(range(11)) == sorted(loose) != loose


# --- what may go wrong --------------------------------------------------------------------


def test_no_rows_give_no_answers(albert: MultiExitModel) -> None:
    for ordered in (False, True):
        assert not list(TorchEngine(albert).stream([], Full(), ordered=ordered))


def test_an_error_of_the_iterable_comes_after_the_answers_of_the_rows_before() -> None:
    def failing() -> Iterator[tuple[int, Batch]]:
        for number in range(10):
            yield number, echo_batch([number])
        raise OSError("the line is dead")

    answers = TorchEngine(EchoModel(3)).stream(failing(), Full(), slots=4)
    assert sorted(position for position, _ in islice(answers, 10)) == list(range(10))
    with pytest.raises(OSError, match="line is dead"):
        next(answers)


def test_a_batch_of_several_rows_is_no_row() -> None:
    answers = TorchEngine(EchoModel(3)).stream([(0, echo_batch([1, 2]))], Full())
    with pytest.raises(ConfigError, match="batch of one row"):
        list(answers)


def test_options_that_make_no_sense_are_refused_on_the_call() -> None:
    engine = TorchEngine(EchoModel(3))
    for options in ({"slots": 0}, {"slots": 8, "ahead": 4}, {"determinism": "bits"}):
        with pytest.raises(ConfigError):
            engine.stream([], Full(), **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="training mode"):
        TorchEngine(tiny_model().train()).stream([], Full())


def test_a_stream_may_be_left_in_the_middle(albert: MultiExitModel) -> None:
    answers = TorchEngine(albert).stream(texts(100), Full(), slots=4)
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert not torch.is_inference_mode_enabled()


def test_who_reads_a_stream_is_not_put_into_inference_mode(albert: MultiExitModel) -> None:
    for _ in TorchEngine(albert).stream(texts(5), Full()):
        assert not torch.is_inference_mode_enabled()


# --- determinism="shape" ------------------------------------------------------------------


def in_random_company(
    model: MultiExitModel,
    determinism: Any,
    trials: int,
    amount: int,
    policy: Policy | None = None,
    what: Callable[[RowAnswer], Any] = bits,
) -> int:
    """Texts whose answer or exit layer, or what is asked, has other bits in another company."""
    rows = texts(amount)
    policy, engine, draw = policy or policy_for(model, rows), TorchEngine(model), random.Random(0)
    seen: dict[int, set[Any]] = {number: set() for number, _ in rows}
    for _ in range(trials):
        crowd = draw.sample(rows, draw.randint(1, amount))
        for position, answer in engine.stream(crowd, policy, determinism=determinism, slots=8):
            seen[crowd[position][0]].add(what(answer))
    return sum(len(answers) > 1 for answers in seen.values())


@DTYPES
def test_200_texts_in_50_random_crowds_and_not_one_bit_differs(dtype: torch.dtype) -> None:
    assert in_random_company(small_albert().to(dtype), "shape", trials=50, amount=200) == 0


@DTYPES
def test_not_one_bit_differs_where_layers_have_weights_of_their_own(dtype: torch.dtype) -> None:
    assert in_random_company(tiny_model("bert").to(dtype), "shape", trials=20, amount=60) == 0


def test_without_the_mode_some_bits_differ() -> None:
    config = BertConfig(
        vocab_size=176,
        hidden_size=256,
        num_hidden_layers=4,
        intermediate_size=1024,
        num_attention_heads=4,
    )
    model = random_model(config)  # in bf16 kernels may round alike for any number of rows
    assert in_random_company(model, None, trials=6, amount=40) > 0
    assert in_random_company(model, "shape", trials=6, amount=40) == 0


class Herd(MaxProbability):
    """Each row is as sure as the whole batch is."""

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        own, state = super().evidence(state, layer, output)
        return own.mean().expand(len(own)), state


class Follower(MaxProbability):
    """A row is as sure as the one that was asked before it."""

    _before: list[Tensor] = PrivateAttr(default_factory=lambda: [torch.zeros(())])

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        own, state = super().evidence(state, layer, output)
        self._before.append(own[-1])
        return self._before.pop(0).expand(len(own)), state


@DTYPES
def test_a_policy_that_looks_at_neighbours_fails_the_check_and_in_the_mode_it_finds_none(
    dtype: torch.dtype,
) -> None:
    model = small_albert().to(dtype)
    fair = policy_for(model, texts(60))
    herd, follower = (kind(threshold=fair.threshold) for kind in (Herd, Follower))

    def moved(policy: Policy, determinism: Any) -> int:
        return in_random_company(
            model, determinism, 10, 60, policy, lambda answer: answer.exit_layer
        )

    assert moved(herd, None) > moved(fair, None)
    assert moved(herd, "shape") == 0  # it is asked about each row alone
    assert moved(follower, "shape") > 0  # unless it remembers whom it was asked about


def test_one_slot_gives_the_bits_of_the_row_alone(albert: MultiExitModel) -> None:
    engine, rows = TorchEngine(albert), texts(30)
    for position, answer in engine.stream(rows, Full(), slots=1, determinism="shape"):
        alone = engine.run(rows[position][1], Full())
        assert answer.scores.equal(alone.scores[0])


def test_a_layer_whose_bits_depend_on_the_slot_is_found_and_refused() -> None:
    model = EchoModel(3)
    layer = model.backbone.layer

    def by_slot(number: int, flow: Any) -> Any:
        after = layer(number, flow)
        nudge = torch.zeros_like(after.hidden)
        nudge[:, :, 1] = 1e-9 * torch.arange(len(nudge)).unsqueeze(1)
        return after._replace(hidden=after.hidden + nudge)

    model.backbone.layer = by_slot  # type: ignore[method-assign]
    rows = [(n, echo_batch([n])) for n in range(3)]
    engine = TorchEngine(model)
    assert len(list(engine.stream(rows, Full(), slots=4))) == 3
    assert len(list(engine.stream(rows, Full(), slots=1, determinism="shape"))) == 3
    with pytest.raises(ConfigError, match="depend on its slot"):
        list(engine.stream(rows, Full(), slots=4, determinism="shape"))


# --- a predictor's stream ------------------------------------------------------------------


def test_a_predictor_streams_what_it_answers() -> None:
    items = tiny_texts(90, seed=4)
    predictor = Predictor(tiny_model(), tiny_tokenizer(), MaxProbability(threshold=0.8))
    wanted, _ = predictor.answer(items)
    found = dict(predictor.stream(iter(items)))
    assert sorted(found) == list(range(90))
    for position, answer in found.items():
        assert answer.exit_layer == wanted[position].exit_layer
        assert np.allclose(answer.scores, wanted[position].scores, atol=5e-5)
    with pytest.raises(ConfigError, match="ahead"):
        predictor.stream(items, slots=8, ahead=4)
    ordered = predictor.stream(items, Full(), ordered=True)
    assert [position for position, _ in ordered] == list(range(90))


class WithoutPool:
    """An engine that knows batches alone."""

    name, dtype = "plain", "float32"

    def __init__(self, model: MultiExitModel) -> None:
        self._engine = TorchEngine(model)
        self.all_exits = self._engine.all_exits
        self.batches: list[int] = []

    def run(self, batch: Batch, policy: Any, *how: Any) -> Any:
        self.batches.append(len(batch["input_ids"]))
        return self._engine.run(batch, policy, *how)


def test_an_engine_without_a_pool_streams_batch_by_batch() -> None:
    items, model = tiny_texts(90, seed=4), tiny_model()
    engine = WithoutPool(model)
    predictor = Predictor(model, tiny_tokenizer(), Patience(patience=1), engine=engine, max_rows=4)
    wanted, _ = Predictor(model, tiny_tokenizer(), Patience(patience=1)).answer(items)
    stream = predictor.stream(item for item in items)
    found = [next(stream)]
    assert engine.batches == [4]  # the first answers do not wait for the last
    found += stream
    assert sorted(position for position, _ in found) == list(range(90))
    assert found != sorted(found, key=lambda pair: pair[0])
    for position, answer in found:
        assert answer.exit_layer == wanted[position].exit_layer
        assert np.allclose(answer.scores, wanted[position].scores, atol=5e-5)
    endless = predictor.stream((items[number % 9] for number in count()), ordered=True)
    assert [position for position, _ in islice(endless, 200)] == list(range(200))
    for asked in ({"determinism": "shape"}, {"slots": 8}):
        with pytest.raises(ConfigError, match="for backends torch and inductor"):
            predictor.stream(items, **asked)


def test_a_predictors_answer_has_the_same_bits_in_any_company_with_determinism() -> None:
    items = tiny_texts(60, seed=4)
    predictor = Predictor(tiny_model("roberta"), tiny_tokenizer("roberta"), Patience(patience=1))
    whole = dict(predictor.stream(items, determinism="shape"))
    alone = dict(predictor.stream(items[7:8], determinism="shape"))
    assert alone[0].scores.tobytes() == whole[7].scores.tobytes()


@pytest.mark.parametrize(("backend", "slots"), [("torch", 1), ("onnx", None)])
def test_items_that_come_slowly_are_answered_once_as_many_as_asked_for_are_there(
    backend: str, slots: int | None
) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(backend, backend))
    model, texts = tiny_model("bert", layers=3), iter(tiny_texts(100))
    engine = make_engine(model, backend, progress=False)
    predictor = Predictor(model, tiny_tokenizer("bert"), Full(), engine=engine)
    assert next(predictor.stream(texts, slots=slots, ahead=2))[0] in {0, 1}
    assert len(list(texts)) >= 96


# --- lengths ------------------------------------------------------------------------------


def test_lengths_fall_into_few_buckets_that_are_hardly_longer() -> None:
    lengths = [bucket(length) for length in range(1, 513)]
    assert len(set(lengths)) < 40
    assert all(padded >= length for length, padded in enumerate(lengths, start=1))
    assert all(n < 64 or padded <= 1.125 * n for n, padded in enumerate(lengths, start=1))
    assert bucket(61, longest=62) == 62
    assert bucket(62, longest=62) == 62
    assert bucket(70, longest=62) == 70


def test_a_row_is_padded_to_the_length_asked_for() -> None:
    batch = collate({"input_ids": [[5, 6, 7]]}, pad_id=1, tokens=5)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 1]]
    assert rows_of(batch).lengths.tolist() == [3]
    assert "attention_mask" not in collate({"input_ids": [[5, 6, 7]]}, pad_id=1, tokens=3)


def test_a_row_that_is_no_number_does_not_stand_in_the_way_of_the_others() -> None:
    model = tiny_model("bert", layers=3)
    with torch.no_grad():
        model.stock.get_input_embeddings().weight[7] = torch.nan
    rows = [(n, {"input_ids": torch.full((1, 8), 7 if n == 0 else 8)}) for n in range(6)]
    found = dict(TorchEngine(model).stream(rows, Full(), slots=4, determinism="shape"))
    assert [found[n].bad for n in range(6)] == [True, *[False] * 5]


@pytest.mark.parametrize("slots", ["3", 1.5])
def test_slots_are_a_whole_number(slots: Any) -> None:
    with pytest.raises(ConfigError, match=r"slots is .* whole number"):
        TorchEngine(tiny_model()).stream([], Full(), slots=slots)
