"""The table of the README, made from committed results.

    python benchmarks/table.py benchmarks/results/epyc-2/*.json --readme README.md            # writes it
    python benchmarks/table.py benchmarks/results/epyc-2/*.json --readme README.md --check    # fails where it differs

It replaces what stands between the lines <!-- benchmarks:begin --> and <!-- benchmarks:end -->. Results of one machine
and the same versions share a table; the machine and the versions stand in a line under it.

Exit status: 0 done, or the file is as it would be written; 1 it is not (--check), or a one-line error; 2 usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from cm_runtime.bench import results
from cm_runtime.bench.report.environment import day, machine_line, versions_line
from cm_runtime.bench.report.formatting import DASH, bounds, digits, interval, share, times
from cm_runtime.bench.report.grouping import SetupNames, rivals, subject
from cm_runtime.bench.report.markdown import escape
from cm_runtime.bench.results import Contender, Result, ScenarioResult
from cm_runtime.bench.scenario import Kind
from cm_runtime.errors import CmRuntimeError, DataError
from cm_runtime.files import atomic

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def tables(results: Sequence[Result]) -> str:
    """Markdown: a table for each machine and set of versions, in the order in which they come."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((machine_line(result), versions_line(result)), []).append(result)
    return "\n\n".join(_table(members) for members in groups.values())


def replace_table(text: str, table: str, where: Path) -> str:
    """``text`` with ``table`` between its markers. Raises DataError without them, once each and in order."""
    lines = text.splitlines()
    if lines.count(BEGIN) != 1 or lines.count(END) != 1 or lines.index(BEGIN) > lines.index(END):
        raise DataError(f"{where} needs one line {BEGIN} and, after it, one line {END}")
    head, tail = lines[: lines.index(BEGIN) + 1], lines[lines.index(END) :]
    return "\n".join([*head, "", table, "", *tail]) + "\n"


def _table(members: Sequence[Result]) -> str:
    pairs = [(result, scenario) for result in members for scenario in result.scenarios if subject(scenario)]
    models = [SetupNames(result).of(each) for result, each in pairs]
    kinds = get_args(Kind)
    pairs.sort(
        key=lambda at: (models.index(SetupNames(at[0]).of(at[1])), kinds.index(at[1].kind), at[1].steps, at[1].batch)
    )
    peers = list(dict.fromkeys(side.name for _, each in pairs for side in rivals(each) if side.time_ratio))
    columns = ["model", "steps", "batch", "p50, ms", "images/s", *(f"{name} takes" for name in peers)]
    columns.append("GFLOP/s (of the peak)")
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    lines += [_row(result, scenario, peers) for result, scenario in pairs]
    body = [f"| {' | '.join(map(escape, line) if n != 1 else line)} |" for n, line in enumerate(lines)]
    days = " and ".join(sorted({day(result) for result in members}))
    under = f"{machine_line(members[0])}; {versions_line(members[0])}; {days}."
    if not all(result.complete for result in members):
        under += " The run is incomplete."
    return "\n".join(body) + "\n\n" + escape(under)


def _row(result: Result, scenario: ScenarioResult, peers: Sequence[str]) -> list[str]:
    side = subject(scenario)
    assert side is not None  # only measured scenarios are in the table
    batch = str(scenario.batch)
    if scenario.kind == "server":
        batch = f"up to {batch}, {digits(side.served.rate)}/s" if side.served else f"up to {batch}, server"
    elif scenario.kind == "offline":
        batch += ", offline"
    gflops = digits(side.gflop_per_s) + (f" ({share(side.peak_fraction)})" if side.peak_fraction is not None else "")
    return [
        SetupNames(result).of(scenario),
        str(scenario.steps),
        batch,
        interval(side.latency.p50 if side.latency else None),
        digits(side.images_per_s.value, 4) if side.images_per_s else DASH,
        *(_ratio(scenario.contender(name)) for name in peers),
        gflops,
    ]


def _ratio(side: Contender | None) -> str:
    if side is None or side.time_ratio is None:
        return DASH
    return f"{times(side.time_ratio.value)}x {bounds(side.time_ratio)}".rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Put the table of benchmark results in a Markdown file.")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--readme", type=Path, required=True, metavar="FILE.md", help="the file with the markers")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file would change")
    options = parser.parse_args(arguments)
    try:
        try:
            text = options.readme.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{options.readme} cannot be read: {error}") from error
        page = replace_table(text, tables([results.read(path) for path in options.results]), options.readme)
        if options.check:
            if page != text:
                print(f"{options.readme} is not what these results say; run benchmarks/table.py", file=sys.stderr)
            return int(page != text)
        with atomic.write(options.readme) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except CmRuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
