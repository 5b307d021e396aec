"""The plots of a result, one function each; a plot that would show nothing is None. Needs matplotlib."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from cm_runtime.bench.report import bar_charts, style
from cm_runtime.bench.report.bar_charts import Bar
from cm_runtime.bench.report.formatting import DASH, clean, digits, interval, share, times
from cm_runtime.bench.report.grouping import Setup, brief, rivals, setups, subject
from cm_runtime.bench.report.quality import Quality
from cm_runtime.bench.report.style import COLOURS, Plot, Series, drawable, style_context
from cm_runtime.bench.results import Contender, Estimate, Result, ScenarioResult
from cm_runtime.errors.wording import quantity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Line = Literal["steps", "batch"]
_MOST_LINES = 7
MOST_SETUPS = 12


def draw_plots(result: Result, quality: Sequence[Quality] = ()) -> list[Plot]:
    """Draw all plots that have something to show, a set for each of the first setups.

    Raises MissingExtraError without matplotlib.
    """
    places = setups(result)
    left_out = len(places) - MOST_SETUPS
    places = places[:MOST_SETUPS]
    plots: list[Plot] = []
    with style_context():
        for place in places:
            candidates = [
                latency(place, "batch"),
                latency(place, "steps"),
                throughput(place, "batch"),
                throughput(place, "steps"),
                speed_ups(place),
                outside_network(place),
                arithmetic(place, result),
                server(place),
            ]
            suffix = "" if len(places) == 1 else "-" + _slug(place.name)
            plots += [_rename(plot, suffix, plots) for plot in candidates if plot is not None]
        if left_out > 0 and plots:
            note = f" Plots are of the first {MOST_SETUPS} setups; the tables have the other {left_out} too."
            plots[0] = replace(plots[0], caption=plots[0].caption + note)
        for yardstick in dict.fromkeys(each.yardstick for each in quality):
            plot = distance(result, [each for each in quality if each.yardstick == yardstick])
            if plot is not None:
                plots.append(_rename(plot, "", plots))
    return plots


def latency(place: Setup, over: Line) -> Plot | None:
    """Median latency of single-stream scenarios with its interval, and the 95th percentile, dashed."""
    lines = _series(place, over, "single-stream", lambda side: side.latency.p50 if side.latency else None)
    tails = _series(place, over, "single-stream", lambda side: side.latency.p95 if side.latency else None)
    p95 = {each.label: each.points for each in tails}
    series: list[Series] = []
    for each in lines:
        series.append(each)
        if each.label in p95:
            series.append(replace(each, points=p95[each.label], kind="tail"))
    figure = style.lines(f"Latency by {over}, {place.name}", _axis(over), "ms a request", series)
    dashed = ", dashed: the 95th percentile." if len(series) > len(lines) else "."
    caption = "Median and its 95% interval" + dashed + _cut(place, over)
    return _plot(f"latency-by-{over}", figure, f"Latency by {over}, {place.name}, in ms", series, caption)


def throughput(place: Setup, over: Line) -> Plot | None:
    """Images a second of single-stream and offline scenarios."""
    series = _series(place, over, "single-stream", lambda side: side.images_per_s)
    for each in _series(place, over, "offline", lambda side: side.images_per_s):
        series.append(Series(f"{each.label}, offline", each.points, len(series)))
    figure = style.lines(f"Throughput by {over}, {place.name}", _axis(over), "images/s", series)
    caption = "Images a second, with its 95% interval." + _cut(place, over)
    return _plot(f"throughput-by-{over}", figure, f"Images a second by {over}, {place.name}", series, caption)


def speed_ups(place: Setup) -> Plot | None:
    """The time of the base and of each peer over cm-runtime's."""
    bars: list[Bar] = []
    names = list(dict.fromkeys(side.name for each in place.scenarios for side in rivals(each)))
    for scenario in filter(subject, place.scenarios):
        rows = [
            Bar(
                side.name,
                side.time_ratio,
                f"{times(side.time_ratio.value)}x",
                COLOURS[names.index(side.name) % len(COLOURS)],
            )
            for side in rivals(scenario)
            if side.time_ratio and drawable(side.time_ratio.value)
        ]
        if rows and len(bars) <= bar_charts.MOST:
            bars += [Bar(brief(scenario)), *rows]
    if not bars:
        return None
    figure = bar_charts.ratios(
        f"Time of others over cm-runtime's, {place.name}", "times as long (above 1: slower)", bars
    )
    caption = "How many times as long the others take for the same images, paired by round, with 95% intervals."
    return Plot("speed-ups", figure, _describe_bars(f"Time over cm-runtime's, {place.name}", bars), caption)


def outside_network(place: Setup) -> Plot | None:
    """The share of the time not spent in network evaluations."""
    bars = []
    for scenario, side in _subjects(place):
        value = side.outside_network
        if value is not None and 0 <= value <= 1:
            bars.append(Bar(brief(scenario), Estimate(value=100 * value), share(value), COLOURS[0]))
    if not bars:
        return None
    longest = max(bar.point.value for bar in bars if bar.point) or 1.0
    figure = bar_charts.shares(f"Time outside the network, {place.name}", "% of the time", bars, longest)
    caption = "What is not spent in network evaluations: noise, steps between them, copies, quantisation."
    return Plot("outside-network", figure, _describe_bars(f"Share outside the network, {place.name}", bars), caption)


def arithmetic(place: Setup, result: Result) -> Plot | None:
    """GFLOP/s of each scenario against the measured peak."""
    bars, device, threads = [], place.scenarios[0].device, place.scenarios[0].threads
    for scenario, side in _subjects(place):
        if side.gflop_per_s is not None and drawable(side.gflop_per_s):
            text = digits(side.gflop_per_s) + (f" ({share(side.peak_fraction)})" if side.peak_fraction else "")
            bars.append(Bar(brief(scenario), Estimate(value=side.gflop_per_s), text, COLOURS[2]))
    if not bars:
        return None
    alike = [peak for peak in result.peaks if peak.device == device and drawable(peak.matrix_gflop_per_s.value)]
    alike = [peak for peak in alike if peak.threads == threads] or alike
    peak = alike[0].matrix_gflop_per_s.value if len(alike) == 1 else None
    end = max([*(bar.point.value for bar in bars if bar.point), *([peak] if peak else [])])
    line = None if peak is None else (peak, f"dashed: {digits(peak)} GFLOP/s, a matrix product in this run")
    figure = bar_charts.shares(f"Arithmetic, {place.name}", "GFLOP/s", bars, end, line)
    caption = "Operations of the network a second" + (", and what share of the measured peak that is." if line else ".")
    return Plot("gflops", figure, _describe_bars(f"GFLOP/s, {place.name}", bars), caption)


def server(place: Setup) -> Plot | None:
    """Percentiles of latency from arrival, against the bound."""
    bars: list[Bar] = []
    for scenario, side in _subjects(place):
        if not (side.served and side.latency and drawable(side.served.bound_ms)) or len(bars) > bar_charts.MOST:
            continue
        bars.append(Bar(brief(scenario), mark=side.served.bound_ms))
        for name in ("p50", "p90", "p95", "p99"):
            point: Estimate | None = getattr(side.latency, name)
            if point is not None and drawable(point.value):
                bars.append(Bar(name, point, digits(point.value), COLOURS[0]))
            else:
                bars.append(Bar(name, text="too few samples"))
    if not any(bar.point for bar in bars):
        return None
    figure = bar_charts.dots(f"Server: latency from arrival, {place.name}", "ms", bars)
    caption = "Percentiles with their 95% intervals; orange: the bound that p99 must stay within."
    return Plot("server", figure, _describe_bars(f"Server latency in ms, {place.name}", bars), caption)


def distance(result: Result, quality: Sequence[Quality]) -> Plot | None:
    """Frechet distance by steps, of reports with one extractor and reference; real images are drawn as a line."""
    curves: dict[str, list[tuple[int, Estimate]]] = {}
    flat: dict[str, float] = {}
    for each in quality:
        value, name = each.figures.frechet_distance, each.name(result)
        if value is None or not drawable(value):
            continue
        if each.steps is None:
            flat[name] = value
        else:
            curves.setdefault(name, []).append((each.steps, Estimate(value=value)))
    series = [
        Series(name, tuple(sorted(points, key=lambda p: p[0])), n)
        for n, (name, points) in enumerate(list(curves.items())[:_MOST_LINES])
    ]
    steps = [x for each in series for x, _ in each.points]
    if len(set(steps)) > 1:
        for name, value in list(flat.items())[: _MOST_LINES - len(series)]:
            ends = ((min(steps), Estimate(value=value)), (max(steps), Estimate(value=value)))
            series.append(Series(name, ends, len(series), "level"))
    figure = style.lines("Quality by steps", _axis("steps"), "Frechet distance", series)
    caption = "Distance to the reference, from cm-runtime eval; less is better. Its unit is its extractor's own."
    return _plot("quality-by-steps", figure, "Frechet distance by steps", series, caption)


def _subjects(place: Setup) -> list[tuple[ScenarioResult, Contender]]:
    return [(each, side) for each in place.scenarios if (side := subject(each)) is not None][: bar_charts.MOST]


def _series(place: Setup, over: Line, kind: str, value: Callable[[Contender], Estimate | None]) -> list[Series]:
    """cm-runtime's values over steps or batch, a line for each of the other."""
    curves: dict[int, dict[int, Estimate]] = {}
    for scenario in place.scenarios:
        side = subject(scenario)
        point = None if side is None else value(side)
        x, other = (scenario.steps, scenario.batch) if over == "steps" else (scenario.batch, scenario.steps)
        if scenario.kind == kind and point is not None and drawable(point.value) and 0 < x < 1 << 40:
            curves.setdefault(other, {})[x] = point
    labels = {other: quantity(other, "step") if over == "batch" else f"batch {other}" for other in sorted(curves)}
    return [
        Series(label, tuple(sorted(curves[other].items())), n)
        for n, (other, label) in enumerate(list(labels.items())[:_MOST_LINES])
    ]


def _cut(place: Setup, over: Line) -> str:
    """The sentence of a caption on lines that were left out."""
    lines = {each.batch if over == "steps" else each.steps for each in place.scenarios if each.kind == "single-stream"}
    return (
        "" if len(lines) <= _MOST_LINES else f" The first {_MOST_LINES} of {len(lines)} lines; the table has them all."
    )


def _axis(over: Line) -> str:
    return "network evaluations an image" if over == "steps" else "images a request"


def _plot(name: str, figure: Figure | None, text: str, series: Sequence[Series], caption: str) -> Plot | None:
    if figure is None:
        return None
    values = [
        f"{clean(line.label, 40)}{', p95' if line.kind == 'tail' else ''}: "
        + ", ".join(f"{x}: {interval(point)}" for x, point in line.points[:20])
        for line in series
    ]
    return Plot(name, figure, clean(f"{text}. {'; '.join(values)}.", 1200), caption)


def _describe_bars(title: str, bars: Sequence[Bar]) -> str:
    parts = [f"{clean(bar.name, 40)} {bar.text}".strip() if bar.text else f"{clean(bar.name, 40)}:" for bar in bars]
    return clean(f"{title}. {', '.join(parts).replace(':,', ':')}.", 1200) if parts else DASH


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "model"


def _rename(plot: Plot, suffix: str, others: Sequence[Plot]) -> Plot:
    """``plot`` with a name that no other has."""
    names = {each.name for each in others}
    name, n = plot.name + suffix, 2
    while name in names:
        name, n = f"{plot.name}{suffix}-{n}", n + 1
    return replace(plot, name=name)
