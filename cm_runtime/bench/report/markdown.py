"""The summary of a result for a CI job's page: the page's tables in short, without matplotlib or jinja2."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cm_runtime.bench.report import environment, tables
from cm_runtime.bench.report.formatting import clean
from cm_runtime.bench.report.quality import Quality
from cm_runtime.bench.report.table import Table
from cm_runtime.bench.results import Result
from cm_runtime.bench.scenario import title

HEADLINE = ("scenario", "p50, ms", "p95, ms", "p99, ms", "images/s", "peak memory", "of the peak", "parity")
PEERS = ("scenario", "side", "time over cm-runtime's", "p50, ms", "parity")

_WORDS = ("scenario", "side", "images")  # columns of text
_ENTITIES = {"<": "&lt;", ">": "&gt;", "@": "&#64;", "$": "&#36;", "://": "&#58;//", "www.": "www&#46;"}


def summary(result: Result, quality: Sequence[Quality] = ()) -> str:
    """Markdown for ``$GITHUB_STEP_SUMMARY``: GitHub's tables, every name of the file escaped."""
    parts = ["## Benchmark of " + escape(result.tool), escape(environment.paragraph(result))]
    parts += [f"> **{escape(trouble)}**" for trouble in environment.troubles(result)]
    sections = [
        ("", tables.headline(result).select(HEADLINE)),
        ("### Beside others", tables.peers(result).select(PEERS)),
        ("### Server", tables.server(result)),
        ("### Quality", tables.qualities(result, quality)),
    ]
    for title_line, content in sections:
        if content.rows:
            parts += [part for part in (title_line, table(content), notes(content)) if part]
    if result.left_out:
        names = ", ".join(escape(clean(title(name), 80)) for name in result.left_out)
        parts.append(f"Left out by the quick setting: {names}.")
    return "\n\n".join(parts) + "\n"


def table(content: Table) -> str:
    """A GitHub table; a row that ends in a reason ends in empty fields."""
    numbers = {note: n for n, note in enumerate(content.notes, 1)}
    lines = [content.columns, tuple("---" if name in _WORDS else "---:" for name in content.columns)]
    for row in content.rows:
        first, *others = row.cells
        fields = [escape(f"{first.beside}: {first.text}" if first.beside else first.text)]
        for cell in others:
            note = f" <sup>{numbers[cell.note]}</sup>" if cell.note else ""
            beside = cell.beside if cell.beside[:1] in ("", "[", "(") else f"({cell.beside})"
            fields.append(escape(f"{cell.text} {beside}".rstrip()) + note)
        lines.append((*fields, *[""] * (len(content.columns) - len(fields))))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def notes(content: Table) -> str:
    """The footnotes of a table, in one line."""
    return " ".join(f"<sup>{n}</sup> {escape(note)}." for n, note in enumerate(content.notes, 1))


def escape(text: str) -> str:
    """One line that Markdown shows as it is, in a table's field as well: no mark-up, no link, no mention."""
    line = re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", clean(text, 2000)).replace("&", "&amp;")
    for letter, entity in _ENTITIES.items():
        line = line.replace(letter, entity)
    return line
