"""Plots of rows: bars and intervals under headings, read from the top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cm_runtime.bench.report.formatting import clean
from cm_runtime.bench.report.style import FAINT, INK, blank, high, log_axis, low, reach
from cm_runtime.bench.results import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 60
_PITCH = 0.21  # inches a row


@dataclass(frozen=True)
class Bar:
    """A row: its name, its value, the text beside it, its colour; a row without value and text is a heading."""

    name: str
    point: Estimate | None = None
    text: str = ""
    colour: str = INK
    mark: float | None = None  # of a heading: a line across its rows at this value


def shares(title: str, x: str, bars: Sequence[Bar], end: float, line: tuple[float, str] | None = None) -> Figure:
    """Bars from 0, on a linear axis up to ``end``, with a labelled line where there is one."""
    figure, axes = _rows(title, x, bars)
    for y, bar, point in _points(bars):
        axes.barh(y, point.value, height=0.66, color=bar.colour)
        _annotate(axes, bar.text, point.value, y)
    if line is not None:
        axes.axvline(line[0], color=INK, linewidth=1.2, linestyle="--")
        axes.set_title(line[1], fontsize=9.5, fontweight="normal", color=FAINT)
    axes.set_xlim(0, end * 1.28)
    return figure


def ratios(title: str, x: str, bars: Sequence[Bar]) -> Figure:
    """Bars from 1, to the right for what takes longer, on a logarithmic axis, with their intervals."""
    figure, axes = _rows(title, x, bars)
    points = [point for _, _, point in _points(bars)]
    log_axis(axes, "x", (min([1.0, *map(low, points)]), max([1.0, *map(high, points)])), room=0.18)
    for y, bar, point in _points(bars):
        axes.barh(y, abs(point.value - 1), left=min(point.value, 1), height=0.66, color=bar.colour)
        axes.errorbar(point.value, y, xerr=reach([point]), fmt="none", ecolor=INK, elinewidth=1.4, capsize=3)
        _annotate(axes, bar.text, max(1, high(point)), y)
    axes.axvline(1, color=INK, linewidth=1.2)
    return figure


def dots(title: str, x: str, bars: Sequence[Bar]) -> Figure:
    """Points with their intervals on a logarithmic axis, and each heading's line across its rows."""
    figure, axes = _rows(title, x, bars)
    points = [point for _, _, point in _points(bars)]
    marks = [bar.mark for bar in bars if bar.mark is not None]
    ends = min([*marks, *map(low, points)]), max([*marks, *map(high, points)])
    log_axis(axes, "x", ends, room=0.12)
    headings = [y for y, bar in enumerate(bars) if bar.point is None and not bar.text] + [len(bars)]
    for y, bar in enumerate(bars):
        if bar.mark is not None:
            until = min(heading for heading in headings if heading > y)
            axes.plot([bar.mark, bar.mark], [y + 0.5, until - 0.5], color="#D55E00", linewidth=2)
        if bar.point is None and bar.text:
            axes.text(ends[0], y, bar.text, va="center", fontsize=9, color=FAINT)
    for y, bar, point in _points(bars):
        axes.errorbar(point.value, y, xerr=reach([point]), fmt="o", color=bar.colour, elinewidth=1.4, capsize=3)
        _annotate(axes, bar.text, high(point), y)
    return figure


def _points(bars: Sequence[Bar]) -> list[tuple[int, Bar, Estimate]]:
    return [(y, bar, bar.point) for y, bar in enumerate(bars) if bar.point is not None]


def _annotate(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)


def _rows(title: str, x: str, bars: Sequence[Bar]) -> tuple[Figure, Axes]:
    """A figure as tall as the rows need, with their names."""
    figure, axes = blank(title, max(1.6, 1.15 + _PITCH * len(bars)))
    axes.set_xlabel(x)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_yticks(range(len(bars)), [clean(bar.name, 26) for bar in bars])
    for label, bar in zip(axes.get_yticklabels(), bars, strict=True):
        if bar.point is None and not bar.text:
            label.set(fontweight="bold", fontsize=9)
    return figure, axes
