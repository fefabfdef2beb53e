"""Claims about reports of attacks: equal savings, budgets that hold, searches that go on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from cli_support import Said, write_csv
from datasets import Dataset

import offramp as library
from offramp.attacks import ATTACKS, AttackReport, Kept, Victim, attack, running
from offramp.attacks.base import make_attacks
from offramp.attacks.characters import Characters
from offramp.attacks.embedding import Embedding
from offramp.attacks.figures import at_savings, budget_for, compare
from offramp.attacks.search import TextAttack
from offramp.calibration import measure
from offramp.errors import ConfigError, DataError, OutputError, PointError
from offramp.policies import POLICIES, Fixed, MaxProbability
from offramp.prediction import Predictor
from offramp.storage import alone_in, read_document
from offramp.table import ExitTable, executed_cost, replay
from offramp.testing import (
    save_tiny,
    tiny_model,
    tiny_pictures,
    tiny_processor,
    tiny_texts,
    tiny_tokenizer,
)

pytest_plugins = ("cli_fixtures",)

SINGLE, REGRESSION = "single_label_classification", "regression"
TEXTS = tiny_texts(24, seed=2, longest=10)
ROWS = Dataset.from_dict({"text": TEXTS, "label": [n % 3 for n in range(len(TEXTS))]})


def predictor(problem_type: str = SINGLE, **options) -> Predictor:
    return Predictor(tiny_model(problem_type=problem_type, **options), tiny_tokenizer(), "full")


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
    file.write_text(kept[0] + "\n3\n")
    with pytest.raises(ConfigError, match="no row"):
        attack(predictor(), ROWS, tmp_path, **options)


def test_words_that_the_model_cannot_see_are_not_asked_about(tmp_path: Path) -> None:
    text = "great bad film " * 400
    rows = Dataset.from_dict({"text": [text]})
    options = {"kinds": ["characters"], "policies": ["margin"], "quiet": True}
    report = attack(predictor(), rows, tmp_path, **options)
    seen = predictor().items.longest
    assert seen is not None
    assert report.attacks[0].queries <= 1 + (seen + 1) * 5
    (line,) = (tmp_path / "characters.jsonl").read_text().splitlines()[1:]
    found = json.loads(line)
    assert found["words_changed"] > 0
    assert found["attacked"]["text"].endswith(text[len(text) // 2 :])


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
        ({"target_speedup": math.inf}, "above 1"),
        ({"policies": ["q_exit"]}, "halt"),
        ({"policies": ["tempered"]}, "takes numbers from rows"),
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


def test_two_attacks_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path / "out", "Another attack"),
        pytest.raises(ConfigError, match="Another attack is at work"),
    ):
        attack(predictor(), ROWS.select(range(3)), tmp_path / "out", quiet=True)


def test_mistakes_are_found_before_any_row_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "record", lambda *_, **__: pytest.fail("rows were run"))
    named = ([], ["patince"], [{"name": "patince"}], ["all"], [MaxProbability(multi_label=True)])
    for wrong in ({"max_depth": 7}, {"metric": "acuracy"}, *({"policies": one} for one in named)):
        with pytest.raises(ConfigError):
            attack(predictor(), ROWS.select(range(3)), kinds=["embedding"], quiet=True, **wrong)


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
