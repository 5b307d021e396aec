"""``cm-runtime bench compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cm_runtime.cli import parsing
from cm_runtime.errors import one_line

STATUS = {"PASS": 0, "REGRESSION": 3, "INCONCLUSIVE": 4}


def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="A result of bench run; one of --against needs no NEW.")],
    new: Annotated[Path | None, typer.Argument(metavar="[NEW]", help="The result to judge.")] = None,
    fail_above: Annotated[
        str, typer.Option("--fail-above", metavar="PERCENT", help="How much slower a median may be.")
    ] = "5%",
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Compare results of different machines or packages.")
    ] = False,
) -> None:
    """Judge every scenario: PASS, REGRESSION or INCONCLUSIVE. Exit status: 0, 3 or 4, the worst of them.

    Example: cm-runtime bench compare base.json new.json --fail-above 5%
    """
    from cm_runtime.bench import compare as comparing
    from cm_runtime.bench import results
    from cm_runtime.bench.scenario import title
    from cm_runtime.errors.wording import quantity

    gate = parsing.share("--fail-above", fail_above)
    first = results.read(base)
    if new is None:
        verdicts = comparing.compare_builds(first, gate)
    else:
        second = results.read(new)
        verdicts = comparing.compare_runs(first, second, gate, allow_different)
        for note in comparing.model_notes(first, second):
            typer.echo(note)
    for each in verdicts:
        ratio = each.ratio
        times = "" if ratio is None else f" {ratio.value:.3f}x as long as the base"
        if ratio is not None and ratio.low is not None:
            times += f" [{ratio.low:.3f}, {ratio.high:.3f}]"
        head = f"{each.word:12} {title(each.scenario)}:"
        typer.echo(one_line(f"{head}{times}{'; ' * bool(times and each.reason)}{each.reason}"))
    worst = comparing.worst(verdicts)
    typer.echo(f"{worst}: {quantity(len(verdicts), 'scenario')}, gate at +{gate:.1%}")
    raise typer.Exit(STATUS[worst])
