"""Option values that are more than one word or number, as Python values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cm_runtime.manifest import Manifest
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


def levels(
    manifest: Manifest, steps: int | None, sigmas: str | None, ts: str | None, timesteps: str | None, grid: int | None
) -> Sequence[float] | None:
    """The noise levels that --sigmas, or --ts or --timesteps on a --grid, ask of a model; None where none is given.

    The grid spans the model's own sigma_min and sigma_max, with its rho. Raises RequestError, also where more than one
    of those and --steps is given.
    """

    ways = {"steps": steps, "sigmas": sigmas, "ts": ts, "timesteps": timesteps}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise RequestError(f"give {' or '.join(given)}, {'not both' if len(given) == 2 else 'only one of them'}")
    if ts is not None:
        return manifest.noise_range.from_ts(whole_numbers("--ts", ts), _training_grid("--ts", grid))
    if timesteps is not None:
        asked = whole_numbers("--timesteps", timesteps)
        return manifest.noise_range.from_timesteps(asked, _training_grid("--timesteps", grid))
    if grid is not None:
        raise RequestError("--grid is what --ts or --timesteps count in; give one of them, or leave --grid out")
    return None if sigmas is None else numbers("--sigmas", sigmas)


def _training_grid(option: str, grid: int | None) -> int:
    if grid is None:
        raise RequestError(
            f"{option} needs --grid, the points of the model's training grid: 40 for OpenAI's CD models,"
            " 201 for ct_imagenet64, 151 for CT at 256"
        )
    return grid


def micro_batch(text: str | None, batch: int, most: int) -> int:
    """auto: ``batch`` split evenly with at most ``most`` in each; or a whole number. Raises RequestError."""
    from cm_runtime.request import even_micro_batch

    if text is None or text == "auto":
        return even_micro_batch(max(batch, 1), most)
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
