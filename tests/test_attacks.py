"""Claims about attacks: they delay exits, they keep to their limits, and budgets hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import Said, write_csv
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import offramp as library
from offramp.attacks import ATTACKS, OBJECTIVES, AttackReport, Kept, Victim, attack, efficacy
from offramp.attacks.base import make_attacks
from offramp.attacks.characters import Characters
from offramp.attacks.embedding import AttackedEngine, Embedding
from offramp.attacks.figures import at_savings, budget_for, compare
from offramp.attacks.search import Found, TextAttack, replaced, search, side_by_side, spots
from offramp.attacks.words import Words, read_synonyms
from offramp.calibration import measure
from offramp.errors import ConfigError, DataError, OutputError, PointError
from offramp.exits import ExitOutput
from offramp.exits.halting import HaltingSpec
from offramp.policies import POLICIES, Fixed
from offramp.prediction import Predictor
from offramp.storage import read_document
from offramp.table import ExitTable, executed_cost, replay
from offramp.testing import (
    save_tiny,
    tiny_batch,
    tiny_batch_for,
    tiny_model,
    tiny_pictures,
    tiny_processor,
    tiny_texts,
    tiny_tokenizer,
)

pytest_plugins = ("cli_fixtures",)

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
TEXTS = tiny_texts(24, seed=2, longest=10)
ROWS = Dataset.from_dict({"text": TEXTS, "label": [n % 3 for n in range(len(TEXTS))]})


def victim(problem_type: str = SINGLE, arch: str = "bert", **options) -> Victim:
    model = tiny_model(arch, problem_type, **options)
    return Victim(model, tiny_processor(arch), progress=False)


def predictor(problem_type: str = SINGLE, **options) -> Predictor:
    return Predictor(tiny_model(problem_type=problem_type, **options), tiny_tokenizer(), "full")


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


# Figures


@pytest.fixture(scope="module", name="report")
def report_fixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[AttackReport, Path]:
    folder = tmp_path_factory.mktemp("attacked")
    kinds = ["embedding", "characters"]
    return attack(predictor(), ROWS, folder, kinds=kinds, eps=0.5, quiet=True), folder


def tables(folder: Path, *names: str) -> list[ExitTable]:
    return [ExitTable.open(folder / "tables" / name) for name in names]


def test_an_attack_delays_exits_on_average(report: tuple[AttackReport, Path]) -> None:
    rows = [row for row in report[0].policies if row.policy["name"] == "max_probability"]
    assert {row.attack for row in rows} == {"embedding", "characters"}
    for row in rows:
        assert row.attacked.exit_layer > row.clean.exit_layer
        assert row.attacked.efficacy < row.clean.efficacy
        assert row.attacked.cost > row.clean.cost


def test_within_a_budget_no_policy_costs_more_than_it(report: tuple[AttackReport, Path]) -> None:
    _, folder = report
    clean, noise, slips = tables(folder, "clean", "embedding", "characters")
    fitting = [
        policy
        for name in POLICIES
        for policy in POLICIES[name].variants(SINGLE, clean.depth)
        if set(policy.needs) <= set(clean.header.signals)
    ]
    assert len(fitting) > 5
    for policy in fitting:
        for depth in range(1, clean.depth + 1):
            for table in (noise, slips):
                row = compare("", clean, table, policy, depth)
                assert row.within.attacked.cost <= row.within.most * (1 + 1e-12)
                assert row.within.attacked.exit_layer <= depth
                executed, full = executed_cost(table, policy, depth)
                most = executed[:, depth - 1].sum() / full.sum()
                assert row.within.most == pytest.approx(most)


def test_the_tables_are_of_the_same_rows_and_any_policy_can_be_judged_on_them(
    report: tuple[AttackReport, Path],
) -> None:
    clean, noise, slips = tables(report[1], "clean", "embedding", "characters")
    for table in (noise, slips):
        assert np.array_equal(table.labels, clean.labels)
        assert table.header.role == "test"
        assert 0 <= measure(table, "patience").score <= 1
    assert np.array_equal(noise.ids, clean.ids)
    done = report[0].policies[0]
    assert replay(noise, at_savings(clean, [done.policy], 2.0)[0]).share == done.attacked.cost


def test_labels_do_not_choose_bars(report: tuple[AttackReport, Path]) -> None:
    (clean,) = tables(report[1], "clean")
    wrong = ExitTable(clean.header, {**clean.columns, "labels": (clean.labels + 1) % 3})
    names = ["max_probability", "entropy", "patience", "window"]
    assert at_savings(clean, names, 2.0) == at_savings(wrong, names, 2.0)
    (sure,) = at_savings(clean, ["max_probability"], 2.0)
    assert measure(clean, sure).cost == pytest.approx(0.5, abs=0.05)


def test_the_budget_is_the_least_depth_that_costs_as_much(
    report: tuple[AttackReport, Path],
) -> None:
    (clean,) = tables(report[1], "clean")
    costs = [measure(clean, Fixed(layer=layer)).cost for layer in range(1, clean.depth + 1)]
    for target in (1.1, 1.5, 2.0, 3.0, 10.0):
        depth = budget_for(clean, target)
        assert costs[depth - 1] >= 1 / target - 0.01 or depth == clean.depth
        assert depth == 1 or costs[depth - 2] < 1 / target - 0.01


def test_changed_texts_are_kept_with_what_they_did(report: tuple[AttackReport, Path]) -> None:
    lines = (report[1] / "characters.jsonl").read_text().splitlines()
    head, *rows = map(json.loads, lines)
    assert head["attack"]["name"] == "characters"
    assert [row["original"]["text"] for row in rows] == TEXTS
    changed = [row for row in rows if row["words_changed"]]
    assert changed
    for row in changed:
        assert row["attacked"] != row["original"]
        assert row["objective"][1] > row["objective"][0]
        assert 1 <= row["exit_layer"] <= 6
        assert 1 <= row["exit_layer_attacked"] <= 6


def test_the_report_is_written_and_read_again(report: tuple[AttackReport, Path]) -> None:
    done, folder = report
    assert read_document(AttackReport, folder / "attack.json") == done
    page = (folder / "attack.md").read_text()
    assert "## characters" in page
    assert page.count("max\\_probability") == 2


def test_the_same_seed_gives_the_same_report() -> None:
    options = {"kinds": ["characters"], "policies": ["margin"], "max_rows": 4, "quiet": True}
    first, again = (attack(predictor(), ROWS, seed=3, **options) for _ in range(2))
    assert first == again
    assert Characters(seed=3).candidates("good") != Characters(seed=4).candidates("good")


class Interrupting(Kept):
    """Stops after three rows."""

    def add(self, row: int, found: dict) -> None:
        super().add(row, found)
        if len(self.rows) == 3:
            raise KeyboardInterrupt


def test_a_killed_search_goes_on_with_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"kinds": ["characters"], "policies": ["margin"], "max_rows": 6, "quiet": True}
    whole = attack(predictor(), ROWS, **options)
    with monkeypatch.context() as patched:
        patched.setattr("offramp.attacks.running.Kept", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            attack(predictor(), ROWS, tmp_path, **options)
    file = tmp_path / "characters.jsonl"
    kept = file.read_text().splitlines()
    assert len(kept) == 4
    file.write_text("\n".join([*kept, '{"row": 7, "orig']))
    asked: list[int] = []
    score = Victim.score
    monkeypatch.setattr(
        Victim, "score", lambda self, items, name: (asked.append(1), score(self, items, name))[1]
    )
    assert attack(predictor(), ROWS, tmp_path, **options) == whole
    again = len(asked)
    assert attack(predictor(), ROWS, tmp_path, **options) == whole
    assert len(asked) == again > 0
    with pytest.raises(ConfigError, match="another --output"):
        attack(predictor(), ROWS, tmp_path, **{**options, "share": 0.5})


def test_pairs_are_changed_in_both_texts(tmp_path: Path) -> None:
    pairs = Dataset.from_dict({"sentence1": TEXTS[:8], "sentence2": TEXTS[8:16]})
    done = attack(predictor(), pairs, tmp_path, kinds=["characters"], share=1.0, quiet=True,
                  text="sentence1", text_pair="sentence2", policies=["margin"])  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "characters.jsonl").open()][1:]
    for name in ("text", "text_pair"):
        assert any(row["original"][name] != row["attacked"][name] for row in rows)
    assert done.metric is done.policies[0].clean.score is None


def test_images_are_attacked_by_noise_alone() -> None:
    images = Dataset.from_dict({"image": tiny_pictures(6)})
    model = Predictor(tiny_model("vit"), tiny_processor("vit"), "full")
    done = attack(model, images, policies=["margin"], quiet=True)
    assert [one.name for one in done.attacks] == ["embedding"]
    with pytest.raises(ConfigError, match="Take the attack 'embedding'"):
        attack(model, images, kinds=["characters"], quiet=True)


def test_an_attack_of_ones_own_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shouting(TextAttack):
        name = "shouting"

        def candidates(self, word: str) -> Sequence[str]:
            return (word + "!",)

    monkeypatch.setitem(ATTACKS._items, "shouting", Shouting)
    done = attack(
        predictor(), ROWS, kinds=["shouting"], max_rows=4, policies=["margin"], quiet=True
    )
    assert done.attacks[0].name == "shouting"


# Mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kinds": ["words"]}, "needs synonyms: give --synonyms"),
        ({"kinds": ["word"]}, "Did you mean 'words'"),
        ({"kinds": []}, "no attack to try"),
        ({"epsilon": 1}, "no attack|No attack"),
        ({"eps": -1.0}, "option 'eps'"),
        ({"objective": "unifrom"}, "Did you mean 'uniform'"),
        ({"target_speedup": 1.0}, "must be above 1"),
        ({"max_depth": 0}, "1 to 6"),
        ({"max_depth": 7}, "1 to 6"),
        ({"policies": []}, "no policy to attack"),
        ({"policies": ["q_exit"]}, "halt"),
        ({"metric": "pearson"}, "pearson"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attack(
            predictor(), ROWS.select(range(3)), **{"kinds": ["embedding"], **options}, quiet=True
        )


def test_regression_and_models_of_one_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match="regression model"):
        attack(predictor(REGRESSION), ROWS)
    with pytest.raises(ConfigError, match="one layer"):
        attack(predictor(layers=1), ROWS)


def test_a_point_that_is_not_there_and_a_file_in_the_way_are_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    with pytest.raises(PointError, match="fast"):
        attack(folder, ROWS.select(range(4)), kinds=["embedding"], points=["fast"], quiet=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        attack(folder, ROWS, tmp_path / "file")


def test_synonyms_for_no_word_of_the_rows_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    file.write_text('{"zebra": ["horse"]}')
    with pytest.raises(DataError, match="more synonyms"):
        attack(predictor(), ROWS, kinds=["words"], synonyms=file, quiet=True)


def test_options_reach_the_attacks_that_have_them() -> None:
    embedding, characters = make_attacks(["embedding", "characters"], {"eps": 0.3, "share": 0.5})
    assert embedding == Embedding(eps=0.3)
    assert characters == Characters(share=0.5)


# The command line


def test_the_command_says_what_was_done_and_writes_it(
    place: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    words = tmp_path / "words.json"
    words.write_text('{"good": ["fine", "great"], "the": ["that"], "film": ["play"]}')
    arguments = ["attack", place / "exits", "-d", place / "rows.csv", "--max-rows", "8",
                 "--policy", "patience", "--policy", "entropy", "--synonyms", words,
                 "--steps", "2", "-o", tmp_path / "out"]  # fmt: skip
    said = offramp(*arguments)
    assert said.code == 0, said.err
    for name in ("embedding", "characters", "words", "patience", "entropy", "efficacy"):
        assert name in said.out
    assert "sample of 8 of 160" in said.err
    document = offramp(*arguments, "--json", "--quiet").document
    assert document == json.loads((tmp_path / "out" / "attack.json").read_text())
    assert len(document["policies"]) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kind", "words"], "--synonyms FILE"),
        (["--kind", "words", "--synonyms", "none.json"], "no such file"),
        (["--text", "review"], "review"),
        (["--max-rows", "0"], "at least 1"),
        (["--point", "fast"], "fast"),
    ],
)
def test_mistakes_end_with_one_sentence(
    place: Path, offramp: Callable[..., Said], arguments: list[str], said: str
) -> None:
    done = offramp("attack", place / "exits", "-d", place / "rows.csv", "-q", *arguments)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_an_empty_file_is_an_error(
    place: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    empty = write_csv(tmp_path / "empty.csv", [])
    done = offramp("attack", place / "exits", "-d", empty)
    assert done.code == 2
    assert "no rows" in done.err


def test_it_is_exported() -> None:
    assert library.attack is attack
