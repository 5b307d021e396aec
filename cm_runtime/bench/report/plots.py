"""The plots of a result, one function each; a plot that would show nothing is None. Needs matplotlib."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from cm_runtime.bench.report import bar_charts, style
from cm_runtime.bench.report.formatting import DASH, clean, digits, interval, share, times
from cm_runtime.bench.report.grouping import Setup, brief, rivals, setups, subject
from cm_runtime.bench.report.quality import Quality
from cm_runtime.bench.report.style import COLOURS, Plot, Series, drawable, styled
from cm_runtime.bench.results import Contender, Estimate, Result, ScenarioResult
from cm_runtime.errors.wording import quantity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Line = Literal["steps", "batch"]
_MOST_LINES = 7
MOST_SETUPS = 12


def drawn(result: Result, quality: Sequence[Quality] = ()) -> list[Plot]:
    """All that have something to show, a set for each of the first setups.

    Raises MissingExtraError without matplotlib.
    """
    places = setups(result)
    left_out = len(places) - MOST_SETUPS
    places = places[:MOST_SETUPS]
    found: list[Plot] = []
    with styled():
        for place in places:
            made = [
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
            found += [_named(plot, suffix, found) for plot in made if plot is not None]
        if left_out > 0 and found:
            note = f" Plots are of the first {MOST_SETUPS} setups; the tables have the other {left_out} too."
            found[0] = replace(found[0], caption=found[0].caption + note)
        for yardstick in dict.fromkeys(each.yardstick for each in quality):
            plot = distance(result, [each for each in quality if each.yardstick == yardstick])
            if plot is not None:
                found.append(_named(plot, "", found))
    return found


def latency(place: Setup, over: Line) -> Plot | None:
    """Median latency of single-stream scenarios with its interval, and the 95th percentile, dashed."""

    def p50(side: Contender) -> Estimate | None:
        return side.latency.p50 if side.latency else None

    def p95(side: Contender) -> Estimate | None:
        return side.latency.p95 if side.latency else None

    series = _series(place, over, ("single-stream",), p50)
    series = [line for each in series for line in (each, *_series(place, over, ("single-stream",), p95, each))]
    tails = any(each.kind == "tail" for each in series)
    figure = style.lines(f"Latency by {over}, {place.name}", _axis(over), "ms a request", series)
    caption = "Median and its 95% interval" + (", dashed: the 95th percentile." if tails else ".") + _cut(place, over)
    return _plot(f"latency-by-{over}", figure, f"Latency by {over}, {place.name}, in ms", series, caption)


def throughput(place: Setup, over: Line) -> Plot | None:
    """Images a second of single-stream and offline scenarios."""
    series = _series(place, over, ("single-stream",), lambda side: side.images_per_s)
    for each in _series(place, over, ("offline",), lambda side: side.images_per_s):
        series.append(Series(f"{each.label}, offline", each.points, len(series)))
    figure = style.lines(f"Throughput by {over}, {place.name}", _axis(over), "images/s", series)
    caption = "Images a second, with its 95% interval." + _cut(place, over)
    return _plot(f"throughput-by-{over}", figure, f"Images a second by {over}, {place.name}", series, caption)


def speed_ups(place: Setup) -> Plot | None:
    """The time of the base and of each peer over cm-runtime's."""
    bars: list[bar_charts.Bar] = []
    names = list(dict.fromkeys(side.name for each in place.scenarios for side in rivals(each)))
    for scenario in place.scenarios:
        measured = [side for side in rivals(scenario) if side.time_ratio and drawable(side.time_ratio.value)]
        if not measured or subject(scenario) is None or len(bars) > bar_charts.MOST:
            continue
        bars.append(bar_charts.Bar(brief(scenario)))
        for side in measured:
            colour = COLOURS[names.index(side.name) % len(COLOURS)]
            assert side.time_ratio is not None
            bars.append(bar_charts.Bar(side.name, side.time_ratio, f"{times(side.time_ratio.value)}x", colour))
    if not bars:
        return None
    figure = bar_charts.ratios(
        f"Time of others over cm-runtime's, {place.name}", "times as long (above 1: slower)", bars
    )
    caption = "How many times as long the others take for the same images, paired by round, with 95% intervals."
    return Plot("speed-ups", figure, _told(f"Time over cm-runtime's, {place.name}", bars), caption)


def outside_network(place: Setup) -> Plot | None:
    """The share of the time not spent in network evaluations."""
    bars = []
    for scenario, side in _measured(place):
        value = side.outside_network
        if value is not None and 0 <= value <= 1:
            bars.append(bar_charts.Bar(brief(scenario), Estimate(value=100 * value), share(value), COLOURS[0]))
    if not bars:
        return None
    longest = max(bar.point.value for bar in bars if bar.point) or 1.0
    figure = bar_charts.shares(f"Time outside the network, {place.name}", "% of the time", bars, longest)
    caption = "What is not spent in network evaluations: noise, steps between them, copies, quantisation."
    return Plot("outside-network", figure, _told(f"Share outside the network, {place.name}", bars), caption)


def arithmetic(place: Setup, result: Result) -> Plot | None:
    """GFLOP/s of each scenario against the measured peak."""
    bars, device, threads = [], place.scenarios[0].device, place.scenarios[0].threads
    for scenario, side in _measured(place):
        if side.gflop_per_s is not None and drawable(side.gflop_per_s):
            text = digits(side.gflop_per_s) + (f" ({share(side.peak_fraction)})" if side.peak_fraction else "")
            bars.append(bar_charts.Bar(brief(scenario), Estimate(value=side.gflop_per_s), text, COLOURS[2]))
    if not bars:
        return None
    alike = [peak for peak in result.peaks if peak.device == device and drawable(peak.matrix_gflop_per_s.value)]
    alike = [peak for peak in alike if peak.threads == threads] or alike
    peak = alike[0].matrix_gflop_per_s.value if len(alike) == 1 else None
    end = max([*(bar.point.value for bar in bars if bar.point), *([peak] if peak else [])])
    line = None if peak is None else (peak, f"dashed: {digits(peak)} GFLOP/s, a matrix product in this run")
    figure = bar_charts.shares(f"Arithmetic, {place.name}", "GFLOP/s", bars, end, line)
    caption = "Operations of the network a second" + (", and what share of the measured peak that is." if line else ".")
    return Plot("gflops", figure, _told(f"GFLOP/s, {place.name}", bars), caption)


def server(place: Setup) -> Plot | None:
    """Percentiles of latency from arrival, against the bound."""
    bars: list[bar_charts.Bar] = []
    for scenario, side in _measured(place):
        if (
            side.served is None
            or side.latency is None
            or len(bars) > bar_charts.MOST
            or not drawable(side.served.bound_ms)
        ):
            continue
        bars.append(bar_charts.Bar(brief(scenario), mark=side.served.bound_ms))
        for name in ("p50", "p90", "p95", "p99"):
            point: Estimate | None = getattr(side.latency, name)
            if point is not None and drawable(point.value):
                bars.append(bar_charts.Bar(name, point, digits(point.value), COLOURS[0]))
            else:
                bars.append(bar_charts.Bar(name, text="too few samples"))
    if not any(bar.point for bar in bars):
        return None
    figure = bar_charts.dots(f"Server: latency from arrival, {place.name}", "ms", bars)
    caption = "Percentiles with their 95% intervals; orange: the bound that p99 must stay within."
    return Plot("server", figure, _told(f"Server latency in ms, {place.name}", bars), caption)


def distance(result: Result, quality: Sequence[Quality]) -> Plot | None:
    """Frechet distance by steps, of reports with one extractor and reference; real images are drawn as a line."""
    named: dict[str, list[tuple[int, Estimate]]] = {}
    flat: dict[str, float] = {}
    for each in quality:
        value, name = each.figures.frechet_distance, each.name(result)
        if value is None or not drawable(value):
            continue
        if each.steps is None:
            flat[name] = value
        else:
            named.setdefault(name, []).append((each.steps, Estimate(value=value)))
    named = dict(list(named.items())[:_MOST_LINES])
    series = [
        Series(name, tuple(sorted(points, key=lambda p: p[0])), n) for n, (name, points) in enumerate(named.items())
    ]
    steps = [x for each in series for x, _ in each.points]
    if len(set(steps)) > 1:
        for name, value in list(flat.items())[: _MOST_LINES - len(series)]:
            ends = ((min(steps), Estimate(value=value)), (max(steps), Estimate(value=value)))
            series.append(Series(name, ends, len(series), "level"))
    figure = style.lines("Quality by steps", _axis("steps"), "Frechet distance", series)
    caption = "Distance to the reference, from cm-runtime eval; less is better. Its unit is its extractor's own."
    return _plot("quality-by-steps", figure, "Frechet distance by steps", series, caption)


def _measured(place: Setup) -> list[tuple[ScenarioResult, Contender]]:
    return [(each, side) for each in place.scenarios if (side := subject(each)) is not None][: bar_charts.MOST]


def _series(
    place: Setup,
    over: Line,
    kinds: tuple[str, ...],
    value: Callable[[Contender], Estimate | None],
    behind: Series | None = None,
) -> list[Series]:
    """cm-runtime's values over steps or batch, a line for each of the other; or the tail of a line."""
    found: dict[int, dict[int, Estimate]] = {}
    for scenario in place.scenarios:
        side = subject(scenario)
        point = None if side is None else value(side)
        x, other = (scenario.steps, scenario.batch) if over == "steps" else (scenario.batch, scenario.steps)
        if scenario.kind in kinds and point is not None and drawable(point.value) and 0 < x < 1 << 40:
            found.setdefault(other, {})[x] = point
    named = [
        (quantity(other, "step") if over == "batch" else f"batch {other}", tuple(sorted(points.items())))
        for other, points in sorted(found.items())
    ]
    if behind is not None:
        return [Series(label, points, behind.number, "tail") for label, points in named if label == behind.label]
    return [Series(label, points, n) for n, (label, points) in enumerate(named[:_MOST_LINES])]


def _cut(place: Setup, over: Line) -> str:
    """What a caption says of lines that were left out."""
    lines = {each.batch if over == "steps" else each.steps for each in place.scenarios if each.kind == "single-stream"}
    return (
        "" if len(lines) <= _MOST_LINES else f" The first {_MOST_LINES} of {len(lines)} lines; the table has them all."
    )


def _axis(over: Line) -> str:
    return "network evaluations an image" if over == "steps" else "images a request"


def _plot(name: str, figure: Figure | None, told: str, series: Sequence[Series], caption: str) -> Plot | None:
    if figure is None:
        return None
    values = [
        f"{clean(line.label, 40)}{', p95' if line.kind == 'tail' else ''}: "
        + ", ".join(f"{x}: {interval(point)}" for x, point in line.points[:20])
        for line in series
    ]
    return Plot(name, figure, clean(f"{told}. {'; '.join(values)}.", 1200), caption)


def _told(what: str, bars: Sequence[bar_charts.Bar]) -> str:
    parts = [f"{clean(bar.name, 40)} {bar.text}".strip() if bar.text else f"{clean(bar.name, 40)}:" for bar in bars]
    return clean(f"{what}. {', '.join(parts).replace(':,', ':')}.", 1200) if parts else DASH


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "model"


def _named(plot: Plot, suffix: str, others: Sequence[Plot]) -> Plot:
    """With a name that no other has."""
    taken = {each.name for each in others}
    name, n = plot.name + suffix, 2
    while name in taken:
        name, n = f"{plot.name}{suffix}-{n}", n + 1
    return Plot(name, plot.figure, plot.alt, plot.caption)
