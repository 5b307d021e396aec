"""How every plot looks, and its way into SVG and PNG: the same figure gives the same bytes.

matplotlib's object interface only; no pyplot, no window, no state but the style, which is set for a block.
Text is drawn as paths, so that a page looks the same without our fonts, and never read as mathematics.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cm_runtime.bench.report.formatting import clean
from cm_runtime.bench.results import Estimate
from cm_runtime.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.2, 3.6  # inches; 374 points wide, so about life size on a phone
DPI = 200
INK, FAINT = "#22262b", "#6b7280"
# Okabe and Ito's colours, told apart by all kinds of sight; markers and the order of labels tell them apart again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
_FINE = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.edgecolor": "#9aa1ab",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7ec",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "cm-runtime",
}


@dataclass(frozen=True)
class Plot:
    """A figure, the name of its file, and what stands in for it and beneath it."""

    name: str
    figure: Figure
    alt: str
    caption: str


@dataclass(frozen=True)
class Series:
    """A line: its label and its points by x. A tail is the dashed one of its number; a level, a yardstick."""

    label: str
    points: tuple[tuple[int, Estimate], ...]
    number: int
    kind: Literal["line", "tail", "level"] = "line"


@contextmanager
def styled() -> Iterator[None]:
    """In the block, figures are made and drawn in our style, whatever the user's matplotlibrc says."""
    require("matplotlib", "a page or plots of a benchmark")
    import matplotlib.style

    with warnings.catch_warnings(), matplotlib.style.context(["default", STYLE]):
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # names in scripts that the font has not
        yield


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file, without date or author."""
    with styled():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        return buffer.getvalue()


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, 1040 pixels wide."""
    with styled():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()


def blank(title: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """An empty figure with a title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(clean(title, 58), x=0.02, ha="left", fontsize=10.5, fontweight="bold")
    return figure, axes


def drawable(value: float) -> bool:
    """Whether a logarithmic axis can hold it."""
    return 1e-9 < value < 1e12


def ladder(low: float, high: float) -> list[float]:
    """Round numbers from the last at or below ``low`` to the first at or above ``high``, as fine as there is room."""
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    found: list[float] = []
    for steps, most in ((_FINE, 6), ((1.0, 2.0, 5.0), 11), ((1.0,), 1000)):
        rungs = [m * 10.0**exponent for exponent in range(first, last + 1) for m in steps]
        start = max(n for n, rung in enumerate(rungs) if rung <= low * 1.0001)
        end = min(n for n, rung in enumerate(rungs) if rung >= high * 0.9999)
        found = rungs[start : max(end, start + 1) + 1]
        if len(found) <= most:
            break
    return found


def log_axis(axes: Axes, which: str, ticks: Sequence[float], ends: tuple[float, float]) -> None:
    """A logarithmic axis, ``which`` of "x" and "y", with these ticks in plain figures and no others."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log") if which == "x" else axes.set_yscale("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(*ends) if which == "x" else axes.set_ylim(*ends)


def apart(values: Iterable[int], gap: float = 0.07) -> list[int]:
    """Those of ``values`` whose labels have room on a logarithmic axis, the ends among them."""
    ordered = sorted(set(values))
    span = math.log(ordered[-1] / ordered[0]) or 1.0
    kept = [ordered[-1]]
    for value in ordered[-2::-1]:
        if math.log(kept[-1] / value) >= gap * span:
            kept.append(value)
    return kept[::-1]


def lines(title: str, x: str, y: str, series: Sequence[Series]) -> Figure | None:
    """A line for each series, both axes logarithmic; None where none has two points."""
    if not any(len(each.points) > 1 and each.kind == "line" for each in series):
        return None
    figure, axes = blank(title)
    for each in series:
        colour, marker = COLOURS[each.number % len(COLOURS)], MARKERS[each.number % len(MARKERS)]
        xs, ys = [x for x, _ in each.points], [point.value for _, point in each.points]
        if each.kind == "level":
            axes.plot(xs, ys, ":", color=FAINT, label=each.label)
            continue
        if each.kind == "tail":
            axes.plot(xs, ys, "--", color=colour, linewidth=1.2, marker=marker, markerfacecolor="white", markersize=4.5)
            continue
        errors = [(max(0, y - low(p)), max(0, high(p) - y)) for y, (_, p) in zip(ys, each.points, strict=True)]
        below, above = zip(*errors, strict=True)
        axes.errorbar(xs, ys, (below, above), color=colour, marker=marker, capsize=2.5, label=each.label)
    every = [point for each in series for _, point in each.points]
    rungs = ladder(min(low(p) for p in every), max(high(p) for p in every))
    log_axis(axes, "y", rungs, (rungs[0] * 0.94, rungs[-1] * 1.06))
    ticks = apart(x for each in series for x, _ in each.points)
    margin = (ticks[-1] / ticks[0]) ** 0.04
    log_axis(axes, "x", ticks, (ticks[0] / margin, ticks[-1] * margin))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if len([each for each in series if each.kind != "tail"]) > 1:
        figure.legend(loc="outside lower center", ncols=3, handlelength=1.8, columnspacing=1.4)
    else:
        axes.set_title(next(each.label for each in series), fontsize=9.5, fontweight="normal", color=FAINT)
    return figure


def low(point: Estimate) -> float:
    """The lower end of the interval where there is one that can be drawn, else the value."""
    return point.low if point.low is not None and drawable(point.low) and point.low <= point.value else point.value


def high(point: Estimate) -> float:
    """The upper end, likewise."""
    return point.high if point.high is not None and drawable(point.high) and point.high >= point.value else point.value
