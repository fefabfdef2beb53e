"""Claims about broken tables: whatever was done to a file, its name is said, or it is whole."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_table import huge_header, make_table

from offramp.errors import OfframpError, TableError
from offramp.policies import Entropy
from offramp.table import ExitTable, replay


def test_a_missing_table_says_how_to_make_one(tmp_path):
    with pytest.raises(TableError, match="offramp record"):
        ExitTable.open(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["scores", "layer_cost", "exit_cost", "ids", "lengths", "labels"])
@pytest.mark.parametrize("harm", ["gone", "cut", "longer", "other type", "other shape", "pickle"])
def test_a_harmed_column_is_refused_by_its_name(tmp_path, name, harm):
    make_table().save(tmp_path / "table")
    file = tmp_path / "table" / f"{name}.npy"
    data = np.load(file)
    if harm == "gone":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "longer":
        file.write_bytes(file.read_bytes() + b"0")
    elif harm == "other type":
        np.save(file, data.view(np.uint8).view(">i4"))
    elif harm == "other shape":
        np.save(file, data[..., None])
    else:
        np.save(file, data.astype(object), allow_pickle=True)
    with pytest.raises(TableError, match=f"{name}.npy"):
        ExitTable.open(tmp_path / "table")


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 10**9},
        {"depth": 999},
        {"rows": 10**10},
        {"rows": -1},
        {"num_scores": 10**6},
        {"schema_version": 2},
        {"role": "train"},
        {"problem_type": "regression"},
        {"surprise": 1},
        {"rows": math.nan},
        {"label_names": ["one", "two"]},
        {"columns": {}},
        {"columns": {"../scores": {"dtype": "float32", "shape": [60, 12, 4]}}},
        {"columns": {"scores": {"dtype": "object", "shape": [60, 12, 4]}}},
        {"columns": {"scores": {"dtype": "float32", "shape": [10**9, 10**9, 10**9]}}},
    ],
    ids=str,
)
def test_a_header_that_claims_nonsense_is_refused_without_allocating(tmp_path, change):
    make_table().save(tmp_path / "table")
    file = tmp_path / "table" / "header.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(TableError, match=r"header\.json"):
        ExitTable.open(tmp_path / "table")


def test_a_consistent_claim_of_a_huge_table_is_refused_by_the_file_size(tmp_path):
    make_table().save(tmp_path / "table")
    claim = huge_header()
    (tmp_path / "table" / "header.json").write_text(claim.model_dump_json())
    with pytest.raises(TableError, match=r"scores\.npy"):
        ExitTable.open(tmp_path / "table")


@pytest.fixture(name="small_folder", scope="module")
def _small_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "table"
    make_table(rows=5).save(folder)
    return folder


def open_changed(folder, name: str, content: bytes) -> None:
    """Open the table with one file replaced; anything but an OfframpError is a failure."""
    original = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            replay(ExitTable.open(folder), Entropy())
    except OfframpError:
        pass
    finally:
        (folder / name).write_bytes(original)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_header_with_any_value_changed_raises_nothing_but_our_errors(small_folder, data):
    header = json.loads((small_folder / "header.json").read_text())
    place = header
    if data.draw(st.booleans()):
        place = header["columns"]
        if data.draw(st.booleans()):
            place = place[data.draw(st.sampled_from(sorted(place)))]
    key = data.draw(st.sampled_from(sorted(place)) | st.text(max_size=5))
    place[key] = data.draw(json_values)
    open_changed(small_folder, "header.json", json.dumps(header).encode())


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_file_with_any_bytes_changed_raises_nothing_but_our_errors(small_folder, data):
    name = data.draw(st.sampled_from(sorted(path.name for path in small_folder.iterdir())))
    content = bytearray((small_folder / name).read_bytes())
    at = data.draw(st.integers(0, min(200, len(content) - 1)))
    content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    open_changed(small_folder, name, bytes(content))


def test_a_crash_between_the_two_renames_of_a_save_is_mended_on_opening(tmp_path):
    make_table().save(tmp_path / "table")
    (tmp_path / "table").rename(tmp_path / ".table.old")
    assert ExitTable.open(tmp_path / "table").rows == 60
