"""Claims about attacks: what they raise, and the limits that they keep to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.attacks import OBJECTIVES, Victim, efficacy
from offramp.attacks.characters import Characters
from offramp.attacks.embedding import AttackedEngine, Embedding
from offramp.attacks.search import Found, replaced, search, side_by_side, spots
from offramp.attacks.words import Words, read_synonyms
from offramp.errors import ConfigError, DataError
from offramp.exits import ExitOutput
from offramp.exits.halting import HaltingSpec
from offramp.testing import (
    tiny_batch,
    tiny_batch_for,
    tiny_model,
    tiny_processor,
    tiny_texts,
)

SINGLE, MULTI = "single_label_classification", "multi_label_classification"
TEXTS = tiny_texts(24, seed=2, longest=10)


def victim(problem_type: str = SINGLE, arch: str = "bert", **options) -> Victim:
    model = tiny_model(arch, problem_type, **options)
    return Victim(model, tiny_processor(arch), progress=False)


def outputs(probabilities: Sequence[Sequence[float]]) -> list[ExitOutput]:
    """One row, one exit each."""
    return [ExitOutput(torch.tensor([one]).log()) for one in probabilities]


# Efficacy


def test_efficacy_is_1_if_all_leave_first_and_0_if_all_leave_last() -> None:
    assert efficacy([0.2, 0.3], [0.2, 0.3], [1.0, 1.1]) == 1
    assert efficacy([1.0, 1.1], [0.2, 0.3], [1.0, 1.1]) == 0


@given(st.lists(st.floats(0.25, 1), min_size=1, max_size=30))
def test_efficacy_is_the_area_under_the_share_that_has_left(costs: list[float]) -> None:
    grid = np.linspace(0.25, 1, 20_001)
    left = (np.array(costs)[:, None] <= grid).mean(axis=0)
    area = float(np.trapezoid(left, grid)) / 0.75
    assert efficacy(costs, 0.25, 1) == pytest.approx(area, abs=2e-4)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=20), st.data())
def test_a_row_that_leaves_later_lowers_efficacy(layers: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(layers) - 1))
    later = [*layers]
    later[place] = data.draw(st.integers(layers[place], 6))
    before, after = efficacy(layers, 1, 6), efficacy(later, 1, 6)
    assert 0 <= after <= before <= 1


# Objectives


@pytest.mark.parametrize("name", ["uniform", "even"])
def test_the_uniform_answer_is_the_best_there_is(name: str) -> None:
    def value(*probabilities: Sequence[float]) -> float:
        return OBJECTIVES[name](outputs(probabilities), SINGLE).item()

    best = value([1 / 3] * 3, [1 / 3] * 3)
    assert best > value([0.4, 0.3, 0.3], [1 / 3] * 3) > value([0.98, 0.01, 0.01], [1 / 3] * 3)
    if name == "even":
        assert best == pytest.approx(1)


def test_disagree_is_highest_where_neighbours_differ() -> None:
    def value(*probabilities: Sequence[float]) -> float:
        return OBJECTIVES["disagree"](outputs(probabilities), SINGLE).item()

    sure, other, even = [0.99, 0.01], [0.01, 0.99], [0.5, 0.5]
    assert value(sure, other, sure) > value(even, even, even) > value(sure, sure, sure)


def test_each_label_of_many_is_a_question_of_its_own() -> None:
    unsure = [ExitOutput(torch.zeros(1, 4))]
    sure = [ExitOutput(torch.tensor([[0.0, 0.0, 0.0, 9.0]]))]
    for name in ("uniform", "even"):
        assert OBJECTIVES[name](unsure, MULTI).item() > OBJECTIVES[name](sure, MULTI).item()


def test_stay_needs_exits_that_halt() -> None:
    with pytest.raises(ConfigError, match="Take 'uniform'"):
        OBJECTIVES["stay"](outputs([[0.5, 0.5]]), SINGLE)


# Noise on the embedding


@pytest.mark.parametrize(
    ("arch", "problem_type"), [("bert", SINGLE), ("albert", MULTI), ("vit", SINGLE)]
)
def test_noise_raises_its_objective_row_by_row(arch: str, problem_type: str) -> None:
    one = victim(problem_type, arch)
    batch = tiny_batch_for(one.model.stock, rows=6)
    engine = AttackedEngine(one, Embedding(eps=0.3, steps=4))
    before, after = one.model.all_exits(batch), engine.all_exits(batch)
    raised = OBJECTIVES["uniform"]
    gain = raised(after[:-1], problem_type) - raised(before[:-1], problem_type)
    assert (gain >= -1e-5).all()
    assert gain.mean() > 0.01


def test_noise_stays_within_its_box_and_off_the_padding() -> None:
    one, batch = victim(), tiny_batch(rows=5)
    engine = AttackedEngine(one, Embedding(eps=0.2, steps=3))
    with torch.no_grad():
        flow = one.model.backbone.embed(batch)
    change = engine._changed(flow)
    real = batch["attention_mask"].bool()
    for row in range(5):
        spread = flow.hidden[row][real[row]].std(unbiased=False)
        assert change[row].abs().max() <= 0.2 * spread * (1 + 1e-4)
    assert change.any()
    assert not change[~real].any()


def test_against_exits_that_halt_there_is_an_objective_of_their_own() -> None:
    one, batch = victim(spec=HaltingSpec()), tiny_batch(rows=5)
    engine = AttackedEngine(one, Embedding(objective="stay", eps=0.5, steps=4))
    halt = [
        torch.stack([output.signals["halt"] for output in found[:-1]])
        for found in (one.model.all_exits(batch), engine.all_exits(batch))
    ]
    assert halt[1].mean() < halt[0].mean()


# Searches


WORDS = st.sampled_from(["good", "Bad", "dull", "the", "PLOT", "film's", "x"])
PARTS = st.lists(st.lists(WORDS, min_size=1, max_size=9).map(" ".join), min_size=1, max_size=2)


def run(one: Iterator, score: Callable[[tuple[str, ...]], float]) -> Found:
    (found,) = side_by_side(iter([(0, one)]), lambda texts: [score(text) for text in texts])
    return found[1]


@given(PARTS.map(tuple), st.floats(0.01, 1), st.integers(0, 99))
@settings(max_examples=60)
def test_no_more_words_change_than_allowed(parts: tuple[str, ...], share: float, seed: int) -> None:
    found = run(search(parts, Characters(seed=seed).candidates, share), lambda t: len(set(str(t))))
    words = [[spot.word for spot in spots(text)] for text in (parts, found.parts)]
    assert found.changed <= max(1, int(share * len(words[0])))
    kept = sum(one == other for one, other in zip(*words, strict=False))
    if len(words[0]) == len(words[1]):
        assert len(words[0]) - kept <= found.changed
    assert found.after >= found.before


def test_without_candidates_a_text_stays_as_it_is_and_nobody_is_asked() -> None:
    found = run(search(("a film", "b"), lambda word: (), 1.0), lambda text: pytest.fail("asked"))
    assert found == Found(("a film", "b"))


def test_a_change_that_does_not_help_is_not_kept() -> None:
    found = run(
        search(("good film",), lambda word: ("zzz",), 1.0), lambda text: -text[0].count("z")
    )
    assert found.parts == ("good film",)
    assert found.changed == 0


def test_the_word_that_matters_most_goes_first_in_either_text() -> None:
    found = run(
        search(("a dull film", "so good"), lambda word: ("fine",), 0.2),
        lambda text: -text[1].count("good"),
    )
    assert found.parts == ("a dull film", "so fine")


def test_rows_that_search_together_find_what_they_find_alone() -> None:
    def score(parts: tuple[str, ...]) -> float:
        return hash(parts) % 1000

    def searches() -> Iterator:
        return iter([(n, search((text,), Characters().candidates, 0.5))
                     for n, text in enumerate(TEXTS)])  # fmt: skip

    def ask(texts: Sequence[tuple[str, ...]]) -> list[float]:
        return [score(text) for text in texts]

    alone = dict(side_by_side(searches(), ask, at_once=1))
    assert dict(side_by_side(searches(), ask, at_once=7)) == alone


@given(st.from_regex(r"[A-Za-z]{3,12}", fullmatch=True), st.integers(0, 50))
def test_slips_are_other_words_and_the_same_for_one_seed(word: str, seed: int) -> None:
    slips = Characters(seed=seed).candidates(word)
    assert slips == Characters(seed=seed).candidates(word)
    assert word not in slips
    assert len(set(slips)) == len(slips) <= 4
    assert all(abs(len(slip) - len(word)) <= 1 for slip in slips)


def test_synonyms_keep_the_case_of_the_word(tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    file.write_text('{"Good": ["fine", "good", "of note"]}')
    words = Words(synonyms=file)
    assert words.candidates("good") == ["fine", "of note"]
    assert words.candidates("Good") == ["Fine", "Of note"]
    assert words.candidates("GOOD") == ["FINE", "OF NOTE"]
    assert words.candidates("bad") == []
    parts = ("Good, good!",)
    assert replaced(parts, dict.fromkeys(spots(parts), "fine")) == ("fine, fine!",)


def test_synonyms_may_stand_in_lines(tmp_path: Path) -> None:
    file = tmp_path / "words.tsv"
    file.write_text("good\tfine\n\ngood\tnice\nbad\tpoor\n")
    assert read_synonyms(file) == {"good": ("fine", "nice"), "bad": ("poor",)}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("words.json", "[1]", "synonyms look like"),
        ("words.json", '{"a": "b"}', "synonyms look like"),
        ("words.json", "{", "not readable as JSON"),
        ("words.json", "{}", "no word with a synonym"),
        ("words.tsv", "good fine\n", "line 1: not a word, a tab and a synonym"),
        ("words.tsv", "", "no word with a synonym"),
    ],
)
def test_a_broken_file_of_synonyms_is_named(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(DataError, match=said):
        read_synonyms(file)
