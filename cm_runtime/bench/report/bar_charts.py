"""Plots of rows: bars and intervals under headings, read from the top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cm_runtime.bench.report.formatting import clean
from cm_runtime.bench.report.style import FAINT, INK, blank, high, ladder, log_axis, low
from cm_runtime.bench.results import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 60
_PITCH = 0.21  # inches a row


@dataclass(frozen=True)
class Bar:
    """A row: its name, where it ends, what stands there, its colour; no value makes it a heading."""

    name: str
    point: Estimate | None = None
    text: str = ""
    colour: str = INK
    mark: float | None = None  # of a heading: a line across its rows at this value


def shares(title: str, x: str, bars: Sequence[Bar], end: float, line: tuple[float, str] | None = None) -> Figure:
    """Bars from 0, on a linear axis up to ``end``, with a labelled line where there is one."""
    figure, axes = _canvas(title, bars)
    for y, bar in enumerate(bars):
        if bar.point is not None:
            axes.barh(y, bar.point.value, height=0.66, color=bar.colour)
            axes.annotate(
                bar.text, (bar.point.value, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
            )
    if line is not None:
        axes.axvline(line[0], color=INK, linewidth=1.2, linestyle="--")
        axes.set_title(line[1], fontsize=9.5, fontweight="normal", color=FAINT)
    axes.set_xlim(0, end * 1.28)
    axes.set_xlabel(x)
    return figure


def ratios(title: str, x: str, bars: Sequence[Bar]) -> Figure:
    """Bars from 1, to the right for what takes longer, on a logarithmic axis, with their intervals."""
    figure, axes = _canvas(title, bars)
    points = [bar.point for bar in bars if bar.point is not None]
    rungs = ladder(min([1.0, *map(low, points)]), max([1.0, *map(high, points)]))
    log_axis(axes, "x", rungs, (rungs[0], rungs[-1] * (rungs[-1] / rungs[0]) ** 0.18))
    for y, bar in enumerate(bars):
        if bar.point is None:
            continue
        value = bar.point.value
        axes.barh(y, abs(value - 1), left=min(value, 1), height=0.66, color=bar.colour)
        _whisker(axes, y, bar.point, INK)
        axes.annotate(
            bar.text, (max(1, high(bar.point)), y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.set_xlabel(x)
    return figure


def dots(title: str, x: str, bars: Sequence[Bar]) -> Figure:
    """Points with their intervals on a logarithmic axis, and each heading's line across its rows."""
    figure, axes = _canvas(title, bars)
    points = [bar.point for bar in bars if bar.point is not None]
    marks = [bar.mark for bar in bars if bar.mark is not None]
    rungs = ladder(min([*marks, *map(low, points)]), max([*marks, *map(high, points)]))
    log_axis(axes, "x", rungs, (rungs[0] * 0.94, rungs[-1] * (rungs[-1] / rungs[0]) ** 0.12))
    heads = [y for y, bar in enumerate(bars) if bar.point is None and not bar.text] + [len(bars)]
    for y, bar in enumerate(bars):
        if bar.mark is not None:
            until = min(head for head in heads if head > y)
            axes.plot([bar.mark, bar.mark], [y + 0.5, until - 0.5], color="#D55E00", linewidth=2)
        if bar.point is None:
            if bar.text:
                axes.text(rungs[0], y, bar.text, va="center", fontsize=9, color=FAINT)
            continue
        _whisker(axes, y, bar.point, bar.colour)
        axes.plot(bar.point.value, y, "o", color=bar.colour)
        axes.annotate(
            bar.text, (high(bar.point), y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_xlabel(x)
    return figure


def _whisker(axes: Axes, y: int, point: Estimate, colour: str) -> None:
    if high(point) > low(point):
        axes.plot([low(point), high(point)], [y, y], color=colour, linewidth=1.4)
        axes.plot([low(point), high(point)], [y, y], "|", color=colour, markersize=6, markeredgewidth=1.2)


def _canvas(title: str, bars: Sequence[Bar]) -> tuple[Figure, Axes]:
    """A figure as tall as the rows need, with their names."""
    figure, axes = blank(title, max(1.6, 1.15 + _PITCH * len(bars)))
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_yticks(range(len(bars)), [clean(bar.name, 26) for bar in bars])
    for label, bar in zip(axes.get_yticklabels(), bars, strict=True):
        if bar.point is None and not bar.text:
            label.set_fontweight("bold")
            label.set_fontsize(9)
    return figure, axes
