"""``cm-runtime edit``: zero-shot editing, one file an edit."""

from __future__ import annotations

import typer

from cm_runtime.cli.edit.colorize import colorize
from cm_runtime.cli.edit.denoise import denoise
from cm_runtime.cli.edit.inpaint import inpaint
from cm_runtime.cli.edit.interpolate import interpolate
from cm_runtime.cli.edit.stroke import stroke
from cm_runtime.cli.edit.superres import superres

app = typer.Typer(
    help="Edit images with a consistency model, which needs no training for it. With classes, name theirs: --labels.",
    no_args_is_help=True,
)
for command in (inpaint, colorize, superres, stroke, denoise, interpolate):
    app.command()(command)
