"""Claims about lines: whoever writes them gets answers as they arrive, in their order."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_support import Said
from PIL import Image

from offramp.errors import ConfigError, DataError
from offramp.policies import MaxProbability
from offramp.prediction import Predictor, predict
from offramp.prediction.lines import predict_lines
from offramp.testing import tiny_model, tiny_processor, tiny_texts

pytest_plugins = ("cli_fixtures",)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(tiny_model(), tiny_processor("bert"), MaxProbability(threshold=0.45))


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):  # the test may have closed it
            os.close(end)


def answers(
    predictor: Predictor, pipe: tuple[int, int], written: bytes, **columns: Any
) -> list[dict[str, Any]]:
    """The answers to what was written before the writer went away."""
    os.write(pipe[1], written)
    os.close(pipe[1])
    return [entry for block in predict_lines(predictor, pipe[0], **columns) for entry in block]


def test_lines_are_answered_as_they_arrive_and_as_a_file_would_be(
    predictor: Predictor, pipe: tuple[int, int]
) -> None:
    texts = tiny_texts(5)
    blocks = predict_lines(predictor, pipe[0])
    said = []
    for some in (texts[:1], texts[1:4]):
        os.write(pipe[1], "".join(f"{text}\n" for text in some).encode())
        block = next(blocks)  # the writer has more to say
        assert len(block) == len(some)
        said += block
    os.write(pipe[1], texts[4].encode())  # a last line without an end
    os.close(pipe[1])
    said += [entry for block in blocks for entry in block]
    for ours, theirs in zip(said, predict(predictor, texts), strict=True):
        assert ours == {**theirs, "score": pytest.approx(theirs["score"], abs=1e-5)}


def test_a_line_that_comes_in_pieces_is_one_line(
    predictor: Predictor, pipe: tuple[int, int]
) -> None:
    text = "\u00e9t\u00e9 a film".encode()
    blocks = predict_lines(predictor, pipe[0])
    for piece in (b"\xef\xbb\xbf" + text[:1], text[1:], b"\r", b"\n"):
        os.write(pipe[1], piece)
    (entry,) = next(blocks)
    (same,) = predict(predictor, [text.decode()])
    assert entry == {**same, "score": pytest.approx(same["score"], abs=1e-5)}


def test_lines_may_be_json_objects_and_blank_lines_count_for_nothing(
    predictor: Predictor, pipe: tuple[int, int]
) -> None:
    rows = [{"premise": text, "hypothesis": "a film", "id": 7} for text in tiny_texts(3)]
    written = "\n\n".join(map(json.dumps, rows)).encode()
    said = answers(predictor, pipe, b"\n" + written)
    assert [entry["row"] for entry in said] == [0, 1, 2]
    pairs = [(row["premise"], row["hypothesis"]) for row in rows]
    same = [entry["label"] for entry in predict(predictor, pairs)]
    assert [entry["label"] for entry in said] == same


def test_an_option_names_the_column(predictor: Predictor, pipe: tuple[int, int]) -> None:
    (entry,) = answers(predictor, pipe, b'{"a": "film", "b": "plot"}\n', text="b")
    assert entry["label"] == next(predict(predictor, ["plot"]))["label"]


def test_lines_may_be_paths_of_images(pipe: tuple[int, int], tmp_path: Path) -> None:
    predictor = Predictor(tiny_model("vit", layers=2), tiny_processor("vit"), "full")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    (entry,) = answers(predictor, pipe, f"{tmp_path / 'red.png'}\n".encode())
    assert entry["exit_layer"] == 2


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b'{"text": "b"', "line 2 is no JSON object"),
        (b'{"text": 3}', "line 2 has no text: 3"),
        (b'{"other": "c"}', "line 2 has no text: None"),
        (b"\xff", "line 2 is not UTF-8"),
    ],
)
def test_a_bad_line_is_named_after_the_answers_to_those_before(
    bad: bytes, said: str, predictor: Predictor, pipe: tuple[int, int]
) -> None:
    os.write(pipe[1], b'{"text": "a film"}\n' + bad + b"\n")
    blocks = predict_lines(predictor, pipe[0])
    assert len(next(blocks)) == 1
    with pytest.raises(DataError, match=said):
        next(blocks)


def test_what_makes_no_sense_is_refused(predictor: Predictor, pipe: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="name columns, but the lines are no JSON"):
        answers(predictor, pipe, b"a film\n", text="body")
    with pytest.raises(DataError, match="stdin cannot be read"):
        list(predict_lines(predictor, pipe[1]))


# The command


@pytest.fixture
def started(place: Path) -> Iterator[subprocess.Popen[str]]:
    """`offramp predict MODEL -`, which has answered one line and waits for more."""
    asked = [sys.executable, "-m", "offramp", "predict", str(place / "exits"), "-"]
    process = subprocess.Popen(
        [*asked, "--point", "full"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("a dull film\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["row"] == 0
        yield process
        process.kill()


def test_each_line_gets_its_answer_while_the_writer_waits(
    started: subprocess.Popen[str],
) -> None:
    out, err = started.communicate("a bright story\n")
    assert json.loads(out)["row"] == 1
    assert (started.returncode, err) == (0, "")


def test_ctrl_c_ends_it_with_one_line(started: subprocess.Popen[str]) -> None:
    started.send_signal(signal.SIGINT)
    out, err = started.communicate()
    assert (started.returncode, out) == (130, "")
    assert err.startswith("Stopped with Ctrl-C")
    assert len(err.splitlines()) == 1


def test_a_reader_that_has_seen_enough_ends_it_without_a_word(
    started: subprocess.Popen[str],
) -> None:
    assert started.stdout is not None
    assert started.stderr is not None
    started.stdout.close()
    started.stdout = None
    _, err = started.communicate("a bright story\n")
    assert (started.returncode, err) == (0, "")


def test_answers_to_inputs_go_to_stdout_alone(
    place: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    said = offramp("predict", place / "exits", "a film", "-o", tmp_path / "a.jsonl")
    assert said.code == 2
    assert "--output is for --data" in said.err
    said = offramp("predict", place / "exits", "a film", "-o", "-", "--point", "full")
    assert json.loads(said.out)["row"] == 0
