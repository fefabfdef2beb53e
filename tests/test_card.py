"""Claims about the model card: it is true, runs, holds nothing hostile, and leaves others' text."""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from card_support import (
    MULTI,
    REGRESSION,
    SINGLE,
    card,
    choose,
    rows_of,
    shows_picture,
)
from cli_support import Said, tree
from docs_support import blocks
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from transformers import AutoModelForSequenceClassification

from offramp.calibration.listing import PICTURE
from offramp.card import README, escaped, markdown_table, part, with_front, with_part
from offramp.errors import OutputError
from offramp.model import ExitSpec, MultiExitModel
from offramp.model.card import base_model
from offramp.model.folder import save_stock
from offramp.report import write_picture
from offramp.testing import PROBLEM_TYPES, tiny_model, tiny_stock

pytest_plugins = ("card_fixtures", "cli_fixtures")

HOSTILE = (
    "a|b",
    "<script>alert(1)</script><!-- /offramp:card -->",
    "one\n\n# two\r\n---\n```\n`x` **y** [z](http://x.y) ![i](j) &amp; $$",
    "\u202ewww.x.y\x00",
)
markdown = MarkdownIt("commonmark").enable("table")


# What it says


def test_the_front_matter_tells_the_hub_what_this_is(folder: Path) -> None:
    data = card(folder).data
    assert (data.library_name, data.pipeline_tag) == ("offramp", "text-classification")
    assert data.tags == ["offramp", "early-exit", "dynamic-depth", "bert"]
    assert data.base_model is None
    assert data.metrics is None


def test_the_text_tells_architecture_depth_exits_method_and_labels(folder: Path) -> None:
    text = card(folder).text
    for said in ("6 layers", "layers 1 to 5", "mean of the tokens", "label-0, label-1, label-2"):
        assert said in text
    assert "`auto`: what held up of several papers" in text


@pytest.mark.parametrize("spec", [ExitSpec(pooling=p, hidden=p == "cls") for p in
                                  ("cls", "pooler", "mean", "attention")])  # fmt: skip
@pytest.mark.parametrize("layers", [1, 2])
def test_every_pooling_and_depth_has_words(tmp_path: Path, spec: ExitSpec, layers: int) -> None:
    tiny_model(spec=spec, layers=layers).save_pretrained(tmp_path / "m")
    text = card(tmp_path / "m").text
    assert f"| depth | {'1 layer' if layers == 1 else '2 layers'} |" in text
    assert ("dense layer" in text) == spec.hidden


@pytest.mark.parametrize("kind", PROBLEM_TYPES)
@pytest.mark.parametrize("chosen", [False, True])
def test_its_python_runs_as_it_stands(
    folder: Path, chosen: bool, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if chosen:
        choose(folder, policies=["full"])
    monkeypatch.chdir(folder)
    examples = blocks(card(folder).text, "python")
    assert len(examples) == 2
    for one in examples:
        exec(compile(one, "card", "exec"), {})


def test_its_commands_run_as_they_stand(
    folder: Path, offramp: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert offramp("predict", ".", "A dull story.").code == 0
    assert offramp("info", ".").code == 0
    text = card(folder).text
    assert '$ offramp predict . "A dull story."\n$ offramp info .\n' in text


def test_a_saved_point_is_a_row_of_the_card(folder: Path) -> None:
    assert rows_of(folder) == {}
    assert "There is none yet" in card(folder).text
    point = choose(folder).point
    row = rows_of(folder)["default"]
    assert row[0].replace("\\", "") == point.policy["name"]
    assert row[3:6] == [f"{point.rows}", "accuracy", f"{point.full_score:.4f}"]
    assert row[6:] == [
        f"{point.score:.4f}", f"{point.disagreement:.2%}", f"{point.cost_reduction:.2f}x"
    ]  # fmt: skip
    assert card(folder).data.metrics == ["accuracy"]
    assert "There is none yet" not in card(folder).text


def test_a_point_of_another_name_says_how_it_is_named(folder: Path) -> None:
    choose(folder, "fast")
    assert 'None here is called `default`, so name one, with `point="fast"`' in card(folder).text
    choose(folder)
    assert '`default` is used unless another is named, with `point="fast"`' in card(folder).text


def test_a_point_that_does_not_pay_is_said_to_be_full_depth(folder: Path) -> None:
    found = choose(folder, speed=1.5, policies=["full"])
    assert not found.pays
    assert "early exit did not pay" in card(folder).text


@pytest.mark.parametrize(
    ("kind", "metric", "on_the_hub"),
    [
        (SINGLE, None, "accuracy"),
        (SINGLE, "f1", "f1"),
        (SINGLE, "matthews", "matthews_correlation"),
        (MULTI, None, "f1"),
        (REGRESSION, None, "pearsonr"),
        (REGRESSION, "spearman", "spearmanr"),
        (REGRESSION, "neg_mse", "mse"),
        (REGRESSION, "neg_mae", "mae"),
    ],
)
def test_metrics_have_the_names_of_the_hub(
    folder: Path, kind: str, metric: str | None, on_the_hub: str
) -> None:
    choose(folder, metric=metric, policies=["full"])
    assert card(folder).data.metrics == [on_the_hub]
    assert ("is minus an error" in card(folder).text) == (metric or "").startswith("neg_")


def test_without_labels_no_score_is_claimed(folder: Path) -> None:
    choose(folder, labelled=False)
    assert card(folder).data.metrics is None
    assert rows_of(folder)["default"][4:7] == ["no labels", "", ""]


@pytest.mark.parametrize("kind", [REGRESSION])
def test_a_number_is_no_label(folder: Path, kind: str) -> None:
    assert "| labels |" not in card(folder).text
    assert "| task | text in, a number out |" in card(folder).text


def test_many_labels_are_cut(tmp_path: Path) -> None:
    tiny_model(num_labels=30, layers=2).save_pretrained(tmp_path / "m")
    assert "label-19, and 10 more" in card(tmp_path / "m").text


# Hostile text


def test_hostile_labels_and_methods_are_plain_text(tmp_path: Path) -> None:
    stock = tiny_stock(num_labels=len(HOSTILE))
    stock.config.id2label = dict(enumerate(HOSTILE))
    stock.config.label2id = {name: n for n, name in enumerate(HOSTILE)}
    model = MultiExitModel.from_stock(stock, method=HOSTILE[1])
    for _ in range(2):
        model.save_pretrained(tmp_path / "m")
        page = markdown.render(card(tmp_path / "m").text)
        assert "<script" not in page
        assert "<img" not in page
        assert page.count("<h1>") == 1
        text = html.unescape(re.sub(r"<[^>]*>", "", page))
        assert "a|b, <script>alert(1)</script><!-- /offramp:card -->, one # two --- ```" in text
    MultiExitModel.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "m")
    assert card(tmp_path / "m").data.library_name == "offramp"


def test_a_lone_surrogate_and_signs_that_turn_the_text_are_left_out() -> None:
    assert escaped("a\ud800b\u202ec\u2028d") == "a b c d"


@given(st.text(max_size=60))
def test_any_text_is_itself_in_a_cell(text: str) -> None:
    page = markdown.render(markdown_table(["x"], [[f"a{escaped(text)}b"]]))
    (cell,) = re.findall("<td>(.*?)</td>", page, re.DOTALL)
    seen = html.unescape(cell)
    assert "<" not in cell
    assert [s for s in seen if s.isalnum()] == [s for s in f"a{text}b" if s.isalnum()]
    for sign in set("|<>`*_&\\[") & set(text):
        assert seen.count(sign) == text.count(sign)


# The owner's part


def test_what_the_owner_writes_around_it_is_kept(folder: Path) -> None:
    path = folder / README
    text = path.read_text().replace("tags:\n", "license: mit\ntags:\n- mine\n")
    text = text.replace("<!-- offramp:card -->", "# My model\n\n<!-- offramp:card -->")
    path.write_text(text.replace("library_name: offramp", "library_name: other") + "\n## Thanks\n")
    MultiExitModel.from_pretrained(folder).save_pretrained(folder)
    choose(folder)
    data, text = card(folder).data, card(folder).text
    assert (data.license, data.library_name) == ("mit", "offramp")
    assert data.tags[0] == "mine"
    assert "early-exit" in data.tags
    assert text.strip().startswith("# My model\n\n<!-- offramp:card -->")
    assert text.endswith("<!-- /offramp:card -->\n\n## Thanks\n")
    assert "default" in rows_of(folder)


def test_what_the_owner_writes_inside_it_is_rewritten(folder: Path) -> None:
    before = (folder / README).read_bytes()
    (folder / README).write_text(before.decode().replace("6 layers", "7 layers"))
    MultiExitModel.from_pretrained(folder).save_pretrained(folder)
    assert (folder / README).read_bytes() == before


def test_yaml_that_cannot_be_read_stays_and_our_part_is_kept_true(folder: Path) -> None:
    yaml = "---\n[not: yaml\n---\n"
    (folder / README).write_text(f"{yaml}<!-- offramp:card --><!-- /offramp:card -->")
    MultiExitModel.from_pretrained(folder).save_pretrained(folder)
    text = (folder / README).read_text()
    assert text.startswith(yaml)
    assert "offramp predict" in text


@pytest.mark.parametrize(
    "own",
    [
        b"# Mine\n",
        b"---\nlicense: mit\n---\nMine",
        b"\xff\xfe",
        b"<!-- offramp:card -->\nno end",
    ],
)
def test_a_readme_of_somebody_else_is_never_written_over(
    folder: Path, own: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / README).write_bytes(own)
    with caplog.at_level(logging.INFO, logger="offramp"):
        MultiExitModel.from_pretrained(folder).save_pretrained(folder)
        assert "stays as it is" in caplog.text
        choose(folder)
    assert (folder / README).read_bytes() == own


def test_a_readme_that_is_a_folder_or_empty_does_no_harm(folder: Path) -> None:
    before = (folder / README).read_bytes()
    model = MultiExitModel.from_pretrained(folder)
    (folder / README).write_text("\n")
    model.save_pretrained(folder)
    assert (folder / README).read_bytes() == before
    (folder / README).unlink()
    (folder / README).mkdir()
    model.save_pretrained(folder)
    choose(folder)
    assert (folder / README).is_dir()


def test_line_ends_of_windows_stay(folder: Path) -> None:
    path = folder / README
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    before = path.read_bytes()
    MultiExitModel.from_pretrained(folder).save_pretrained(folder)
    assert path.read_bytes() == before
    choose(folder)
    assert path.read_bytes().count(b"\n") == path.read_bytes().count(b"\r\n")


def test_a_base_model_that_is_named_by_hand_stays(folder: Path) -> None:
    path = folder / README
    path.write_text(path.read_text().replace("tags:\n", "base_model: me/mine\ntags:\n"))
    MultiExitModel.from_pretrained(folder).save_pretrained(folder)
    assert card(folder).data.base_model == "me/mine"


# True after every save


def test_two_saves_of_a_model_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    before = (folder / README).read_bytes()
    model = MultiExitModel.from_pretrained(folder)
    for place in (folder, tmp_path / "elsewhere"):
        model.save_pretrained(place)
        assert (place / README).read_bytes() == before
    assert str(tmp_path).encode() not in before


def test_the_same_weights_keep_points_and_picture(folder: Path) -> None:
    write_picture(folder, choose(folder))
    before = {name: (folder / name).read_bytes() for name in (README, PICTURE)}
    MultiExitModel.from_pretrained(folder).save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_other_weights_drop_points_picture_and_rows(folder: Path) -> None:
    write_picture(folder, choose(folder))
    assert shows_picture(folder)
    tiny_model(seed=3).save_pretrained(folder)
    assert rows_of(folder) == {}
    assert card(folder).data.metrics is None
    assert not shows_picture(folder)
    assert not {"points", PICTURE} & set(tree(folder))


def test_a_stock_model_keeps_only_what_the_owner_wrote(folder: Path) -> None:
    write_picture(folder, choose(folder))
    path = folder / README
    path.write_text(path.read_text().replace("tags:\n", "license: mit\ntags:\n") + "\nMine.\n")
    save_stock(MultiExitModel.from_pretrained(folder), folder, None)
    assert card(folder).text.strip() == "Mine."
    data = card(folder).data.to_dict()
    assert data == {"license": "mit", "pipeline_tag": "text-classification", "tags": ["bert"]}
    assert PICTURE not in tree(folder)
    AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_card_that_a_crash_set_aside_is_found_again(folder: Path) -> None:
    write_picture(folder, choose(folder))
    (folder / README).write_text((folder / README).read_text() + "\nMine.\n")
    model, before = MultiExitModel.from_pretrained(folder), (folder / README).read_bytes()
    folder.rename(folder.with_name(f".{folder.name}.old"))
    model.save_pretrained(folder)
    assert (folder / README).read_bytes() == before
    assert PICTURE in tree(folder)


def test_a_broken_point_beside_it_does_not_stop_a_save(folder: Path) -> None:
    choose(folder, "broken")
    (folder / "points" / "broken.json").write_text("{}")
    choose(folder)
    assert set(rows_of(folder)) == {"default"}


def test_a_point_saved_where_there_is_no_card_makes_none(folder: Path, tmp_path: Path) -> None:
    point = choose(folder).point
    (tmp_path / "bare").mkdir()
    point.save(tmp_path / "bare")
    assert tree(tmp_path / "bare") == ["points", "points/default.json"]


def test_a_card_that_cannot_be_written_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / README).read_bytes()
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if str(target).endswith(README):
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OutputError, match="no space left"):
        choose(folder)
    assert (folder / README).read_bytes() == before
    assert not [name for name in tree(folder) if name.endswith(".part")]


def test_pushing_to_the_hub_still_saves_and_pushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        MultiExitModel, "push_to_hub", lambda self, name, **rest: pushed.append((name, rest))
    )
    tiny_model(layers=2).save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    assert pushed == [("mine", {"private": True})]
    assert card(tmp_path / "mine").data.library_name == "offramp"


# The base model


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("", None),
        ("/data/my-classifier", None),
        ("models/my-classifier", None),
        (
            "/x/hub/models--google-bert--bert-base-cased/snapshots/abc",
            "google-bert/bert-base-cased",
        ),
        ("/x/hub/models--gpt2/snapshots/abc", "gpt2"),
        ("/x/models--a--b/other/abc", None),
    ],
)
def test_a_base_model_is_a_hub_id_and_never_a_path(source: str, wanted: str | None) -> None:
    assert base_model(source) == wanted


def test_a_hub_id_that_was_downloaded_is_a_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.model.card.try_to_load_from_cache", lambda name, file: "/a/file")
    assert base_model("me/mine") == "me/mine"


# Its parts


@example("", "", "\r\n")
@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_a_part_is_found_again_and_nothing_else_changes(a: str, b: str, c: str) -> None:
    text = a + part("x", b) + c
    if "offramp:" in a + b + c:
        return
    dos = a + part("x", b).replace("\n", "\r\n") + c  # as the rest of the file, or some of it, is
    assert with_part(text, "x", b) in (text, dos)
    changed = with_part(text, "x", "new")
    assert changed is not None
    assert changed.startswith(a)
    assert changed.endswith(c)


def test_front_matter_that_says_the_same_is_not_touched() -> None:
    text = "---\nlicense: 'mit' # mine\n---\ntext"
    assert with_front(text, lambda data: None) == text
