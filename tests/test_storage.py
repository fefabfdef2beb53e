"""Files are whole or not there, and JSON of ours is strict."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import ConfigError, DataError, OfframpError, OutputError
from offramp.storage import (
    Strict,
    fingerprint,
    fingerprint_of_files,
    read_document,
    read_json,
    recover,
    whole_file,
    whole_folder,
    write_document,
    write_json,
)


class Sample(Strict):
    count: int
    share: float = 0.5


# --- JSON ---------------------------------------------------------------------------------


def test_a_document_comes_back_as_it_was(tmp_path: Path) -> None:
    write_document(tmp_path / "a.json", Sample(count=3, share=0.1))
    assert read_document(Sample, tmp_path / "a.json") == Sample(count=3, share=0.1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"count": 1, "share": NaN}', "NaN"),
        ('{"count": 1, "share": -Infinity}', "Infinity"),
        ('{"count": 1, "share": 1e999}', "1e999"),
        ('{"count": 1, "count": 2}', "twice"),
        ('{"count": 1, "shore": 2}', "Did you mean 'share'"),
        ('{"count": "many"}', "key 'count'"),
        ("{}", "key 'count'"),
        ("[]", "(document)"),
        ("{", "not readable as JSON"),
        ("", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"count": ' + "9" * 5000 + "}", "not readable as JSON"),
    ],
)
def test_a_document_that_is_not_strict_is_refused_by_name(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_document(Sample, path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_text_or_not_there_is_an_error_of_the_callers_kind(
    tmp_path: Path,
) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name in ("binary.json", "missing.json", "."):
        with pytest.raises(DataError, match=r"no such file|not readable"):
            read_json(tmp_path / name, DataError)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["count", "share", "other"]), _json) | _json)
def test_whatever_stands_in_a_file_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_text(json.dumps(data))
    with contextlib.suppress(OfframpError):
        assert isinstance(read_document(Sample, path), Sample)


def test_what_cannot_be_json_is_not_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"new": float("nan")})
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


# --- whole files and folders --------------------------------------------------------------


def test_a_file_is_replaced_only_when_its_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.txt"
    with whole_file(path) as staged:
        staged.write_text("old")
    with contextlib.suppress(KeyError), whole_file(path) as staged:
        staged.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["a.txt"]


def _write(folder: Path, text: str, **options: object) -> None:
    with whole_folder(folder, **options) as staged:  # type: ignore[arg-type]
        (staged / "a.txt").write_text(text)


def test_a_folder_is_replaced_only_when_its_block_succeeds(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    _write(folder, "old")
    with contextlib.suppress(KeyError), whole_folder(folder) as staged:
        (staged / "a.txt").write_text("half")
        raise KeyError
    assert (folder / "a.txt").read_text() == "old"
    assert os.listdir(folder.parent) == ["model"]


def test_others_are_kept_but_those_to_be_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    _write(folder, "old")
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / "stale").mkdir()
    (folder / "link").symlink_to("a.txt")
    _write(folder, "new", keep_others=True, leave_behind=("stale",))
    assert sorted(os.listdir(folder)) == ["a.txt", "link", "notes"]
    assert (folder / "notes" / "mine.txt").read_text() == "mine"
    assert (folder / "link").read_text() == "new"
    _write(folder, "bare")
    assert os.listdir(folder) == ["a.txt"]


def test_a_folder_behind_a_link_is_replaced_where_it_lies(tmp_path: Path) -> None:
    _write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    _write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_a_reader_who_mends_in_the_middle_of_a_save_does_not_break_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename, looks = tmp_path / "folder", os.rename, iter([True])
    with whole_folder(folder) as staged:
        (staged / "file").write_text("old")

    def rename_and_be_looked_at(old: Path, new: Path) -> None:
        rename(old, new)
        if next(looks, False):
            recover(folder)

    monkeypatch.setattr("offramp.storage.os.rename", rename_and_be_looked_at)
    with whole_folder(folder) as staged:
        (staged / "file").write_text("new")
    assert (folder / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_place_that_cannot_be_written_is_an_error_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file / "below", Path("/proc/offramp")):
        with pytest.raises(OutputError, match="cannot be written"):
            _write(place, "new")
        with pytest.raises(OutputError, match="cannot be written"):
            write_json(place, {})
    with pytest.raises(OutputError, match="is a file"):
        _write(file, "new")
    with pytest.raises(OutputError, match="cannot be written"):
        write_json(tmp_path, {})
    assert file.read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


def test_a_crash_between_the_two_renames_is_mended_on_the_next_look(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    _write(folder, "old")
    os.rename(folder, tmp_path / ".model.old")
    recover(folder)
    assert (folder / "a.txt").read_text() == "old"
    recover(folder)
    assert os.listdir(tmp_path) == ["model"]


# A child saves over a folder and is killed, first at each file operation in turn, then at
# random moments. Whatever is found afterwards must be one whole artefact.
_KILLER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from offramp.model import MultiExitModel
from offramp.testing import tiny_model, tiny_tokenizer

home = Path(sys.argv[1])
folder = home / "model"
models = [tiny_model(layers=2, seed=seed) for seed in (0, 1)]
names = [model.fingerprint() for model in models]
tokenizer = tiny_tokenizer()

def start():
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    models[0].save_pretrained(folder, processor=tokenizer)
    (folder / "notes.txt").write_text("mine")
    (folder / "points").mkdir()
    (folder / "points" / "old.json").write_text("{}")

def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid

def killed_at(step):
    count = 0
    def hook(event, args):
        nonlocal count
        if event == "open" or event.startswith(("os.", "shutil.")):
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
    def work():
        sys.addaudithook(hook)
        models[1].save_pretrained(folder, processor=tokenizer)
    return os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1])

def found():
    name = MultiExitModel.from_pretrained(folder).fingerprint()
    assert (folder / "notes.txt").read_text() == "mine", "the owner's file is gone"
    assert (folder / "tokenizer.json").is_file(), "the tokenizer is gone"
    points = (folder / "points").exists()
    assert points == (name == names[0]), "points and weights are a mixture"
    return names.index(name)

def sweep():
    outcomes = []
    for step in range(1, 10_000):
        start()
        code = killed_at(step)
        outcomes.append(found())
        if step % 8 == 0:
            models[1].save_pretrained(folder)
            assert found() == 1, "a save after a crash does not work"
        if code == 0:
            return outcomes

def forever():
    turn = 1
    while True:
        models[turn].save_pretrained(folder, processor=tokenizer)
        turn = 1 - turn

def random_kills(count):
    start()
    shutil.rmtree(folder / "points")
    for _ in range(count):
        pid = child(forever)
        time.sleep(random.uniform(0.0, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        name = MultiExitModel.from_pretrained(folder).fingerprint()
        assert name in names
        assert (folder / "notes.txt").read_text() == "mine"
    return count

outcomes = sweep()
print("steps", len(outcomes), "old", outcomes.count(0), "new", outcomes.count(1))
print("random", random_kills(24))
"""


def test_a_save_killed_at_any_moment_leaves_the_old_or_the_new_model(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_KILLER), str(tmp_path / "home")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    words = done.stdout.split()
    steps, old, new = int(words[1]), int(words[3]), int(words[5])
    assert steps > 20
    assert old > 5
    assert new > 1
    assert words[-2:] == ["random", "24"]


# --- fingerprints -------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=6), max_size=4), st.lists(st.binary(max_size=6), max_size=4))
def test_fingerprints_tell_parts_apart_wherever_they_are_cut(
    one: list[bytes], other: list[bytes]
) -> None:
    assert (fingerprint(*one) == fingerprint(*other)) == (one == other)


def test_a_fingerprint_of_files_is_that_of_their_content(tmp_path: Path) -> None:
    contents = [b"", b"offramp", bytes(range(256)) * 5000]  # more than a chunk
    files = [tmp_path / str(number) for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    assert fingerprint_of_files(*files) == fingerprint(*contents)


def test_a_fingerprint_takes_any_text() -> None:
    assert len(fingerprint("\ud800")) == 32
    assert fingerprint("a") == fingerprint(b"a") != fingerprint("b")
