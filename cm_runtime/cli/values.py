"""Option values that are more than one word or number, as Python values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from cm_runtime.sampling import Labels


def labels(text: str | None) -> Labels:
    """all, random, or classes separated by commas. Raises RequestError."""
    if text is None or text == "all" or text == "random":
        return text  # type: ignore[return-value]
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise RequestError(f"--labels takes all, random or classes separated by commas, not {text!r}") from error


def sigmas(text: str | None) -> list[float] | None:
    """Noise levels separated by commas. Raises RequestError."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RequestError(f"--sigmas takes numbers separated by commas, not {text!r}") from error


def micro_batch(text: str | None, batch: int, most: int) -> int:
    """auto: ``batch`` split evenly with at most ``most`` in each; or a whole number. Raises RequestError."""
    from cm_runtime import sampling

    if text is None or text == "auto":
        return sampling.even(max(batch, 1), most)
    try:
        return int(text)
    except ValueError as error:
        raise RequestError(f"--micro-batch takes auto or a whole number, not {text!r}") from error


def threads(count: int | None) -> int:
    """At least 1; None is 0, which engines take as one per core. Raises RequestError."""
    if count is not None and count < 1:
        raise RequestError(f"--threads must be at least 1, not {count}")
    return count or 0
