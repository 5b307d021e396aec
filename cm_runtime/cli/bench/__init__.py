"""``cm-runtime bench``: run, compare, report."""

from __future__ import annotations

import typer

from cm_runtime.cli.bench.compare import compare
from cm_runtime.cli.bench.report import report
from cm_runtime.cli.bench.run import run

app = typer.Typer(
    help="Measure latency and throughput with their uncertainty, gate on them, and make reports.", no_args_is_help=True
)
for command in (run, compare, report):
    app.command()(command)
