"""The findings of a check as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def table(content: dict[str, Any]) -> str:
    """Tables of bandwidth and races, a line for each file of tests, and what is missing, last."""
    gpu = next((run["gpu"] for run in content["runs"]), None)
    lines = [f"{gpu['name']}, compute capability {gpu['capability']}" if gpu else "no GPU: host mode"]
    results = {name: entry["result"] for name, entry in content["findings"].items() if "result" in entry}
    lines += [f"- {name}: {each['summary']} ({each['where']})" for name, each in results.items() if "summary" in each]
    for name, each in results.items():
        if "ms" in each:
            lines += _race(name, each)
        elif "summary" not in each:
            lines += _bandwidth(name, each)
    lines.append("")
    lines += [f"- not done: {name}: {e['failed']}" for name, e in content["findings"].items() if "failed" in e]
    lines += [f"- skipped: {part}: {why}" for part, why in content["skipped"].items()]
    return "\n".join(lines)


def _race(name: str, result: dict[str, Any]) -> Iterator[str]:
    bases = list(dict.fromkeys(base for each in result["speedup"].values() for base in each))
    yield from ("", f"| {name} | ms | grey levels off | outside | {' | '.join(f'over {base}' for base in bases)} |")
    yield "| --- " + "| ---: " * (3 + len(bases)) + "|"
    for contender, ms in result["ms"].items():
        outside = result["outside"].get(contender, "")
        outside = f"{outside:.1%}" if isinstance(outside, float) else outside
        speedups = [_range(result["speedup"].get(contender, {}).get(base)) for base in bases]
        row = [contender, _range(ms), f"{result['grey'][contender]:.3f}", outside, *speedups]
        yield f"| {' | '.join(row)} |"
    yield from (f"- no {contender}: {why}" for contender, why in result["absent"].items())
    yield from (f"- no {contender}: not ready in time" for contender in result["late"])


def _bandwidth(name: str, result: dict[str, Any]) -> Iterator[str]:
    yield from ("", f"| {name} | MB | ms | GB/s | of copy |", "| --- | ---: | ---: | ---: | ---: |")
    for row, each in result.items():
        times = f"{each['times']} x {row}" if "times" in each else row
        numbers = (each.get("MB", ""), each["ms"], each.get("GB/s", ""), _range(each.get("of copy")))
        yield f"| {times} | {' | '.join(map(str, numbers))} |"


def _range(quartiles: list[float] | None) -> str:
    if not quartiles:
        return ""
    middle, low, high = (f"{q:.4g}" for q in quartiles)
    return f"{middle} [{low}, {high}]"
