"""Option values that are more than one word or number, as Python values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from cm_runtime.request import Labels


def labels(text: str | None) -> Labels:
    """all, random, classes separated by commas, or CLASS:COUNT so separated. Raises RequestError."""
    if text is None or text == "all" or text == "random":
        return text  # type: ignore[return-value]
    try:
        if ":" not in text:
            return [int(part) for part in text.split(",")]
        counts: dict[int, int] = {}
        for part in text.split(","):
            label, count = map(int, part.split(":"))
            if label in counts:
                raise RequestError(f"--labels counts class {label} twice")
            counts[label] = count
        return counts
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(
            f"--labels takes all, random, classes separated by commas, or CLASS:COUNT so separated, not {text!r}"
        ) from error


def numbers(option: str, text: str) -> list[float]:
    """Numbers separated by commas, the value of ``option``. Raises RequestError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RequestError(f"{option} takes numbers separated by commas, not {text!r}") from error


def whole_numbers(option: str, text: str) -> list[int]:
    """Whole numbers separated by commas, the value of ``option``. Raises RequestError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise RequestError(f"{option} takes whole numbers separated by commas, not {text!r}") from error


def whole_number(option: str, text: str) -> int:
    """One whole number, the value of ``option``. Raises RequestError."""
    try:
        return int(text)
    except ValueError as error:
        raise RequestError(f"{option} takes a whole number, not {text!r}") from error


def micro_batch(text: str | None, images: int, most: int) -> int:
    """auto: ``images`` split evenly with at most ``most`` in each; or a whole number. Raises RequestError."""
    from cm_runtime.request import even_micro_batch

    if text is None or text == "auto":
        return even_micro_batch(max(images, 1), most)
    try:
        return int(text)
    except ValueError as error:
        raise RequestError(f"--micro-batch takes auto or a whole number, not {text!r}") from error


def threads(count: int | None) -> int:
    """At least 1; None is 0, which engines take as one per core. Raises RequestError."""
    if count is not None and count < 1:
        raise RequestError(f"--threads must be at least 1, not {count}")
    return count or 0


def share(option: str, text: str) -> float:
    """A percentage from 0 to 100 as a share: 5% or 5 -> 0.05. Raises RequestError."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError as error:
        raise RequestError(f"{option} takes a percentage, as 5%, not {text!r}") from error
    if not 0 <= number <= 100:
        raise RequestError(f"{option} takes a percentage from 0% to 100%, not {text!r}")
    return number / 100
