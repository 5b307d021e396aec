"""``cm-runtime bench report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cm_runtime.errors import RequestError
from cm_runtime.errors.reasons import output_errors


def report(
    result: Annotated[Path, typer.Argument(metavar="RESULT.json", help="What cm-runtime bench run wrote.")],
    quality: Annotated[
        list[Path] | None,
        typer.Option(metavar="EVAL.json", help="A report of cm-runtime eval -o, to be shown too; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PAGE.html",
            help="The page; what is there is replaced.",
            show_default="RESULT.html, beside it",
        ),
    ] = None,
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Print a summary for a CI job's page; the page itself is made only with -o."),
    ] = False,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Put each plot there as a PNG; the folder is made.")
    ] = None,
) -> None:
    """Make one HTML page of a benchmark, with everything in it; or a summary in Markdown.

    Example: cm-runtime bench report result.json --quality report.json -o page.html
    """
    if output is not None and output.suffix not in (".html", ".htm"):
        raise RequestError(f"{output}: the name must end in .html")
    from cm_runtime.bench import results
    from cm_runtime.bench.report import quality as evals
    from cm_runtime.files import atomic

    page = None if markdown and output is None else output or result.with_suffix(".html")
    if page is not None and _is_same(page, result):
        raise RequestError(f"{page} is the result itself; name the page with -o")
    content = results.read(result)
    reports = [evals.read(path) for path in quality or ()]
    if page is not None:
        atomic.check_output(page)
    files: dict[Path, bytes] = {}
    if page is not None or plots is not None:
        from cm_runtime.bench.report import page as pages
        from cm_runtime.bench.report import style
        from cm_runtime.bench.report.plots import draw_plots

        figures = draw_plots(content, reports)
        if plots is not None:
            _folder(plots)
            files |= {plots / f"{plot.name}.png": style.png(plot.figure) for plot in figures}
        if page is not None:
            files[page] = pages.html(content, figures, reports).encode()
    for path in files:
        atomic.check_output(path)
    for path, data in files.items():
        with atomic.write(path) as temporary:
            temporary.write_bytes(data)
    if markdown:
        from cm_runtime.bench.report.markdown import summary

        typer.echo(summary(content, reports), nl=False)
    elif page is not None:
        from cm_runtime.errors.wording import quantity

        typer.echo(f"{page}: {quantity(len(content.scenarios), 'scenario')}, {quantity(len(figures), 'plot')}")


def _is_same(page: Path, result: Path) -> bool:
    try:
        return page == result or page.samefile(result)
    except (OSError, ValueError):  # one of them is not there
        return False


def _folder(path: Path) -> None:
    with output_errors(path, "made"):
        path.mkdir(exist_ok=True)
