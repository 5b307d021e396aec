"""The command line: one file a command, each of which parses, calls and prints; `errors.boundary` has the errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cm_runtime.cli.bench import app as bench
from cm_runtime.cli.doctor import doctor
from cm_runtime.cli.edit import app as edit
from cm_runtime.cli.eval import evaluate
from cm_runtime.cli.export import export
from cm_runtime.cli.info import info
from cm_runtime.cli.sample import sample
from cm_runtime.cli.signals import end_on_signals
from cm_runtime.cli.train import train
from cm_runtime.cli.tune import tune
from cm_runtime.errors import one_line

ANYWHERE = ("--debug", "--quiet")  # global options that `main` takes in any position


@contextmanager
def _short_usage() -> Iterator[None]:
    """Cut the messages of usage errors, which quote what was typed."""
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str) and len(message) > len(one_line(message)):
            error.message = one_line(message)  # type: ignore[attr-defined]
        raise


class Commands(TyperGroup):
    """All commands."""

    def make_context(self, *words: Any, **more: Any) -> Any:
        with _short_usage():
            return super().make_context(*words, **more)

    def invoke(self, ctx: Any) -> Any:
        with _short_usage():
            return super().invoke(ctx)


app = typer.Typer(
    name="cm-runtime",
    cls=Commands,
    help="Consistency models: train them, export them, and draw images in one or two network evaluations.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (sample, export, train, tune, info, doctor):
    app.command()(command)
app.command("eval")(evaluate)  # eval is Python's own
app.add_typer(edit, name="edit")
app.add_typer(bench, name="bench")


def _version(is_wanted: bool) -> None:
    if is_wanted:
        from cm_runtime import __version__

        typer.echo(f"cm-runtime {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress; errors and results stay.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run graphs that cm-runtime export did not write on every engine.")
    ] = False,
    untrusted: Annotated[
        bool, typer.Option("--untrusted", help="Run the command in a process of limited memory and time, on the CPU.")
    ] = False,
    memory_limit: Annotated[
        float | None,
        typer.Option(min=0.5, help="Of --untrusted: GiB of address space.", show_default="8, or half the memory"),
    ] = None,
    time_limit: Annotated[float, typer.Option(min=1, help="Of --untrusted: seconds.")] = 600,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Global options; `main` takes those of ANYWHERE in any position."""
    if trust:
        os.environ["CM_RUNTIME_TRUST"] = "1"  # for child processes too
    if untrusted:
        from cm_runtime.cli.sandbox import run

        words = list(context.obj or ())
        words.remove("--untrusted")
        raise typer.Exit(run(words, memory_limit, time_limit))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit status: 0 done, 1 a one-line error, 2 usage, 130 interrupted, 143 terminated."""
    from cm_runtime.cli import progress
    from cm_runtime.errors import boundary

    words = sys.argv[1:] if arguments is None else arguments
    progress.begin(quiet="--quiet" in words)

    def run() -> None:
        try:
            app([word for word in words if word not in ANYWHERE], obj=words)
        except SystemExit as leaving:
            # Typer turns Ctrl-C into this, without a word. Of a child that has said so, it is another type.
            if leaving.code == boundary.INTERRUPTED and type(leaving.code) is int:
                raise KeyboardInterrupt from None
            raise

    with end_on_signals():
        boundary.guard(run, "--debug" in words)
