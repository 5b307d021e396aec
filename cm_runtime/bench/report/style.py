"""The look of every plot, and its way into SVG and PNG: the same figure gives the same bytes.

matplotlib's object interface only; no pyplot, no window, no state but the style, which is set for a block.
Text is drawn as paths, so that a page looks the same without our fonts, and never read as mathematics.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
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
def style_context() -> Iterator[None]:
    """Make and draw figures in one style for the duration of the block, whatever the user's matplotlibrc says."""
    require("matplotlib", "a page or plots of a benchmark")
    import matplotlib.style

    with warnings.catch_warnings(), matplotlib.style.context(["default", STYLE]):
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # names in scripts that the font lacks
        yield


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file, without date or author."""
    with style_context():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        return buffer.getvalue()


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, 1040 pixels wide."""
    with style_context():
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
    """True where a logarithmic axis can hold the value."""
    return 1e-9 < value < 1e12


def log_axis(axes: Axes, which: str, ends: tuple[float, float], room: float = 0.04, ticks: Sequence[int] = ()) -> None:
    """Make an axis, "x" or "y", logarithmic between ``ends``, with plain figures, at ``ticks`` or at round numbers.

    room: the share of the axis that is left beyond the upper end.
    """
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

    span = max(ends[1] / ends[0], 1.1)
    locator = MaxNLocator(6, steps=[1, 2, 5, 10]) if span < 5 else LogLocator(subs=(1, 2, 5) if span < 5000 else (1,))
    axes.set(**{f"{which}scale": "log", f"{which}lim": (ends[0] / span**0.04, ends[1] * span**room)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(ticks, nbins=8) if ticks else locator)
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def lines(title: str, x: str, y: str, series: Sequence[Series]) -> Figure | None:
    """Line plot with both axes logarithmic; None where no line has two points."""
    if not any(len(each.points) > 1 and each.kind == "line" for each in series):
        return None
    figure, axes = blank(title)
    for each in series:
        colour, marker = COLOURS[each.number % len(COLOURS)], MARKERS[each.number % len(MARKERS)]
        xs, ys = [x for x, _ in each.points], [point.value for _, point in each.points]
        if each.kind == "level":
            axes.plot(xs, ys, ":", color=FAINT, label=each.label)
        elif each.kind == "tail":
            axes.plot(xs, ys, "--", color=colour, linewidth=1.2, marker=marker, markerfacecolor="white", markersize=4.5)
        else:
            errors = reach([point for _, point in each.points])
            axes.errorbar(xs, ys, errors, color=colour, marker=marker, capsize=2.5, label=each.label)
    every = [point for each in series for _, point in each.points]
    log_axis(axes, "y", (min(map(low, every)), max(map(high, every))))
    ticks = sorted({x for each in series for x, _ in each.points})
    log_axis(axes, "x", (ticks[0], ticks[-1]), ticks=ticks)
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


def reach(points: Sequence[Estimate]) -> tuple[list[float], list[float]]:
    """Distances from the values down and up to the ends of their intervals, for matplotlib's errorbar."""
    return [point.value - low(point) for point in points], [high(point) - point.value for point in points]
