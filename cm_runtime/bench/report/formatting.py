"""Numbers and names from a result file as text. The file is anybody's: nothing here fails, whatever it holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from cm_runtime.bench.results import Estimate

DASH = "–"  # noqa: RUF001 (an en dash: nothing was measured)
_UNITS = ("B", "kB", "MB", "GB", "TB")


def clean(text: object, limit: int = 400) -> str:
    """One line of printable characters, shortened to ``limit`` of them."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def number(value: float) -> float:
    """As a float; infinite where an integer is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _places(value: float, significant: int) -> int | None:
    """Decimals that show ``significant`` digits; None where only an exponent does."""
    if value == 0:
        return 0
    if not 1e-3 <= abs(value) < 1e7:
        return None
    return max(0, significant - 1 - math.floor(math.log10(abs(value))))


def _format(value: float, places: int | None, significant: int) -> str:
    if not math.isfinite(value):
        return "∞"
    if places is not None:
        return f"{value:.{places}f}"
    mantissa, _, exponent = f"{value:.{significant - 1}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def digits(value: float | None, significant: int = 3) -> str:
    """12.3, 0.0123, 1.23e-6; integers as they are."""
    if value is None:
        return DASH
    if isinstance(value, int) and abs(value) < 10**12:
        return str(value)
    return _format(number(value), _places(number(value), significant), significant)


def bounds(estimate: Estimate) -> str:
    """``[low, high]`` to the decimals of the value, or nothing where there are none."""
    if estimate.low is None or estimate.high is None:
        return ""
    places = _places(estimate.value, 4)
    return f"[{_format(estimate.low, places, 4)}, {_format(estimate.high, places, 4)}]"


def interval(estimate: Estimate | None) -> str:
    """3.214 [3.201, 3.230]."""
    return DASH if estimate is None else f"{digits(estimate.value, 4)} {bounds(estimate)}".rstrip()


def share(value: float | None) -> str:
    """41.2%."""
    if value is None:
        return DASH
    return f"{digits(100 * value, 2)}%" if 100 * abs(value) < 10 else f"{digits(100 * value)}%"


def size(count: int | None) -> str:
    """Bytes in decimal units: 212 MB."""
    if count is None:
        return DASH
    value, unit = number(count), 0
    while abs(value) >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{digits(value)} {_UNITS[unit]}"


def spread(values: Sequence[float]) -> tuple[str, str]:
    """The median, and the extremes where there are several: 1.82, (1.79 to 1.90)."""
    if not values:
        return DASH, ""
    extremes = f"({digits(min(values))} to {digits(max(values))})" if len(values) > 1 else ""
    return digits(statistics.median(values)), extremes


def times(value: float) -> str:
    """A ratio: 0.93, 1.30, 21.7."""
    return f"{value:.2f}" if 0.1 <= value < 10 else digits(value)


def head(text: object, limit: int) -> str:
    """The first ``limit`` characters: of a date, of a checksum."""
    return clean(text)[:limit]


def short(commit: str) -> str:
    """The first ten digits of a commit, and the + of a tree that had changes."""
    line = clean(commit)
    return line[:10] + "+" * (len(line) > 10 and line.endswith("+"))
