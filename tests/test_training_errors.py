"""Claims about what training refuses, and that it does so before the work."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from offramp.errors import ConfigError, DataError, ModelError, NonFiniteError, OutputError
from offramp.testing import save_tiny, save_tiny_stock, tiny_stock, tiny_texts
from offramp.training import TrainOptions, attach, train
from offramp.training.work import WorkFolder, says_disk_is_full

SHORT = TrainOptions(max_steps=4, batch_size=8, quiet=True)
TEXTS = tiny_texts(24, longest=8)
LABELS = [number % 3 for number in range(24)]


def examples(label: list[Any] | None = LABELS, **columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"text": TEXTS, **({"label": label} if label else {}), **columns})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stock(tmp_path_factory.mktemp("model") / "stock")


@pytest.mark.parametrize(
    ("error", "said", "options"),
    [
        (ConfigError, "Unknown method 'pabe'. Did you mean 'pabee'", {"method": "pabe"}),
        (ConfigError, "Unknown method 'plane'. Did you mean 'plain'", {"method": "plane"}),
        (ConfigError, "Unknown pooling 'meen'. Did you mean 'mean'", {"pooling": "meen"}),
        (ConfigError, "exits of 'elbert' do not pool", {"method": "elbert", "pooling": "mean"}),
        (ConfigError, "needs a new head", {"problem_type": "regression"}),
        (ConfigError, "nonsense", {"options": TrainOptions(report_to=("nonsense",))}),
        (DataError, "no column .txet.", {"text": "txet"}),
    ],
)
def test_a_wrong_option_is_refused_by_name(
    error: type[Exception], said: str, options: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        train(source, examples(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_train_without_labels_points_to_attach(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="attach"):
        train(source, examples(None), tmp_path / "out")


def test_a_method_that_does_not_do_the_task_is_refused(tmp_path: Path) -> None:
    regression = save_tiny_stock(tmp_path / "stock", "bert", "regression")
    with pytest.raises(ConfigError, match=r"'deebert' does not do regression.*pabee"):
        train(regression, examples([0.5] * 24), tmp_path / "out", method="deebert")


@pytest.mark.parametrize("method", ["fastbert", "elbert", "pondernet", "auto", "plain"])
def test_as_released_is_refused_where_it_would_change_nothing(
    method: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"'{method}' has nothing as released"):
        train(source, examples(), tmp_path / "out", method=method, as_released=True)


def test_as_released_is_refused_where_another_pooling_is_asked_for(
    source: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"as_released": True, "pooling": "mean"}
    with pytest.raises(ConfigError, match=r"but what its exits pool, .* 'mean'\. Leave"):
        train(source, examples(), tmp_path / "out", method="pabee", **given)


@pytest.mark.parametrize("run", [train, attach])
def test_no_rows_are_refused(run: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        run(source, examples().select([]), tmp_path / "out")


@pytest.mark.parametrize("run", [train, attach])
def test_a_label_that_the_model_does_not_know_is_refused(
    run: Any, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="7"):
        run(source, examples([7, *LABELS[1:]]), tmp_path / "out")


@pytest.mark.parametrize("run", [train, attach])
def test_a_model_is_not_written_over_its_source(run: Any, source: Path) -> None:
    with pytest.raises(ConfigError, match="Give another folder"):
        run(source, examples(), source)


@pytest.mark.parametrize("run", [train, attach])
def test_a_model_is_not_written_over_another_stock_model(
    run: Any, source: Path, tmp_path: Path
) -> None:
    other = save_tiny_stock(tmp_path / "other")
    with pytest.raises(ConfigError, match="holds another model"):
        run(source, examples(), other)


@pytest.mark.parametrize("run", [train, attach])
def test_an_output_that_cannot_be_written_is_found_before_the_work(
    run: Any, source: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for output in (file, file / "below"):
        with pytest.raises(OutputError, match="file"):
            run(source, examples(), output)


def test_attach_to_an_encoder_without_a_head_is_refused(tmp_path: Path) -> None:
    tiny_stock().base_model.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ModelError, match="train"):
        attach(tmp_path / "encoder", examples(), tmp_path / "out")


@pytest.mark.parametrize("run", [train, attach])
def test_a_full_disk_is_found_before_the_work(
    run: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    with pytest.raises(OutputError, match=r"free are 0 MB"):
        run(source, examples(), tmp_path / "out", pooling="mean")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    regression = save_tiny_stock(tmp_path / "stock", "bert", "regression")
    huge = [1e30] * 24
    with pytest.raises(NonFiniteError, match=r"inf at step 1 of stage 'stock'.*learning rate"):
        train(regression, examples(huge), tmp_path / "out", pooling="mean", options=SHORT)
    assert WorkFolder(tmp_path / "out").last_checkpoint("stock") is None


def test_two_runs_do_not_train_into_one_output(source: Path, tmp_path: Path) -> None:
    with (
        WorkFolder(tmp_path / "out").alone(),
        pytest.raises(ConfigError, match=r"Another run is at work in .*out\.work"),
    ):
        attach(source, examples(), tmp_path / "out")
    attach(source, examples(), tmp_path / "out", options=TrainOptions(max_steps=1, quiet=True))
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(
    ("problem", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 0"), True),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_a_disk_that_fills_on_the_way_is_named(
    tmp_path: Path, problem: Exception, full: bool
) -> None:
    with pytest.raises(OutputError if full else RuntimeError), says_disk_is_full(tmp_path):
        raise problem


def test_points_that_will_go_are_named_before_the_work(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = save_tiny(tmp_path / "out")
    (place / "points").mkdir()
    (place / "points" / "fast.json").write_text("{}")
    attach(source, examples(), place, options=TrainOptions(max_steps=1, quiet=True))
    assert "operating points (fast). It will be replaced" in caplog.text


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("auto", {"warm_up": 2}),
        ("auto", {"thresholds": 0}),
        ("cosee", {"sharpness": -3}),
        ("romebert", {"temperature": 0}),
        ("elbert", {"learning_rate": -1}),
        ("jei_dnn", {"trade_off": -1}),
        ("gpfee", {"detached": -1}),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(
    source: Path, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        train(source, examples(), tmp_path / "out", method=method, settings=settings)
    assert not (tmp_path / "out.work").exists()
