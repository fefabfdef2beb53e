"""Claims about the package as a whole: import, names, versions, and the house rules."""

from __future__ import annotations

import ast
import importlib
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import offramp

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> list[Function]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, Function)]


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def body_length(function: Function) -> int:
    """Lines of a function without its docstring."""
    end = function.end_lineno or function.lineno
    start = function.lineno
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        return end - start - ((docstring.end_lineno or 0) - docstring.lineno)
    return end - start + 1


# Import and public names


def test_import_loads_no_torch() -> None:
    code = (
        "import sys, offramp\n"
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", offramp.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(offramp, name) is not None


def test_public_names_are_listed_the_same_everywhere() -> None:
    for_type_checkers = {
        alias.name: node.module
        for block in parsed(ROOT / "src/offramp/__init__.py").body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert for_type_checkers == offramp._HOME
    assert sorted([*offramp._HOME, "__version__"]) == sorted(offramp.__all__)
    assert set(offramp.__all__) <= set(dir(offramp))


def test_no_public_name_is_also_a_module_that_would_shadow_it() -> None:
    modules = {path.stem for path in (ROOT / "src/offramp").iterdir()}
    assert not modules & set(offramp.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        offramp.tarin  # noqa: B018


def test_rooms_export_only_names_that_exist() -> None:
    for init in sorted((ROOT / "src/offramp").glob("*/__init__.py")):
        room = importlib.import_module(f"offramp.{init.parent.name}")
        missing = [name for name in getattr(room, "__all__", []) if not hasattr(room, name)]
        assert not missing, f"{room.__name__}: {missing}"


# Versions


def test_the_version_is_the_same_in_the_project_and_in_the_package() -> None:
    assert PROJECT["version"] == offramp.__version__


def requirements() -> Iterator[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    yield from (Requirement(line) for group in groups for line in group)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    split = (line.split("==") for line in lines if not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in split}


def test_every_dependency_is_pinned_within_its_range() -> None:
    pinned = pins()
    outside = [str(r) for r in requirements() if pinned.get(r.name, "none") not in r.specifier]
    assert not outside
    assert pinned["torch"] == "2.13.0"


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("torch", "2.11.0"),
        ("torch", "2.13.0"),
        ("transformers", "5.17.0"),
        ("numpy", "2.5.2"),
        ("accelerate", "1.15.0"),
    ],
)
def test_the_ranges_admit_the_versions_found_on_gpu_machines(package: str, version: str) -> None:
    (requirement,) = [r for r in requirements() if r.name == package]
    assert version in requirement.specifier


def test_the_ranges_admit_python_3_11_to_3_13_and_stop_before_transformers_6() -> None:
    python = SpecifierSet(PROJECT["requires-python"])
    assert all(version in python for version in ("3.11.0", "3.12.3", "3.13.1"))
    (transformers,) = [r for r in requirements() if r.name == "transformers"]
    assert "6.0.0" not in transformers.specifier


def imported_packages() -> set[str]:
    nodes = [node for path in SOURCES for node in ast.walk(parsed(path))]
    plain = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    froms = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in plain | froms}


def test_every_imported_package_is_a_declared_dependency() -> None:
    imported_as = {"scikit-learn": "sklearn", "pillow": "PIL"}
    declared = {imported_as.get(r.name, r.name).replace("-", "_") for r in requirements()}
    with_transformers = {"huggingface_hub", "packaging", "tokenizers"}
    known = {*sys.stdlib_module_names, *declared, *with_transformers, "offramp"}
    assert not imported_packages() - known


# House rules

# R4: nothing that can run code from a file.
RUNS_CODE = re.compile(
    r"\b(pickle|joblib|cloudpickle|dill|marshal|shelve)\b"
    r"|allow_pickle\s*=\s*True|trust_remote_code\s*=\s*True"
    r"|\btorch\.load\b|(?<![\w.])(eval|exec)\((?!\))"
)


def test_nothing_in_the_package_can_run_code_from_a_file() -> None:
    hits = [
        f"{where(path, number)}: {line.strip()}"
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if RUNS_CODE.search(line)
    ]
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "x = eval(text)",
        "exec(code)",
    ],
)
def test_the_search_for_code_from_files_bites(line: str) -> None:
    assert RUNS_CODE.search(line)


@pytest.mark.parametrize(
    "line", ["model.eval()", "call eval() first", "np.load(path, allow_pickle=False)"]
)
def test_the_search_for_code_from_files_spares_what_is_safe(line: str) -> None:
    assert not RUNS_CODE.search(line)


def test_no_function_is_longer_than_80_lines_and_nine_in_ten_are_under_40() -> None:
    lengths = {
        f"{where(path, f.lineno)} {f.name}": body_length(f)
        for path in SOURCES
        for f in functions(path)
    }
    assert not {name: length for name, length in lengths.items() if length > 80}
    assert statistics.quantiles(lengths.values(), n=10)[-1] < 40
    assert statistics.median(lengths.values()) <= 12


def test_no_file_is_longer_than_500_lines() -> None:
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
    assert not {name: length for name, length in lengths.items() if length > 500}


def arguments(function: Function) -> list[ast.arg]:
    a = function.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [argument for argument in every if argument.arg not in ("self", "cls")]


def test_every_argument_is_annotated() -> None:
    bare = [
        f"{where(path, function.lineno)} {function.name}({argument.arg})"
        for path in SOURCES
        for function in functions(path)
        for argument in arguments(function)
        if argument.annotation is None
    ]
    assert not bare, "\n".join(bare)


def tracked_files() -> list[Path]:
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    return [ROOT / name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()]


# Folders of one machine, and where packages come from.
PLACES = re.compile(
    r"(?<![\w.~])/(work|root|opt|tmp|home|Users)/\w"
    r"|pypi\.org|python[h]osted|download\.pytorch|index[-]url|find[-]links"
)


def test_tracked_files_name_no_machine_path_and_no_package_index() -> None:
    hits = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        hits += [where(path, n) for n, line in enumerate(lines, 1) if PLACES.search(line)]
    assert not hits, "\n".join(hits)
