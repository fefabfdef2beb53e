"""The command line: parse, call the public API, print."""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from offramp.cli import console
from offramp.cli.attack import attack
from offramp.cli.bench import bench
from offramp.cli.compare import compare
from offramp.cli.demo import demo
from offramp.cli.export import export
from offramp.cli.info import info
from offramp.cli.page import report
from offramp.cli.predict import predict
from offramp.cli.tables import calibrate, evaluate, record
from offramp.cli.train import attach, train
from offramp.cli.tune import tune
from offramp.errors import OfframpError

DONE, MISTAKE, STOPPED = 0, 2, 130
EXIT_CODES = (
    "Exit codes: 0 done, 1 a bug of offramp (with a traceback), 2 a mistake in what was given "
    "(with one paragraph), 3 early exit will not pay, the target is not met or runs of a "
    "comparison are left, 4 no early exit could be certified, 130 stopped with Ctrl-C."
)
# where every version of Typer has it, those that build on click and those that took it in
ClickError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="offramp",
    help="Early-exit inference for Hugging Face encoders: easy inputs are answered early.",
    epilog=EXIT_CODES,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _help(text: str) -> str:
    """A docstring with its paragraphs on one line each; indented lines stay as they are."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(p if "\n  " in p else p.replace("\n", " ") for p in paragraphs)


COMMANDS = (
    *(tune, predict, train, attach, record, calibrate, evaluate, report),
    *(export, compare, bench, attack, info, demo),
)
for command in COMMANDS:
    app.command(help=_help(command.__doc__ or ""), epilog=EXIT_CODES)(command)


def _version(wanted: bool) -> None:
    if wanted:
        from offramp import __version__

        console.say(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code; a bug is raised."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    # answers and bars are UTF-8 whatever the locale says
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        with command.make_context("offramp", given or ["--help"]) as context:
            command.invoke(context)
        console.flush()
    except typer.Exit as end:
        return int(end.exit_code)
    except ClickError as problem:
        console.fail(_usage(problem))
        return MISTAKE
    except OfframpError as problem:
        console.fail(str(problem))
        return MISTAKE
    except (KeyboardInterrupt, typer.Abort):
        print(
            "Stopped with Ctrl-C; no output is half-written. Given again, train, attach, tune, "
            "compare, and predict and attack with --output go on from where they were, by what "
            "lies beside the output; other commands start anew.",
            file=sys.stderr,
        )
        return STOPPED
    except BrokenPipeError:
        console.drop_stdout()  # the reader has seen enough
        return DONE
    return DONE


def _usage(problem: Exception) -> str:
    """What is wrong, and whose --help to read."""
    context = getattr(problem, "ctx", None)
    whose = context.command_path if context is not None else "offramp"
    message = problem.format_message().rstrip(".")  # type: ignore[attr-defined]
    return f"{message}. See: {whose} --help"
