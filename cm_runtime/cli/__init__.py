"""The command line: one file a command, each of which parses, calls and prints. Errors become one line here."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cm_runtime.cli.bench import app as bench
from cm_runtime.cli.doctor import doctor
from cm_runtime.cli.edit import app as edit
from cm_runtime.cli.eval import evaluate
from cm_runtime.cli.export import export
from cm_runtime.cli.info import info
from cm_runtime.cli.sample import sample
from cm_runtime.cli.train import train
from cm_runtime.cli.tune import tune
from cm_runtime.errors import CmRuntimeError, Interrupted

INTERRUPTED = 130

app = typer.Typer(
    name="cm-runtime",
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


def _version(asked: bool) -> None:
    if asked:
        from cm_runtime import __version__

        typer.echo(f"cm-runtime {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Global options; ``--debug`` is taken in any position, by `main`."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Exit status: 0 done, 1 a one-line error, 2 usage, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app([word for word in arguments if word != "--debug"])
    except Interrupted as stopped:
        from cm_runtime.training.workers import is_lead

        if is_lead():  # all workers stop at the same step
            typer.echo(str(stopped), err=True)
        sys.exit(INTERRUPTED)
    except CmRuntimeError as error:
        if "--debug" in arguments:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except MemoryError:
        if "--debug" in arguments:
            raise
        typer.echo("error: not enough memory for this; lower the micro-batch or the batch", err=True)
        sys.exit(1)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:  # typer turns Ctrl-C into this, without a word
            typer.echo("interrupted", err=True)
        raise
