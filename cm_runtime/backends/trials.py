"""A short trial of several engines on one file: do they draw the same images, and how long does each take?"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime import noise
from cm_runtime.backends.base import Backend
from cm_runtime.backends.measurements import Measurement, Question
from cm_runtime.choices import Precision
from cm_runtime.errors import CmRuntimeError, EngineError

LOG = logging.getLogger("cm_runtime")
ROUNDS, SECONDS = 3, 0.15  # of measuring, and of an engine's turn in each
PAUSE = 0.2  # seconds: ONNX Runtime's threads look for work until then, and would slow another engine down
CLOSE = 1.05  # ratio of two engines' times below which it matters little which is taken
BUSY = 0.1  # of the time of a measurement, that threads waited for a core
MOST_LEVELS = 1.001  # grey levels of 255 that an engine in fp32 may move an image by; the rest is rounding
LEAST_PSNR = 40.0  # dB that an engine's images agree to in half precision, as those of exports do
LOW_SIGMA = 0.1  # a level near the data, where f is nearly its input
COMPARED = 2  # images that are compared at every level


def drop_differing(engines: Mapping[str, Backend], question: Question) -> dict[str, Backend]:
    """Leave out engines that fail or draw other images than the first, each with a warning.

    Raises EngineError where the first fails: it is what exports are proved with.
    """
    first, *others = engines
    reference = _images(engines[first], question)
    agreeing = {first: engines[first]}
    for name in others:
        try:
            compare(reference, _images(engines[name], question), question.manifest.precision, first)
        except CmRuntimeError as error:
            LOG.warning("auto does without %s: %s", name, error)
        else:
            agreeing[name] = engines[name]
    return agreeing


def _images(engine: Backend, question: Question) -> list[NDArray[np.float64]]:
    """Draw the measured inputs, and a few images at the levels of two steps and at a low one, in grey levels.

    -127.5 is black, 127.5 white.
    Each level's input is the image before it with new noise, as a request has it, so that what moves an image at one
    level moves it on.
    """
    manifest, count = question.manifest, min(question.batch, COMPARED)
    x0 = _run(engine, feed := _feed(question))
    if manifest.graph == "sampler":
        return [x0 - np.float64(127.5)]
    images = [x0 * np.float64(127.5)]
    low = min(max(LOW_SIGMA, manifest.sigma_min), manifest.sigma_max)
    label = feed["label"][:count] if "label" in feed else None
    x0 = np.zeros((count, *manifest.image_shape), np.float32)
    for k, sigma in enumerate((*manifest.noise_range.levels(2, manifest.sigmas), low)):
        z = noise.normal(0, np.arange(count, dtype=np.uint64), k, manifest.image_shape)
        x0 = engine.denoise(np.nan_to_num(x0).clip(-1, 1) + np.float32(sigma) * z, sigma, label)
        images.append(x0 * np.float64(127.5))
    return images


def compare(
    reference: Sequence[NDArray[np.float64]], images: Sequence[NDArray[np.float64]], precision: Precision, first: str
) -> None:
    """Raise EngineError where an engine moves an image: in fp32 by over a grey level, in halves beyond 40 dB.

    Beyond black and white, where f is not clamped, a level is relative.
    """
    pairs = list(zip(reference, images, strict=True))
    if precision == "fp32":
        levels = float(np.max([(np.abs(b - a) / np.maximum(1, np.abs(a) / 127.5)).max() for a, b in pairs]))
        if not levels <= MOST_LEVELS:
            raise EngineError(f"its images are {levels:.3g} grey levels from those of {first}, more than one")
        return
    worst = max(float(np.mean((b.clip(-127.5, 127.5) - a.clip(-127.5, 127.5)) ** 2)) for a, b in pairs)
    psnr = 10 * math.log10(255**2 / max(worst, 1e-9))
    if not (psnr >= LEAST_PSNR and all(np.isfinite(b).all() for _, b in pairs)):
        raise EngineError(f"its images are {psnr:.3g} dB from those of {first}, less than {LEAST_PSNR:g}")


def measure(engines: Mapping[str, Backend], question: Question, before: Measurement | None) -> Measurement:
    """Time the engines in turns. before: an earlier measurement, which was noisy."""
    feed = _feed(question)
    times: dict[str, list[float]] = {name: [] for name in engines}
    start, waiting = time.perf_counter(), _waiting_seconds()
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            times[name] += _turn(engine, feed)
    is_busy = _waiting_seconds() - waiting > BUSY * (time.perf_counter() - start)
    return rank(times, is_busy, before)


def rank(times: Mapping[str, Sequence[float]], is_busy: bool, before: Measurement | None) -> Measurement:
    """Rank engines by their medians; of two noisy measurements the less disturbed time of each engine counts."""
    seconds = {name: statistics.median(each) for name, each in times.items()}
    best, second = sorted(seconds, key=seconds.__getitem__)[:2]
    overlaps = statistics.quantiles(times[best])[2] > statistics.quantiles(times[second])[0]
    is_noisy = is_busy or (overlaps and seconds[second] > CLOSE * seconds[best])
    if before and is_noisy:
        seconds = {name: min(each, before.seconds.get(name, each)) for name, each in seconds.items()}
    return Measurement(seconds=seconds, tries=before.tries + 1 if before else 1, is_noisy=is_noisy)


def _turn(engine: Backend, feed: Mapping[str, NDArray[Any]]) -> list[float]:
    """Seconds of each of a few runs, after one that is not timed."""
    time.sleep(PAUSE)
    _run(engine, feed)
    seconds: list[float] = []
    while sum(seconds) < SECONDS:
        start = time.perf_counter()
        _run(engine, feed)
        seconds.append(time.perf_counter() - start)
    return seconds


def _feed(question: Question) -> dict[str, NDArray[Any]]:
    """Inputs of one run, under the names of `draw`'s and `denoise`'s parameters."""
    manifest, index = question.manifest, np.arange(question.batch, dtype=np.uint64)
    feed: dict[str, NDArray[Any]]
    if manifest.graph == "sampler":
        feed = {"noise": noise.normals(0, index, manifest.steps, manifest.image_shape)}
    else:
        feed = {"x": noise.normal(0, index, 0, manifest.image_shape), "sigma": np.ones(question.batch, np.float32)}
    if manifest.num_classes:
        feed["label"] = (index % np.uint64(manifest.num_classes)).astype(np.int64)
    return feed


def _run(engine: Backend, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    return engine.draw(**feed) if "noise" in feed else engine.denoise(**feed)


def _waiting_seconds() -> float:
    """Seconds that threads of this process were ready to run and had no core; 0 where the kernel does not count."""
    total = 0.0
    with suppress(OSError, ValueError, IndexError):
        for thread in Path("/proc/self/task").iterdir():
            with suppress(FileNotFoundError):  # it ended
                total += int((thread / "schedstat").read_text().split()[1]) / 1e9
    return total
