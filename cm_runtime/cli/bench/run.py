"""``cm-runtime bench run``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cm_runtime.cli import parsing, progress
from cm_runtime.cli.options import Force
from cm_runtime.errors import RequestError, UnmeasuredError

if TYPE_CHECKING:
    from cm_runtime.bench.results import Result, Settings
    from cm_runtime.bench.run import Tell
    from cm_runtime.bench.scenario import Scenario


PREPARATION_S = 8.0  # about what it takes to export a model, to start a contender and to compare its images


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            help="An exported .onnx, a checkpoint, cifar32 or imagenet64.", show_default="the bundled model"
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(metavar="NAME|FILE.toml", help="Scenarios from a file.", show_default="quick")
    ] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only scenarios whose names fit, as '*single-stream 2x*'.")
    ] = None,
    kind: Annotated[
        Literal["single-stream", "offline", "server"] | None,
        typer.Option(help="In MLPerf's sense: one request after another, all at once, or arriving at random."),
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="1,2,4", help="Step counts.", show_default="2")] = None,
    batch: Annotated[str | None, typer.Option(metavar="1,64", help="Images a request.", show_default="1")] = None,
    backend: Annotated[
        str | None, typer.Option(metavar="ort,openvino,torch", help="Engines.", show_default="ort")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda:0", help="Where to run.")] = "auto",
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="fp32,tf32,bf16,fp16",
            help="Of engines and peers alike; a checkpoint is exported in it.",
            show_default="as the file",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of an engine.", show_default="one per core")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second that arrive, of --kind server.")] = None,
    bound: Annotated[
        float | None, typer.Option(metavar="MS", help="What the 99th percentile must keep to, of --kind server.")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            metavar="all|LIST", help="diffusers, torch, torch.compile, onnx (a plain export): in the same run."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="REV|FILE", help="Take turns with another build: a git revision, source tree, wheel or model file."
        ),
    ] = None,
    allow_different_images: Annotated[
        bool,
        typer.Option(
            "--allow-different-images",
            help="Time a model of --against that draws other images too; the result says by how much they differ.",
        ),
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="For each contender of a scenario.", show_default="20; quick: 2"),
    ] = None,
    interval: Annotated[
        str, typer.Option(metavar="PERCENT", help="Stop earlier once medians are known this well, plus or minus.")
    ] = "1%",
    quick: Annotated[bool, typer.Option("--quick", help="What the suite marks as quick, with small budgets.")] = False,
    seed: Annotated[int, typer.Option(help="Of noise and arrivals.")] = 0,
    output: Annotated[Path, typer.Option("-o", "--output", help="The result, as JSON.")] = Path("bench.json"),
    force: Force = False,
) -> None:
    """Measure latency and throughput, check the images, and write a result for `bench compare` and `bench report`.

    Example: cm-runtime bench run --steps 1,2 --batch 1,64 -o bench.json
    """
    import shlex
    import sys

    from cm_runtime.bench import run as running
    from cm_runtime.bench.results import Settings
    from cm_runtime.bench.scenario import BUNDLED, read_suite
    from cm_runtime.errors.wording import quantity

    if output.suffix != ".json":
        raise RequestError(f"{output}: a result's name ends in .json")
    if budget is not None and not 0 < budget <= 86400:
        raise RequestError(f"--budget takes seconds from 0 to 86400, not {budget:g}")
    if not 0 <= seed < 1 << 64:
        raise RequestError(f"seed must be from 0 to 2^64-1, not {seed}")
    if allow_different_images and against is None:
        raise RequestError("--allow-different-images is for --against, with which another model takes turns")
    choices: dict[str, Any] = {"kind": kind, "steps": steps, "batch": batch, "backend": backend, "peers": peers}
    choices |= {"rate": rate, "bound": bound, "threads": threads, "device": None if device == "auto" else device}
    choices |= {"precision": precision}
    names = [name for name, value in choices.items() if value is not None]
    left_out: list[str] = []
    if suite is None and names:
        scenarios = _scenarios(model or BUNDLED, choices)
    else:
        if suite is not None and (names or model):
            raise RequestError(f"the suite says what is run; leave out {'--' + names[0] if names else 'MODEL'}")
        source = read_suite(suite or "quick")
        if model:
            groups = tuple(group.model_copy(update={"model": model}) for group in source.group)
            source = source.model_copy(update={"group": groups})
        is_part = quick and suite is not None
        scenarios = source.scenarios(quick=is_part)
        if is_part:
            part = {each.name for each in scenarios}
            left_out = [name for each in source.scenarios() if (name := each.name) not in part]
    scenarios = _select(scenarios, scenario)
    settings = Settings(
        budget_s=(2.0 if quick else 20.0) if budget is None else budget,
        interval=parsing.share("--interval", interval),
        quick=quick,
        seed=seed,
        allow_different_images=allow_different_images,
    )
    with _progress(scenarios, settings, against) as tell:
        result = running.run(
            scenarios,
            output,
            settings,
            against=against,
            command=shlex.join(["cm-runtime", *sys.argv[1:]]),
            left_out=left_out,
            force=force,
            tell=tell,
        )
    _print(result)
    typer.echo(f"{output}: now cm-runtime bench report {output}")
    count = sum(each.status == "failed" for each in result.scenarios)
    count += sum(one.role == "base" and bool(one.reason) for each in result.scenarios for one in each.contenders)
    if count:
        raise UnmeasuredError(
            f"{count} of {quantity(len(result.scenarios), 'scenario')} could not be measured; see above"
        )


def _scenarios(model: str, options: dict[str, Any]) -> list[Scenario]:
    """The scenarios that the options spell out."""
    from pydantic import ValidationError

    from cm_runtime.bench.scenario import PEERS, Group
    from cm_runtime.files.records import explain

    is_server, peers = options["kind"] == "server", options["peers"]
    if any((options[name] is not None) != is_server for name in ("rate", "bound")):
        raise RequestError("--kind server takes --rate and --bound, and no other does")
    try:
        group = Group(
            model=model,
            kinds=(options["kind"] or "single-stream",),
            steps=tuple(parsing.whole_numbers("--steps", options["steps"] or "2")),
            batches=tuple(parsing.whole_numbers("--batch", options["batch"] or "1")),
            backends=(options["backend"] or "auto").split(","),
            devices=(options["device"] or "auto",),
            precisions=(options["precision"] or "auto").split(","),
            threads=(parsing.threads(options["threads"]),),
            rate=options["rate"],
            bound_ms=options["bound"],
            peers=PEERS if peers == "all" else peers.split(",") if peers else (),
        )
        return group.scenarios()
    except ValidationError as error:
        raise RequestError(explain(error, "scenario")) from error


def _select(scenarios: list[Scenario], globs: list[str] | None) -> list[Scenario]:
    from fnmatch import fnmatchcase

    if not globs:
        return scenarios
    for glob in globs:
        if not any(fnmatchcase(each.name, glob) for each in scenarios):
            raise RequestError(f"no scenario is called {glob!r}; there are: {', '.join(s.name for s in scenarios)}")
    return [each for each in scenarios if any(fnmatchcase(each.name, glob) for glob in globs)]


@contextmanager
def _progress(scenarios: Sequence[Scenario], settings: Settings, against: str | None) -> Iterator[Tell]:
    """Yield a function that shows (scenarios finished, activity)."""
    from cm_runtime.errors.wording import quantity

    total, where = len(scenarios), progress.place()
    contenders = sum(1 + (against is not None) + len(each.peers) for each in scenarios)
    seconds = contenders * (settings.budget_s + PREPARATION_S)
    many = quantity(contenders, "contender")
    plan = f"{many} x {settings.budget_s:g} s, about {progress.duration(seconds)}"
    if where == "terminal":
        with _bar(total) as update:
            yield update
        return
    line = progress.Line() if where == "notebook" else None
    last = 0

    def tell(count: float, activity: str) -> None:
        nonlocal last, plan
        if plan and where == "lines" and seconds > progress.LONG:  # now that nothing was refused
            progress.say(plan)
        plan = ""
        text = f"scenario {min(int(count) + 1, total)}/{total}, {activity}"
        if line is not None:
            line.show(text)
        elif int(count) > last:
            last = int(count)
            progress.phase(f"scenario {last}/{total} is done")
        else:
            progress.tick(text)

    try:
        yield tell
    finally:
        if line is not None:
            line.clear()


@contextmanager
def _bar(total: int) -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = BarColumn(bar_width=24), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn()
    text = TextColumn("{task.description}", markup=False)
    # Drawn between blocks alone: a thread that refreshes it would take its time from what is timed.
    with Progress(*columns, text, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)
        yield lambda count, activity: bar.update(task, completed=count, description=activity, refresh=True)


def _print(result: Result) -> None:
    """A line for each scenario and each contender beside it."""
    from cm_runtime.bench.report.formatting import times as shown
    from cm_runtime.bench.scenario import title

    for each in result.scenarios:
        if each.status == "failed":
            typer.echo(f"{title(each.name)}: not measured: {each.reason}")
        for one in each.contenders:
            head = title(each.name) if one.role == "subject" else f"  {one.name}"
            if one.latency is None:
                typer.echo(f"{head}: {one.status}: {one.reason}")
                continue
            p50 = one.latency.p50
            bounds = "" if p50.low is None else f" [{p50.low:.4g}, {p50.high:.4g}]"
            rate = "" if one.images_per_s is None else f", {one.images_per_s.value:.4g} images/s"
            ratio = one.time_ratio
            if one.served is not None:
                p99 = one.latency.p99
                tail = "not known" if p99 is None else f"{p99.value:.4g} ms [{p99.low:.4g}, {p99.high:.4g}]"
                rate = f", p99 {tail}: bound of {one.served.bound_ms:g} ms {'' if one.served.met else 'not '}met"
            times = "" if ratio is None else f", {shown(ratio.value)}x as long"
            if ratio is not None and ratio.low is not None and ratio.high is not None:
                times += f" [{shown(ratio.low)}, {shown(ratio.high)}]"
            if one.agreement and one.agreement.is_allowed:
                times += f"; {one.agreement.text}"
            typer.echo(f"{head}: p50 {p50.value:.4g} ms{bounds}{rate}{times}")
