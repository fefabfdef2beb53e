"""Claims about docs/: its examples run as they stand, and its reference leaves nothing out."""

from __future__ import annotations

import contextlib
import itertools
import re
import runpy
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from cli_support import Said, write_csv
from docs_support import ROOT, ROWS, blocks, commands, missing_links, names, write_rows
from transformers import AutoTokenizer

import offramp as library
from offramp.backbones import BACKBONES
from offramp.cli.main import app
from offramp.comparison.plan import Cell
from offramp.engines import record
from offramp.methods import METHODS
from offramp.metrics import METRICS
from offramp.model import MultiExitModel
from offramp.policies import POLICIES
from offramp.registry import Registry
from offramp.testing import (
    save_tiny,
    save_tiny_stock,
    tiny_processor,
    tiny_stock,
    tiny_texts,
    tiny_tokenizer,
)

pytest_plugins = ("cli_fixtures", "comparison_fixtures")

DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob("*.md"))}
WITH_PYTHON = [name for name, path in PAGES.items() if blocks(path.read_text(), "python")]
WITH_COMMANDS = [name for name, path in PAGES.items() if commands(path.read_text())]
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(autouse=True)
def registered_for_this_test_only() -> Iterator[None]:
    registries: tuple[Registry, ...] = (BACKBONES, POLICIES, METHODS, METRICS)
    before = [dict(registry._items) for registry in registries]
    yield
    for registry, items in zip(registries, before, strict=True):
        registry._items.clear()
        registry._items.update(items)


def _save_encoder(folder: str) -> None:
    """A pretrained encoder: no head yet."""
    tiny_stock().base_model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _write_pairs(name: str, seed: int) -> None:
    rows = zip(tiny_texts(ROWS, seed), tiny_texts(ROWS, seed + 50), strict=True)
    scored = [(one, other, len(one) / 40 + 0.1) for one, other in rows]
    write_csv(Path(name), scored, ("sentence1", "sentence2", "score"))


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and rows that the pages name, and what later steps find; the models are tiny."""
    folder = tmp_path_factory.mktemp("docs")
    with contextlib.chdir(folder):
        _make()
    return folder


def _make() -> None:
    save_tiny_stock("my-classifier")
    _save_encoder("my-encoder")
    tiny_stock("vit").base_model.save_pretrained("small-vit")
    tiny_processor("vit").save_pretrained("small-vit")
    write_rows("texts.csv", seed=0)
    for seed, name in enumerate(("reviews.csv", "held-out.csv", "test.csv")):
        write_rows(name, seed, itertools.cycle(f"label-{n}" for n in range(3)))
    for seed, name in enumerate(("pairs.csv", "held-out-pairs.csv", "test-pairs.csv")):
        _write_pairs(name, seed)
    save_tiny("my-digits", "vit")
    folder = save_tiny("my-offramp")
    model = MultiExitModel.from_pretrained(folder)
    rows = library.load_examples("held-out.csv")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    record(model, rows, "held-out.table", "tune", processor=tokenizer, progress=False)


@pytest.fixture
def place(made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that a page names but for what it makes itself."""
    shutil.copytree(made_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RESULTS = ("my-digits", "my-offramp", "held-out.table")
"""What commands make that come before."""
MAKES_ITS_OWN = {
    "index.md": RESULTS,
    "howto/resume.md": RESULTS,
    "concepts/exit-table.md": ("held-out.table",),
}


def _without(names: Iterable[str]) -> None:
    for name in names:
        shutil.rmtree(name)


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs_as_it_stands(
    page: str, place: Path, inline: list[Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    _without(MAKES_ITS_OWN.get(page, ()))
    example = "\n".join(blocks(PAGES[page].read_text(), "python"))
    Path("example.py").write_text(example)
    with torch.random.fork_rng():
        runpy.run_path("example.py")
    printed = capsys.readouterr().out.strip()
    assert bool(printed) == ("print(" in example)


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_the_commands_of_a_page_run_and_print_what_is_shown(
    page: str, place: Path, inline: list[Cell], offramp: Callable[..., Said]
) -> None:
    _without(RESULTS)
    _save_encoder(ENCODER)  # a folder of the name that is a hub id elsewhere
    for command, shown in commands(PAGES[page].read_text()):
        program, *arguments = shlex.split(command)
        assert program == "offramp"
        if "--max-drop" in arguments:
            # these models know nothing, so early exit pays for a generous target only
            arguments[arguments.index("--max-drop") + 1] = "30%"
        if arguments[0] == "train":
            arguments += ["--max-steps", "30", "--quiet"]
        elif arguments[0] == "compare":
            arguments += ["--max-rows", "100", "--epochs", "0.5", "--seeds", "1", "--quiet"]
        elif arguments[0] == "bench":
            arguments += ["--rows", "8", "--batch-sizes", "1,8", "--passes", "2", "--backends"]
            arguments += ["torch", "--no-memory", "--quiet"]
        elif "docstrings" in arguments:
            arguments += ["--max-rows", "200"]
        said = offramp(*arguments)
        assert said.code == 0, f"{command}: {said.err}"
        missing = names(shown) - names(said.out)
        assert not missing, f"{command}: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert missing_links(PAGES[page]) == []


def test_every_page_is_in_the_menu_or_in_the_list_of_results() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    results = PAGES["results/README.md"].read_text()
    for name in PAGES:
        listed = (
            menu if not name.startswith("results/") else menu + results.replace("(", "(results/")
        )
        assert name in listed or f"{Path(name).parent}/*" in menu, name


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(PAGES[name].read_text() for name in PAGES if name.startswith("reference/"))
    documented = set(re.findall(r"^::: \S+\.(\w+)$", pages, re.MULTILINE))
    # the errors are shown as one module
    assert set(library.__all__) - documented <= {"OfframpError", "__version__"}


def test_the_reference_has_every_command() -> None:
    page = PAGES["reference/cli.md"].read_text()
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"`offramp {command.callback.__name__}`" in page


def test_there_is_a_page_for_every_method() -> None:
    assert {path.stem for path in (DOCS / "methods").glob("*.md")} == set(METHODS)
