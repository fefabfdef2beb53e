"""Claims about images: how they are read, and that a picture is answered like a text."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow
from safetensors.torch import load_file

from offramp.backbones import CifarResNetForImageClassification
from offramp.calibration import calibrate
from offramp.data import dataset_ids, load_examples, split_examples
from offramp.data.images import lazy_images, upright_rgb
from offramp.engines import cost_model, inputs_of, load_processor, record
from offramp.errors import ConfigError, DataError, ModelError
from offramp.exits import ExitSpec
from offramp.model import Head, MultiExitModel, load_stock
from offramp.prediction import Predictor, pipeline, predict
from offramp.prediction.items import ImageItems
from offramp.testing import (
    save_tiny,
    save_tiny_stock,
    tiny_image_processor,
    tiny_model,
    tiny_pictures,
    tiny_pixels,
    tiny_stock,
    tiny_tokenizer,
)
from offramp.training import TrainOptions, attach
from offramp.training.preparing import encoded_rows

pytest_plugins = ("cli_fixtures",)
SHARED = Path(os.environ.get("OFFRAMP_SHARED", "../shared"))


def write_pictures(folder: Path, count: int = 6, seed: int = 0) -> list[Path]:
    """Files 0.png, 1.png, ... of random pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path, picture in zip(paths, tiny_pictures(count, seed), strict=True):
        picture.save(path)
    return paths


def pixels(image: Any) -> list[Any]:
    return np.asarray(image).tolist()


# --- reading ------------------------------------------------------------------------------


def test_the_same_pictures_come_out_of_every_kind_of_source(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "pictures")
    names = [f"pictures/{path.name}" for path in paths]
    (tmp_path / "a.csv").write_text("image,label\n" + "".join(f"{n},x\n" for n in names))
    lines = [json.dumps({"file_name": name, "label": "x"}) for name in names]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    typed = Dataset.from_dict({"img": tiny_pictures(6), "label": ["x"] * 6})
    typed.to_parquet(tmp_path / "a.parquet")
    wanted = [pixels(picture) for picture in tiny_pictures(6)]
    for source in (tmp_path / "a.csv", tmp_path / "a.jsonl", tmp_path / "a.parquet", typed):
        rows = load_examples(source)
        assert [pixels(image) for image in rows["image"]] == wanted
        assert rows["label"][:] == ["x"] * 6


def test_a_folder_of_class_folders_is_a_labelled_set(tmp_path: Path) -> None:
    write_pictures(tmp_path / "cat", 2)
    write_pictures(tmp_path / "dog", 3, seed=1)
    rows = load_examples(tmp_path)
    assert rows["label"][:] == ["cat", "cat", "dog", "dog", "dog"]
    assert "label" not in load_examples(tmp_path / "cat").column_names


def test_a_folder_with_splits_wants_one_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_pictures(tmp_path / split / "cat", 2)
    with pytest.raises(DataError, match=r"splits test, train and no split.*--split"):
        load_examples(tmp_path)
    assert len(load_examples(tmp_path, split="test")) == 2


def test_an_image_is_upright_and_rgb(tmp_path: Path) -> None:
    turned = Pillow.new("L", (4, 8), 9)
    turned.putpixel((0, 0), 200)
    exif = Pillow.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    turned.save(tmp_path / "a.png", exif=exif)
    (image,) = (lazy.open() for lazy in lazy_images(load_examples(tmp_path)))
    assert (image.mode, image.size) == ("RGB", (8, 4))
    assert image.getpixel((7, 0)) == (200, 200, 200)


def test_sixteen_bits_a_pixel_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    Pillow.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    grey = upright_rgb(Pillow.open(tmp_path / "a.png"))
    assert [grey.getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]


def test_training_and_prediction_open_an_image_alike(tmp_path: Path) -> None:
    Pillow.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(tmp_path / "a.png")
    inputs, rows = inputs_of(tiny_image_processor()), load_examples(tmp_path)
    trained_on = inputs.collate({"image": inputs.encode(rows)["image"][:]})["pixel_values"]
    (answered,), _ = ImageItems(inputs).read([tmp_path / "a.png"])
    batch = inputs.collate({"image": [answered.columns["image"]]})
    assert torch.equal(batch["pixel_values"], trained_on)


def test_digits_are_built_in_and_cut_by_content() -> None:
    splits = {name: load_examples("digits", split=name) for name in ("train", "validation", "test")}
    ids = {name: set(dataset_ids(rows).tolist()) for name, rows in splits.items()}
    assert sum(map(len, splits.values())) == 1797
    assert not ids["train"] & ids["test"]
    assert not ids["train"] & ids["validation"]
    assert splits["train"].features["label"].names == [str(digit) for digit in range(10)]


def test_equal_files_stay_together_when_a_set_is_cut(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    for path in write_pictures(tmp_path / "pictures", 30):
        (tmp_path / "again" / path.name).write_bytes(path.read_bytes())
    parts = split_examples(load_examples(tmp_path), {"a": 0.5, "b": 0.5}, seed=3)
    a, b = (set(dataset_ids(part).tolist()) for part in parts.values())
    assert not a & b
    assert len(a | b) == 30


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("image\nnowhere.png\n", ["row 0 (line 2)", "nowhere.png", "no file"]),
        ("picture,photo\na.png,b.png\n", ["picture, photo", "--image COLUMN"]),
        ("number\n1\n", ["no column is known as text", "as image", "--image COLUMN"]),
    ],
)
def test_a_bad_image_column_is_one_clear_error(
    content: str, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError) as problem:
        load_examples(tmp_path / "a.csv")
    assert all(word in str(problem.value) for word in words)


def test_a_column_of_numbers_holds_no_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds int64, not images"):
        load_examples(Dataset.from_dict({"size": [1, 2]}), image="size")
    with pytest.raises(ConfigError, match=r"a text .* or an image"):
        load_examples(Dataset.from_dict({"a": ["x"], "b": ["y"]}), text="a", image="b")


@pytest.mark.parametrize("harm", [b"", b"no image", None])
def test_a_broken_image_is_named_by_its_row_before_the_work_starts(
    harm: bytes | None, tmp_path: Path
) -> None:
    paths = write_pictures(tmp_path / "pictures")
    paths[3].write_bytes(paths[3].read_bytes()[:60] if harm is None else harm)
    source = save_tiny_stock(tmp_path / "stock", "vit")
    with pytest.raises(DataError, match=r"Row 3 \(from 0\).*3\.png, is no image"):
        attach(source, tmp_path / "pictures", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- models -------------------------------------------------------------------------------


def test_a_model_that_reads_images_says_so_to_texts_and_the_other_way(tmp_path: Path) -> None:
    pictures = Dataset.from_dict({"image": tiny_pictures(3)})
    texts = Dataset.from_dict({"text": ["a", "b", "c"]})
    with pytest.raises(DataError, match=r"reads images and the rows hold texts.*--image"):
        attach(save_tiny_stock(tmp_path / "vit", "vit"), texts, tmp_path / "out")
    with pytest.raises(DataError, match=r"reads texts and the rows hold images.*--text"):
        attach(save_tiny_stock(tmp_path / "bert"), pictures, tmp_path / "out")
    with pytest.raises(ConfigError, match="A str is no processor"):
        inputs_of("bert")


def test_a_folder_without_an_image_processor_says_what_is_missing(tmp_path: Path) -> None:
    tiny_stock("vit").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no usable image processor.*save_pretrained"):
        load_processor(tmp_path, "image")


def test_pillow_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(Exception, match=r"pip install 'offramp\[images\]'"):
        load_examples("digits", split="train")


def test_a_column_called_like_one_of_images_leaves_texts_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,file_name,label\na film,a.png,x\n")
    assert load_examples(tmp_path / "a.csv")["text"][:] == ["a film"]
    both = Dataset.from_dict({"text": ["a"], "image": tiny_pictures(1)})
    with pytest.raises(DataError, match="more than one column could be the input: text, image"):
        load_examples(both)


def test_images_that_another_tool_wrote_as_bytes_and_path_are_read(tmp_path: Path) -> None:
    (path,) = write_pictures(tmp_path, 1)
    stored = {"bytes": path.read_bytes(), "path": None}
    pq.write_table(pa.table({"image": [stored]}), tmp_path / "a.parquet")
    (image,) = (lazy.open() for lazy in lazy_images(load_examples(tmp_path / "a.parquet")))
    assert pixels(image) == pixels(tiny_pictures(1)[0])
    pq.write_table(
        pa.table({"image": [stored, {"bytes": None, "path": None}]}), tmp_path / "b.parquet"
    )
    with pytest.raises(DataError, match="row 1: 'image' is an empty image"):
        load_examples(tmp_path / "b.parquet")


def test_hidden_files_are_no_rows_and_splits_are_no_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a" / "cat", 2)
    write_pictures(tmp_path / "a" / ".ipynb_checkpoints", 1)
    assert load_examples(tmp_path / "a")["label"][:] == ["cat", "cat"]
    for split in ("train", "test"):
        write_pictures(tmp_path / "b" / split, 1)
    with pytest.raises(DataError, match="splits test, train and no split"):
        load_examples(tmp_path / "b")
    with pytest.raises(
        DataError, match=r"no split 'tset'. Did you mean 'test'\? It has: test, train"
    ):
        load_examples(tmp_path / "b", split="tset")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("arch", ["vit", "cifar_resnet"])
def test_images_are_answered_in_every_dtype(arch: str, dtype: str, tmp_path: Path) -> None:
    predictor = Predictor.load(save_tiny(tmp_path / "model", arch), "full", dtype=dtype)
    answers = list(predict(predictor, tiny_pictures(5)))
    assert [answer["exit_layer"] for answer in answers] == [6] * 5


def test_another_image_processor_starts_a_run_anew(tmp_path: Path) -> None:
    source = save_tiny_stock(tmp_path / "stock", "vit")
    model = MultiExitModel.from_pretrained(source)
    rows = load_examples(Dataset.from_dict({"image": tiny_pictures(4)}))
    other = tiny_image_processor()
    other.image_mean = [0.1, 0.2, 0.3]
    made = [encoded_rows(rows, model, p, None) for p in (tiny_image_processor(), other)]
    assert made[0].fingerprint() != made[1].fingerprint()
    assert (
        made[0].fingerprint()
        == encoded_rows(rows, model, tiny_image_processor(), None).fingerprint()
    )


def test_a_new_head_on_a_convolutional_network_starts_without_bias(tmp_path: Path) -> None:
    source = save_tiny_stock(tmp_path / "stock", "cifar_resnet")
    head = Head(problem_type="single_label_classification", labels=tuple("abcdefg"))
    assert load_stock(source, head).classifier.bias.tolist() == [0.0] * 7


def test_weights_of_another_network_are_refused() -> None:
    own = tiny_stock("cifar_resnet").state_dict()
    with pytest.raises(ModelError, match="not the weights of a CIFAR ResNet"):
        CifarResNetForImageClassification.from_released(own, list("abc"))


def test_a_stream_of_pictures_is_read_one_batch_ahead(tmp_path: Path) -> None:
    taken = []

    def endless() -> Any:
        for picture in tiny_pictures(100):
            taken.append(picture)
            yield picture

    predictor = Predictor.load(save_tiny(tmp_path / "model", "vit"), "full", max_rows=4)
    next(iter(predict(predictor, endless())))
    assert len(taken) == 4


def test_pixels_of_another_shape_than_the_model_reads_are_refused() -> None:
    model = tiny_model("vit")
    for shape in ((2, 1, 8, 8), (2, 3, 16, 16)):
        with pytest.raises(DataError, match=r"\(3, 8, 8\), its image processor gives"):
            model(pixel_values=torch.zeros(shape))


def test_a_map_has_no_first_token_to_pool() -> None:
    with pytest.raises(ConfigError, match=r"'cls' makes no sense for this model.*mean"):
        tiny_model("cifar_resnet", spec=ExitSpec(pooling="cls"))


def test_exits_of_a_network_whose_width_changes_read_each_its_own_width() -> None:
    model = tiny_model("cifar_resnet")
    widths = [model.backbone.width(layer) for layer in range(1, model.depth + 1)]
    assert widths == [8, 8, 16, 16, 32, 32]
    assert [made.classifier.in_features for made in model.exits.values()] == widths[:-1]


@pytest.mark.parametrize("arch", ["vit", "cifar_resnet"])
def test_every_image_costs_the_same_and_a_layer_more_with_each_layer(arch: str) -> None:
    costs = cost_model(tiny_model(arch))
    once, twice = costs.layers([1, 77])
    assert np.allclose(once, twice)
    assert (np.diff(once) > 0).all()


@pytest.mark.parametrize("arch", ["vit", "deit", "cifar_resnet"])
def test_a_picture_is_answered_alike_however_it_is_handed_over(arch: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", arch)
    paths = write_pictures(tmp_path / "pictures", 5)
    pictures = [Pillow.open(path) for path in paths]
    rows = Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column("image", Image())
    wanted = list(predict(folder, pictures, point="full"))
    for data in (paths, [{"image": path} for path in paths], rows, tmp_path / "pictures"):
        assert list(predict(folder, data, point="full")) == wanted


def test_the_pipeline_nests_as_that_of_transformers_does(tmp_path: Path) -> None:
    classify = pipeline(save_tiny(tmp_path / "model", "vit"), "full")
    (path,) = write_pictures(tmp_path / "pictures", 1)
    one = classify(str(path))
    assert [set(said) for said in one] == [{"label", "score", "exit_layer"}] * 3  # all labels
    assert sum(said["score"] for said in one) == pytest.approx(1)
    assert [len(said) for said in classify([path, path])] == [3, 3]
    assert classify(Pillow.open(path), top_k=1) == one[:1]
    with pytest.raises(DataError, match="Not an image: '7'"):
        classify([7])


def test_replay_of_a_table_is_what_live_pictures_get(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "cifar_resnet")
    model = MultiExitModel.from_pretrained(folder)
    rows = load_examples(Dataset.from_dict({"image": tiny_pictures(60)}))
    table = record(model, rows, tmp_path / "table", "tune", processor=tiny_image_processor())
    found = calibrate(table, target_speedup=1.5)
    found.point.save(folder)
    answers = list(predict(folder, rows))
    counts = np.bincount([a["exit_layer"] for a in answers], minlength=model.depth + 1)[1:]
    assert counts.tolist() == list(found.point.exit_histogram)


def test_a_point_chosen_with_another_image_processor_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "vit")
    other = tiny_image_processor()
    other.image_mean = [0.1, 0.2, 0.3]
    same = inputs_of(load_processor(folder, "image")).fingerprint()
    assert inputs_of(tiny_image_processor()).fingerprint() == same
    assert inputs_of(other).fingerprint() != same
    assert inputs_of(tiny_tokenizer()).fingerprint() != same


def test_a_bad_picture_among_good_ones_is_named(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "pictures")
    paths[2].write_bytes(b"no image")
    predictor = Predictor.load(save_tiny(tmp_path / "model", "vit"), "full")
    with pytest.raises(DataError, match=r"Row 2 \(from 0\).*2\.png, is no image"):
        list(predict(predictor, tmp_path / "pictures"))
    with pytest.raises(DataError, match=r"nowhere\.png"):
        list(predict(predictor, ["nowhere.png"]))


def test_a_convolutional_network_is_fine_tuned_without_exits_too(tmp_path: Path) -> None:
    from offramp.training import train

    source = save_tiny_stock(tmp_path / "stock", "cifar_resnet")
    rows = Dataset.from_dict({"image": tiny_pictures(24), "label": [0, 1, 2] * 8})
    options = TrainOptions(max_steps=2, batch_size=8, quiet=True)
    train(source, rows, tmp_path / "out", method="plain", options=options)
    attach(tmp_path / "out", rows, tmp_path / "exits", options=options)
    assert (
        MultiExitModel.from_pretrained(tmp_path / "exits").config.exit_kind().pooling == "attention"
    )


def test_training_moves_the_statistics_of_batch_norms_and_saves_them(tmp_path: Path) -> None:
    from offramp.training import train

    source = save_tiny_stock(tmp_path / "stock", "cifar_resnet")
    columns = {"image": tiny_pictures(40), "label": [row % 3 for row in range(40)]}
    rows = Dataset.from_dict(
        columns, Features({"image": Image(), "label": ClassLabel(names=list("abc"))})
    )
    rows = rows.cast_column("label", Value("int64"))
    options = TrainOptions(max_steps=4, batch_size=8, quiet=True)
    model = train(source, rows, tmp_path / "out", method="pabee", options=options)
    again = MultiExitModel.from_pretrained(tmp_path / "out")
    name = "stock.resnet.blocks.0.bn1.running_mean"
    before = tiny_stock("cifar_resnet").state_dict()[name.removeprefix("stock.")]
    assert not torch.equal(model.state_dict()[name], before)
    assert torch.equal(model.state_dict()[name], again.state_dict()[name])
    counted = again.state_dict()[name.replace("running_mean", "num_batches_tracked")]
    assert counted == options.max_steps  # and not the batches that were only timed
    batch = tiny_pixels(4)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, again(**batch).logits)


# --- the command line ---------------------------------------------------------------------


def test_tune_and_predict_take_a_folder_of_pictures(
    offramp: Callable[..., Any], tmp_path: Path
) -> None:
    source = save_tiny_stock(tmp_path / "stock", "vit")
    write_pictures(tmp_path / "pictures" / "label-0", 30)
    write_pictures(tmp_path / "pictures" / "label-1", 30, seed=1)
    data, out = str(tmp_path / "pictures"), str(tmp_path / "ours")
    done = offramp("tune", source, "-d", data, "-o", out, "--target-speedup", "1.5", "--no-speed")
    assert done.code in (0, 3), done.err
    answers = tmp_path / "answers.csv"
    done = offramp("predict", out, "-d", data, "-o", str(answers))
    assert done.code == 0, done.err
    with answers.open() as file:
        assert len(list(csv.DictReader(file))) == 60
    done = offramp("predict", out, str(tmp_path / "pictures" / "label-0" / "0.png"))
    assert json.loads(done.out)["label"].startswith("label-")


# --- the real networks --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "depth", "accuracy"), [("resnet20", 9, 0.81), ("resnet56", 27, 0.83)]
)
def test_the_released_cifar_networks_are_as_right_as_their_readme_says(
    name: str, depth: int, accuracy: float
) -> None:
    weights = SHARED / "weights" / "resnet-cifar10" / f"{name}.safetensors"
    images = SHARED / "data" / "cifar10" / "test_jpeg.npz"
    for path in (weights, images):
        if not path.is_file():
            pytest.skip(f"{path} is missing; set OFFRAMP_SHARED")
    stock = CifarResNetForImageClassification.from_released(load_file(weights), list("0123456789"))
    model = MultiExitModel.from_stock(stock).eval()
    assert model.depth == depth
    data = np.load(images)
    starts = data["offsets"]
    files = [data["jpeg"][starts[n] : starts[n + 1]].tobytes() for n in range(400)]
    rows = load_examples(Dataset.from_dict({"image": files}), image="image")
    batch = inputs_of(cifar_processor()).collate({"image": rows["image"][:]})
    with torch.inference_mode():
        scores = model(**batch).logits
        assert torch.equal(scores, stock(**batch).logits)
    right = (scores.argmax(dim=1).numpy() == data["labels"][:400]).mean()
    assert right == pytest.approx(accuracy, abs=0.06)  # three standard errors of 400 rows


def cifar_processor() -> Any:
    processor = tiny_image_processor()
    processor.size = {"height": 32, "width": 32}
    processor.image_mean, processor.image_std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return processor
