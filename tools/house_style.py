"""Print the house-style figures of a Python source tree and fail where a rule is broken.

    python tools/house_style.py [FOLDER]        by default src/offramp

A function's length is that of its code, from `def` to its last line without its docstring; a
function inside another counts as its own and as part of the outer one. A name is public if no part
of its path starts with an underscore.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

MEDIAN, LONG, SHARE, LONGEST = 12, 40, 0.9, 80
FILE_LINES = 500
DRAWERS = ("utils", "util", "helpers", "misc", "common")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Definition:
    """A function, class or module, and where it stands."""

    node: Function | ast.ClassDef | ast.Module
    path: Path
    name: str
    in_class: bool = False

    @property
    def where(self) -> str:
        return f"{self.path}:{getattr(self.node, 'lineno', 1)} {self.name}"

    @property
    def public(self) -> bool:
        return not any(part.startswith("_") for part in self.name.split("."))

    @property
    def lines(self) -> int:
        node = self.node
        if not isinstance(node, Function):
            raise TypeError(f"{self.where} is no function.")
        total = (node.end_lineno or node.lineno) - node.lineno + 1
        if ast.get_docstring(node, clean=False) is None:
            return total
        docstring = node.body[0]
        return total - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def definitions(path: Path) -> Iterator[Definition]:
    """The module itself, and everything that is defined in it, outermost first."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    yield Definition(module, path, path.stem if path.stem != "__init__" else path.parent.name)
    yield from _inside(module, path, "")


def _inside(parent: ast.AST, path: Path, prefix: str) -> Iterator[Definition]:
    for node in ast.iter_child_nodes(parent):
        if not isinstance(node, Function | ast.ClassDef):
            yield from _inside(node, path, prefix)
            continue
        name = f"{prefix}{node.name}"
        yield Definition(node, path, name, isinstance(parent, ast.ClassDef))
        # what a function defines inside itself is nobody else's business
        hidden = "" if isinstance(node, ast.ClassDef) else "<locals>._"
        yield from _inside(node, path, f"{name}.{hidden}")


def unannotated(definition: Definition) -> list[str]:
    """Arguments without a type, `self` and `cls` aside; and `return`."""
    node = definition.node
    if not isinstance(node, Function):
        return []
    arguments = [*node.args.posonlyargs, *node.args.args]
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    if definition.in_class and not static:
        arguments = arguments[1:]
    arguments += [*node.args.kwonlyargs]
    arguments += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
    return [a.arg for a in arguments if a.annotation is None] + ["return"] * (node.returns is None)


def exported(path: Path) -> set[str]:
    """The names in `__all__` of the room that a file is in; empty where there is none."""
    room = ast.parse((path.parent / "__init__.py").read_text(encoding="utf-8"))
    for node in room.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def needs_docstring(definition: Definition) -> bool:
    """Modules, public classes, and functions that a room exports."""
    node = definition.node
    if isinstance(node, ast.Module):
        return definition.path.name != "__main__.py"
    if isinstance(node, ast.ClassDef):
        return definition.public
    return definition.name in exported(definition.path)


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole if whole else 1:.1%})"


class Report:
    """Figures on stdout, breaches kept for the end."""

    def __init__(self) -> None:
        self.broken: list[str] = []

    def figure(self, what: str, value: object, rule: str, breaches: Iterable[str] = ()) -> None:
        """Print one line; every breach is a place and what is wrong there."""
        found = list(breaches)
        print(f"{'FAIL' if found else 'ok':<6}{what:<38}{value!s:<24}{rule}")
        self.broken += found


def lengths(report: Report, functions: list[Definition]) -> None:
    """Median, share below LONG and maximum of the lengths of functions."""
    sizes = [f.lines for f in functions]
    middle = int(median(sizes))
    short = _share(sum(size < LONG for size in sizes), len(sizes))
    enough = sum(size < LONG for size in sizes) >= SHARE * len(sizes)
    report.figure(
        "median function, lines", middle, f"at most {MEDIAN}",
        [f"The median function has {middle} lines."] if middle > MEDIAN else [],
    )  # fmt: skip
    report.figure(
        f"functions under {LONG} lines", short, f"at least {SHARE:.0%}",
        [] if enough else [f"Only {short} of the functions have fewer than {LONG} lines."],
    )  # fmt: skip
    report.figure(
        "longest function, lines", max(sizes), f"at most {LONGEST}",
        [f"{f.where}: {f.lines} lines" for f in functions if f.lines > LONGEST],
    )  # fmt: skip


def files(report: Report, paths: list[Path]) -> None:
    """Lengths of files, and folders that would become drawers."""
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    report.figure(
        "longest file, lines", max(sizes.values()), f"at most {FILE_LINES}",
        [f"{path}: {size} lines" for path, size in sizes.items() if size > FILE_LINES],
    )  # fmt: skip
    drawers = [path for path in paths if {*path.parts, path.stem} & set(DRAWERS)]
    report.figure(
        "drawers", len(drawers), f"none of {', '.join(DRAWERS)}",
        [f"{path}: name it after what it is for" for path in drawers],
    )  # fmt: skip


def signatures(report: Report, functions: list[Definition]) -> None:
    """Annotations of all functions that have a name of their own."""
    named = [f for f in functions if "<locals>" not in f.name]
    missing = {f: names for f in named if (names := unannotated(f))}
    report.figure(
        "functions annotated in full", _share(len(named) - len(missing), len(named)), "all",
        [f"{f.where}: no type for {', '.join(names)}" for f, names in missing.items()],
    )  # fmt: skip


def docstrings(report: Report, all_of_it: list[Definition]) -> None:
    """Docstrings of modules, public classes and exported functions."""
    wanted = [d for d in all_of_it if needs_docstring(d)]
    missing = [d for d in wanted if ast.get_docstring(d.node) is None]
    report.figure(
        "public names with a docstring", _share(len(wanted) - len(missing), len(wanted)), "all",
        [f"{d.where}: no docstring" for d in missing],
    )  # fmt: skip


def main(folder: str = "src/offramp") -> int:
    """Print the figures; 1 if a rule is broken."""
    paths = sorted(Path(folder).rglob("*.py"))
    if not paths:
        print(f"No Python files in '{folder}'. Give the folder of a package.", file=sys.stderr)
        return 2
    everything = [d for path in paths for d in definitions(path)]
    functions = [d for d in everything if isinstance(d.node, Function)]
    report = Report()
    print(f"House style of {folder}: {len(paths)} files, {len(functions)} functions")
    lengths(report, functions)
    files(report, paths)
    signatures(report, functions)
    docstrings(report, everything)
    for breach in report.broken:
        print(breach, file=sys.stderr)
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
