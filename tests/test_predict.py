"""Claims about prediction: drop-in pipeline, streaming, files that survive a kill."""

from __future__ import annotations

import itertools
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import offramp
from offramp.calibration import OperatingPoint, calibrate
from offramp.data import encode
from offramp.engines import processor_fingerprint, record
from offramp.errors import ConfigError, DataError, ModelError, PointError
from offramp.policies import Entropy, Fixed, Full, Margin, MaxProbability, Patience, Policy
from offramp.prediction import Classifier, Predictor, pipeline, predict
from offramp.testing import (
    PROBLEM_TYPES,
    save_tiny,
    save_tiny_stock,
    tiny_model,
    tiny_texts,
    tiny_tokenizer,
)

TEXTS = tiny_texts(120, seed=3)
EARLY = MaxProbability(threshold=0.8)
# 1e-5 for scores of a trained model; tiny models are drawn wide and amplify the last bits more
BAND = 5e-5


@pytest.fixture(scope="module", name="folder")
def folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the points `default` and `fast`."""
    folder = save_tiny(tmp_path_factory.mktemp("model") / "tiny")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    dataset, _ = encode(Dataset.from_dict({"text": tiny_texts(300)}), tokenizer)
    table = record(model, dataset, folder.parent / "table", "tune", processor=tokenizer)
    for name, target in (("default", 1.3), ("fast", 3.0)):
        point = calibrate(table, target_speedup=target).point
        point.model_copy(update={"name": name}).save(folder)
    return folder


def predictor(policy: Policy = EARLY, problem_type: str = PROBLEM_TYPES[0], **options) -> Predictor:
    return Predictor(tiny_model(problem_type=problem_type), tiny_tokenizer(), policy, **options)


def predictor_that_breaks_on(word: str, policy: Policy = EARLY) -> Predictor:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        embeddings = model.stock.get_input_embeddings()
        embeddings.weight[tokenizer.convert_tokens_to_ids(word)] = torch.nan
    return Predictor(model, tokenizer, policy)


# The pipeline


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_the_pipeline_returns_what_transformers_returns_and_the_exit_layer(
    tmp_path: Path, problem_type: str
) -> None:
    ours = pipeline(save_tiny(tmp_path / "ours", problem_type=problem_type), "full", device="cpu")
    stock = save_tiny_stock(tmp_path / "stock", problem_type=problem_type)
    theirs = transformers.pipeline("text-classification", str(stock), device="cpu")
    pair = {"text": "a dull film", "text_pair": "never great"}
    for inputs in (TEXTS[0], TEXTS[:7], pair, [pair, pair]):
        for options in ({}, {"top_k": 2}, {"top_k": None}, {"top_k": 1}):
            for function in (None, "softmax", "sigmoid", "none"):
                options["function_to_apply"] = function
                same(ours(inputs, **options), theirs(inputs, **options))


def same(ours, theirs) -> None:
    """Equal nesting, labels and scores; ours also know the exit layer."""
    assert type(ours) is type(theirs)
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    else:
        assert ours["label"] == theirs["label"]
        assert ours["score"] == pytest.approx(theirs["score"], abs=BAND, rel=BAND)
        assert ours.keys() == {*theirs, "exit_layer"}
        assert ours["exit_layer"] == 6


def test_the_pipeline_leaves_early_at_its_point_or_at_that_of_the_call(folder: Path) -> None:
    classify = pipeline(folder, device="cpu")

    def mean(**options) -> float:
        return float(np.mean([said["exit_layer"] for said in classify(TEXTS, **options)]))

    assert mean(point="fast") < mean() < mean(point="full") == 6
    assert mean(point=Fixed(layer=2)) == 2
    assert classify([]) == []
    assert mean(point=OperatingPoint.load(folder, "fast")) == mean(point="fast")
    assert mean() == mean(point="default")


def test_the_pipeline_refuses_what_is_no_text_at_once(folder: Path) -> None:
    with pytest.raises(DataError, match="Not an input: None"):
        pipeline(folder, "full", device="cpu")(None)


def test_the_pipeline_takes_the_names_of_columns_for_no_texts(folder: Path) -> None:
    table = Dataset.from_dict({"text": TEXTS}).to_pandas()
    classify = pipeline(folder, "full", device="cpu")
    with pytest.raises(DataError, match=r"a DataFrame.*table\['text'\].tolist"):
        classify(table)
    assert list(classify(table["text"])) == classify(TEXTS)


def test_options_that_only_transformers_has_are_refused_with_what_there_is_instead(
    folder: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"'batch_size' here: .*max_rows and max_tokens"):
        pipeline(folder, batch_size=8)
    classify = pipeline(folder)
    with pytest.raises(ConfigError, match="'truncation' here: texts are cut at max_length"):
        classify("a film", truncation=True)
    with pytest.raises(TypeError, match="points"):
        classify("a film", points="fast")
    for labels in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match=r"top_k=.* a whole number from 1"):
            classify("a film", top_k=labels)


def test_another_process_gets_a_pipeline_of_its_own(folder: Path) -> None:
    classify = pipeline(folder, Fixed(layer=2), device="cpu", max_rows=4)
    copied = pickle.loads(pickle.dumps(classify))
    assert copied(TEXTS[:9]) == classify(TEXTS[:9])
    assert copied.predictor.max_rows == 4
    assert copied.predictor.model is not classify.predictor.model
    with pytest.raises(TypeError, match="a folder or hub id"):
        pickle.dumps(Classifier(classify.predictor))


def test_a_model_is_named(folder: Path) -> None:
    predictor = Predictor.load(folder, "full")
    with pytest.raises(ModelError, match=r"not by a MultiExitModel.*Predictor"):
        pipeline(predictor.model)  # type: ignore[arg-type]
    assert predict(Predictor(predictor.model, predictor.processor, "full"), TEXTS[:1])


def test_the_pipeline_streams_from_an_iterator_without_end(folder: Path) -> None:
    classify = pipeline(folder, device="cpu", max_rows=2)
    said = classify(TEXTS[row % 9] for row in itertools.count())
    assert [next(said)["label"] for _ in range(9)] == [s["label"] for s in classify(TEXTS[:9])]


def test_a_tuple_is_a_pair_and_not_two_texts(folder: Path) -> None:
    classify = pipeline(folder, device="cpu")
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    assert classify((TEXTS[0], TEXTS[1])) == classify(pair)


def test_a_word_that_is_no_text_is_named(folder: Path) -> None:
    classify = pipeline(folder, device="cpu")
    for wrong in ([3], [None], [["a", "b"]], [("a", "b", "c")], {"txt": "a"}, [b"a"]):
        with pytest.raises(DataError, match="Not a text"):
            list(classify(wrong))
    with pytest.raises(ConfigError, match="Did you mean 'softmax'"):
        classify("a", function_to_apply="sofmax")


def test_many_threads_with_different_policies_get_what_they_get_alone() -> None:
    shared = predictor()
    policies = [
        Full(),
        Fixed(layer=1),
        Fixed(layer=3),
        Patience(patience=1),
        Patience(patience=2),
        EARLY,
        Margin(threshold=0.5),
        Entropy(threshold=0.5),
    ]
    slices = [slice(first, first + 7) for first in range(0, 56, 7)]
    work = [(TEXTS[part], policy) for part in slices for policy in policies]
    alone = [shared.answer(*task)[0] for task in work]
    with ThreadPoolExecutor(8) as pool:
        together = [done[0] for done in pool.map(lambda task: shared.answer(*task), work)]
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.exit_layer, a.bad) == (b.exit_layer, b.bad)
            assert np.array_equal(a.scores, b.scores), "bit for bit"


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(TEXTS), min_size=1, max_size=40),
    st.integers(1, 16),
    st.integers(1, 400),
)
def test_an_answer_does_not_depend_on_the_neighbours(
    texts: list[str], max_rows: int, max_tokens: int
) -> None:
    model = SHARED.model
    batched = Predictor(model, tiny_tokenizer(), EARLY, max_rows=max_rows, max_tokens=max_tokens)
    for text, answer in zip(texts, batched.answer(texts)[0], strict=True):
        alone = ALONE[text]
        assert answer.exit_layer == alone.exit_layer
        np.testing.assert_allclose(answer.scores, alone.scores, atol=BAND)


SHARED = predictor()
ALONE = {text: SHARED.answer([text])[0][0] for text in TEXTS}


# Points


def test_a_folder_without_a_point_runs_to_full_depth_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "offramp"):
        loaded = Predictor.load(save_tiny(tmp_path / "m"), device="cpu")
    assert loaded.policy == Full()
    assert "has no operating point 'default', so every row runs to full depth" in caplog.text
    assert "Make one with `offramp calibrate`" in caplog.text


@pytest.mark.parametrize("backend", ["pipeline", "stream"])
def test_texts_that_are_cut_are_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture, backend: str
) -> None:
    classify = offramp.pipeline(folder, point="full")
    for text in ("film " * 300, "a film", "plot " * 300):
        if backend == "pipeline":
            classify(text)
        else:
            list(classify.predictor.stream([text]))
    assert caplog.text.count("are cut") == 1


def test_a_point_that_is_not_there_is_never_guessed(folder: Path) -> None:
    with pytest.raises(PointError, match=r"no operating point 'fats'\. Did you mean 'fast'"):
        pipeline(folder, "fats", device="cpu")
    with pytest.raises(PointError, match="not loaded from a folder"):
        predictor().policy_of("fast")


def test_a_point_of_another_model_is_refused(folder: Path) -> None:
    point = OperatingPoint.load(folder, "fast")
    other = Predictor(tiny_model(seed=5), tiny_tokenizer(), Full())
    with pytest.raises(PointError, match="was chosen for model"):
        other.policy_of(point)
    wrong_tokenizer = tiny_tokenizer()
    wrong_tokenizer.add_tokens(["offramp"])
    assert processor_fingerprint(wrong_tokenizer) != point.processor_fingerprint
    with pytest.raises(PointError, match="was chosen for processor"):
        Predictor(tiny_model(), wrong_tokenizer, point)


def test_a_policy_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="6 layers"):
        predictor(Fixed(layer=7))
    with pytest.raises(ConfigError, match="not for regression"):
        predictor(EARLY, "regression")


def test_another_dtype_answers_in_it_but_not_at_a_point_of_another(folder: Path) -> None:
    with pytest.raises(PointError, match=r"on torch in float32, not on torch in bfloat16.*again"):
        Predictor.load(folder, device="cpu", dtype="bf16")
    half = Predictor.load(folder, "full", device="cpu", dtype="bf16")
    answers = half.answer(TEXTS)[0]
    full = Predictor.load(folder, "full", device="cpu").answer(TEXTS)[0]
    assert half.model.dtype == torch.bfloat16
    assert {a.scores.dtype for a in answers} == {np.dtype("float32")}
    agree = [a.scores.argmax() == b.scores.argmax() for a, b in zip(answers, full, strict=True)]
    assert np.mean(agree) > 0.8


def test_devices_and_dtypes_that_are_not_there_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'fp16'"):
        Predictor.load(folder, dtype="fp61")
    for device in ("tpu9", "meta:-3", "cuda:99"):
        with pytest.raises(ConfigError, match="cannot be used"):
            Predictor.load(folder, device=device)


def test_a_stock_model_is_refused_because_its_exits_would_be_random(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="without exits"):
        Predictor.load(save_tiny_stock(tmp_path / "stock"))


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        Predictor.load(tmp_path / "m", device="cpu")


# Streaming


def test_predictions_come_in_order_with_their_row_label_and_exit_layer() -> None:
    said = list(predict(SHARED, TEXTS, scores=True))
    assert [entry["row"] for entry in said] == list(range(len(TEXTS)))
    for entry, text in zip(said, TEXTS, strict=True):
        assert entry["exit_layer"] == ALONE[text].exit_layer
        assert entry["label"] == f"label-{ALONE[text].scores.argmax()}"
        assert entry["score"] == max(entry["scores"].values())
        assert sum(entry["scores"].values()) == pytest.approx(1, abs=1e-6)
    assert len({entry["exit_layer"] for entry in said}) >= 3


def test_label_sets_and_numbers_are_said_as_such() -> None:
    (many,) = predict(predictor(Full(), "multi_label_classification"), TEXTS[:1], scores=True)
    above = {name: share for name, share in many["scores"].items() if share > 0.5}
    assert dict(zip(many["label"], many["score"], strict=True)) == above
    (number,) = predict(predictor(Full(), "regression"), TEXTS[:1], scores=True)
    assert number.keys() == {"row", "score", "exit_layer"}


def test_texts_are_read_only_a_window_ahead() -> None:
    read = []
    stream = predict(
        predictor(max_rows=2), (read.append(n) or TEXTS[n % 9] for n in itertools.count())
    )
    next(stream)
    assert len(read) <= 2 * 16


@pytest.mark.parametrize("size", [{"max_rows": 0}, {"max_rows": -3}, {"max_tokens": 0}])
def test_batches_that_hold_nothing_are_refused(folder: Path, size: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="a whole number of each, 1 or more"):
        Predictor.load(folder, **size)


def test_one_text_is_not_read_letter_by_letter(folder: Path) -> None:
    predictor = Predictor.load(folder)
    for ask in (predictor.answer, predictor.stream):
        with pytest.raises(ConfigError, match="letter by letter"):
            ask("hello")


def test_a_mistake_is_said_before_the_first_answer_is_asked_for() -> None:
    with pytest.raises(ConfigError):
        predict(SHARED, TEXTS, point=Fixed(layer=9))


def test_pairs_and_single_texts_may_share_a_stream() -> None:
    mixed = ["a film", ("a film", "the plot"), {"text": "a film", "text_pair": "the plot"}]
    single, pair, same_pair = SHARED.answer(mixed)[0]
    assert np.allclose(pair.scores, same_pair.scores, atol=BAND)
    assert not np.allclose(single.scores, pair.scores, atol=BAND)


def test_long_texts_are_cut_and_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "offramp"):
        said = list(predict(predictor(max_rows=2), ["film " * 500, *TEXTS, "plot " * 500]))
    assert len(said) == len(TEXTS) + 2
    (record,) = [r for r in caplog.records if "were cut" in r.message]
    assert "2 of 122 texts are longer than 64 tokens" in record.message


def test_a_row_with_nan_gets_its_own_error_and_its_neighbours_their_answers() -> None:
    broken = predictor_that_breaks_on("never")
    said = list(predict(broken, TEXTS))
    hit = ["never" in text.split() for text in TEXTS]
    assert 0 < sum(hit) < len(TEXTS)
    for entry, is_hit, text in zip(said, hit, TEXTS, strict=True):
        if is_hit:
            assert entry["error"].startswith("NonFiniteError")
            assert "label" not in entry
        else:
            assert entry["exit_layer"] == ALONE[text].exit_layer
            assert entry["label"] == f"label-{ALONE[text].scores.argmax()}"
    said_once = offramp.prediction.Classifier(broken)(["never", "a film"])
    assert "error" in said_once[0]
    assert "label" in said_once[1]
