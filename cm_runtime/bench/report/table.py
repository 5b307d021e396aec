"""A table as text: fields with what stands beside them, and footnotes for what is missing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from cm_runtime.bench.report.formatting import DASH, bounds, digits
from cm_runtime.bench.results import Estimate

UNSURE = "too few samples for an interval"
UNMEASURED = "not measured in this scenario"


@dataclass(frozen=True)
class Cell:
    """A field: its text, the text beside it, its footnote, and its mark of the row (absent, failed, missed)."""

    text: str
    beside: str = ""
    note: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """Its first cell is its name, its key the scenario's. One with fewer cells than columns ends in a reason."""

    cells: tuple[Cell, ...]
    key: str = ""


@dataclass(frozen=True)
class Table:
    """Columns and rows; empty where the result has nothing of the kind."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def notes(self) -> list[str]:
        """Footnotes, in the order in which they are first met; the n-th is marked n."""
        return list(dict.fromkeys(cell.note for row in self.rows for cell in row.cells if cell.note))

    @property
    def spans(self) -> list[int]:
        """Over how many rows each row's first cell goes: 0 where it is that of the row above."""
        spans: list[int] = []
        for _, rows in itertools.groupby(self.rows, lambda row: (row.key, row.cells[0]) if row.key else id(row)):
            count = len(list(rows))
            spans += [count, *[0] * (count - 1)]
        return spans

    def select(self, columns: Sequence[str]) -> Table:
        """The table with these columns."""
        indices = [self.columns.index(name) for name in columns]
        rows = [
            Row(tuple(row.cells[n] for n in indices) if len(row.cells) == len(self.columns) else row.cells, row.key)
            for row in self.rows
        ]
        return Table(tuple(columns), tuple(rows))


def estimate(value: Estimate | None, why: str = UNMEASURED) -> Cell:
    """3.214 [3.201, 3.230], or a dash and ``why``."""
    if value is None:
        return Cell(DASH, note=why)
    return Cell(digits(value.value, 4), bounds(value), "" if bounds(value) else UNSURE)


def plain(text: str, why: str = UNMEASURED, beside: str = "") -> Cell:
    """The text, or ``why`` where that is a dash."""
    return Cell(text, beside, why if text == DASH else "")
