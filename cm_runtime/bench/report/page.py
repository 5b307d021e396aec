"""One HTML page with everything in it: styles, tables and plots; no script, and no request to anywhere.

Results are anybody's: the template escapes every text, plots are images (an SVG in an image runs nothing), and the
page's own policy forbids what is not in it. The same result gives the same page. Needs jinja2 and matplotlib.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm_runtime.bench.report import environment, tables
from cm_runtime.bench.report.formatting import bounds, clean, digits, times
from cm_runtime.bench.report.grouping import SetupNames, brief, subject
from cm_runtime.bench.report.quality import Quality
from cm_runtime.bench.report.style import Plot, svg
from cm_runtime.bench.results import Result
from cm_runtime.bench.scenario import title
from cm_runtime.errors.wording import quantity
from cm_runtime.extras import require

TEMPLATE = Path(__file__).parent / "page.html.j2"


@dataclass(frozen=True)
class Tile:
    """A number at the top, with its title, its interval and its scenario."""

    title: str
    number: str
    unit: str
    beside: str
    where: str


def html(result: Result, plots: Sequence[Plot], quality: Sequence[Quality] = ()) -> str:
    """The page of ``result`` with ``plots``, those of `draw_plots`. Raises MissingExtraError without jinja2."""
    jinja2 = require("jinja2", "a page of a benchmark")
    template_settings = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
    )
    template = template_settings.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page: str = template.render(
        result=result,
        left_out=[title(name) for name in result.left_out],
        paragraph=environment.paragraph(result),
        troubles=environment.troubles(result),
        machine=environment.machine_line(result),
        day=environment.day(result),
        tiles=tiles(result),
        headline=tables.headline(result),
        peers=tables.peers(result),
        served=tables.server(result),
        models=tables.models(result),
        qualities=tables.qualities(result, quality),
        figures=[(plot, base64.b64encode(svg(plot.figure)).decode()) for plot in plots],
        sizes={plot.name: [round(72 * float(side)) for side in plot.figure.get_size_inches()] for plot in plots},
        sections=environment.sections(result),
    )
    return page.strip() + "\n"


def tiles(result: Result) -> list[Tile]:
    """The quickest request, the most images a second, and the range of the time each other takes."""
    measured = [(each, side) for each in result.scenarios if (side := subject(each)) is not None]
    tiles_, names = [], SetupNames(result)
    single = [(side.latency.p50, each) for each, side in measured if side.latency and each.kind == "single-stream"]
    if single:
        point, where = min(single, key=lambda pair: pair[0].value)
        place = f"{names.of(where)}: {brief(where)}"
        tiles_.append(Tile("Quickest request", digits(point.value, 4), "ms", bounds(point), place))
    rates = [(side.images_per_s, each) for each, side in measured if side.images_per_s]
    if rates:
        point, where = max(rates, key=lambda pair: pair[0].value)
        place = f"{names.of(where)}: {brief(where)}"
        tiles_.append(Tile("Most images", digits(point.value, 4), "a second", bounds(point), place))
    ratios: dict[str, list[float]] = {}
    for scenario, _ in measured:
        for side in scenario.contenders:
            if side.role != "subject" and side.time_ratio is not None:
                ratios.setdefault(side.name, []).append(side.time_ratio.value)
    for name, values in list(ratios.items())[:4]:
        low, high = times(min(values)), times(max(values))
        number = low if low == high else f"{low} to {high}"
        places = f"in {quantity(len(values), 'scenario')}"
        tiles_.append(Tile(f"Time of {clean(name, 30)} over ours", number, "x", "", places))
    return tiles_


def _printable(value: Any) -> Any:
    """Text of the template on one line, without what cannot be printed; escaping comes after."""
    return clean(value, 4000) if type(value) is str else value
