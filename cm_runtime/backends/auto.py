"""The fastest installed engine for a file, by a short measurement that is remembered.

What is remembered is keyed by the file's content, the machine, the number of threads, the precision, the batch and the
versions of all engines: whatever of it changes, it is measured anew, and the images compared. What a busy machine
disturbed is measured again when it is next asked for, `MOST_TRIES` times in all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime import noise
from cm_runtime.backends.base import Backend, images_at_once
from cm_runtime.errors import ArtifactError, CmRuntimeError, EngineError, OutputError
from cm_runtime.errors.reasons import system_reason
from cm_runtime.extras import EXTRAS, has, require
from cm_runtime.files import atomic, streams
from cm_runtime.manifest import Manifest, data_path
from cm_runtime.subprocesses import cores

LOG = logging.getLogger("cm_runtime")  # a warning is one line on standard error, unless somebody listens
PROGRESS = logging.getLogger("cm_runtime.progress")  # of its own, so that --quiet can silence it
FORMAT = 2  # another way to measure or to run an engine is another
ROUNDS, SECONDS = 3, 0.15  # of measuring, and of an engine's turn in each
LARGEST_BATCH = 8  # engines rank alike from there on
PAUSE = 0.2  # seconds: ONNX Runtime's threads look for work until then, and would slow another engine down
MOST_LEVELS = 1.001  # grey levels of 255 that an engine in fp32 may move an image by; the rest is rounding
LEAST_PSNR = 40.0  # dB that an engine's images agree to in half precision, as those of exports do
LOW_SIGMA = 0.1  # a level near the data, where f is nearly its input
COMPARED = 2  # images that are compared at every level
MOST_TRIES = 3
CLOSE = 1.05  # ratio of two engines' times below which it matters little which is taken
BUSY = 0.1  # of the time of a measurement, that threads waited for a core
PACKAGES = {"ort": "onnxruntime", "openvino": "openvino"}
DISTRIBUTIONS = {"ort": ("onnxruntime", "onnxruntime-gpu"), "openvino": ("openvino",)}


@dataclass(frozen=True)
class Question:
    """Which of ``names`` is fastest for this file, and all that the answer depends on."""

    path: Path
    manifest: Manifest
    names: tuple[str, ...]
    device: str
    threads: int
    precision: str
    batch: int

    @property
    def key(self) -> str:
        """A hash of it. A data file is called by its content's, so only its size is asked."""
        data = data_path(self.path, self.manifest)
        told = {
            "file": atomic.sha256(self.path),
            "data": data.stat().st_size if data else 0,
            "format": FORMAT,
            "engines": {name: version(name) for name in self.names},
            "processor": _processor(),
            "cores": cores(),
            "device": self.device,
            "threads": self.threads,
            "precision": self.precision,
            "batch": self.batch,
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """seconds: of one run, by engine; the fastest first. was_remembered: in an earlier process.

    tries: measurements so far. is_noisy: the machine was too busy for the ranking to be sure.
    """

    seconds: dict[str, float]
    was_remembered: bool = field(default=True, compare=False)
    tries: int = 1
    is_noisy: bool = False

    @property
    def is_final(self) -> bool:
        """False where it is worth measuring again."""
        return not self.is_noisy or self.tries >= MOST_TRIES

    def __str__(self) -> str:
        return ", ".join(f"{name} {taken * 1e3:.3g} ms" for name, taken in self.seconds.items())


def candidates(manifest: Manifest, device: str, precision: str) -> tuple[str, ...]:
    """The installed engines that can run a graph on ``device`` in ``precision``; the first where none is measured.

    ONNX Runtime computes in the file's own types, and its CPU has no convolution in bf16; OpenVINO has the CPU alone,
    and there fp32 and bf16, whatever the types.
    """
    found = []
    if precision in ("auto", manifest.precision) and not (device == "cpu" and manifest.precision == "bf16"):
        found.append("ort")
    if device == "cpu" and precision in ("auto", "fp32", "bf16"):
        found.append("openvino")
    installed = tuple(name for name in found if has(PACKAGES[name]))
    return installed


def question(
    path: Path, manifest: Manifest, device: str, threads: int = 0, precision: str = "auto", batch: int | None = None
) -> Question:
    """batch: of a request, as far as it is known."""
    most = images_at_once(manifest, device)
    size = min(most if batch is None else max(1, batch), most, LARGEST_BATCH)
    return Question(path, manifest, candidates(manifest, device, precision), device, threads, precision, size)


def fastest(asked: Question, open_engine: Callable[[str], Backend]) -> Backend:
    """The fastest engine, open. Raises the first engine's error where none starts, and where it starts but fails.

    The first engine is what exports are proved with. Another that fails or makes other images is left out, and so is
    whichever cannot start, in one line on standard error; a file that any of them calls damaged is refused.
    """
    if not asked.names:
        require(_wanted(asked), f"running {asked.path}")
        raise EngineError(f"no installed engine runs {asked.path} on {asked.device} in {asked.precision}")
    if len(asked.names) == 1:
        return open_engine(asked.names[0])
    known = remembered(asked)
    if known is None or not known.is_final:
        return _measured(asked, open_engine, known)
    engines, failures = _started(tuple(known.seconds), open_engine, most=1)
    _tell(failures)
    return next(iter(engines.values()))


def remembered(asked: Question) -> Answer | None:
    """What was measured before; None where nothing was, or what is kept is not to be believed."""
    try:
        kept = json.loads(streams.read_text(_folder() / f"{asked.key}.json", ArtifactError, 1 << 16))
        seconds = {str(name): float(taken) for name, taken in kept["seconds"].items()}
        tries, is_noisy = int(kept["tries"]), bool(kept["is_noisy"])
    except (ArtifactError, OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError):
        return None
    if not seconds or not set(seconds) <= set(asked.names) or not all(0 < s < math.inf for s in seconds.values()):
        return None
    return Answer(_ranked(seconds), tries=tries, is_noisy=is_noisy)


def forget() -> int:
    """Delete all remembered measurements; their number. Raises OutputError where one cannot be deleted."""
    try:
        kept = sorted(_folder().glob("*.json"))
        for path in kept:
            path.unlink(missing_ok=True)
    except RuntimeError:  # there is no home folder
        return 0
    except OSError as error:
        raise OutputError(f"{_folder()}: its files cannot be deleted: {system_reason(error)}") from error
    return len(kept)


def said(asked: Question) -> str:
    """What auto would choose and why, without loading or measuring anything."""
    if not asked.names:
        if has(_wanted(asked)):
            return f"no installed engine runs it on {asked.device} in {asked.precision}"
        return f"no installed engine: pip install 'cm-runtime[{EXTRAS[_wanted(asked)]}]'"
    if len(asked.names) == 1:
        return f"{asked.names[0]}, device {asked.device}: no other installed engine can"
    known = remembered(asked)
    if known is None:
        return f"{' or '.join(asked.names)}, device {asked.device}: whichever is faster; measured on first use"
    again = "" if known.is_final else "; the machine was busy, so it is measured again on next use"
    return f"{next(iter(known.seconds))}, device {asked.device}: measured at batch {asked.batch}: {known}{again}"


def _wanted(asked: Question) -> str:
    """The package to install where no installed engine can."""
    is_bf16 = "bf16" in (asked.precision, asked.manifest.precision)
    return PACKAGES["openvino" if is_bf16 and asked.device == "cpu" else "ort"]


def version(name: str) -> str:
    """Of an installed engine."""
    found = []
    for distribution in DISTRIBUTIONS[name]:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{distribution} {metadata.version(distribution)}")
    return ", ".join(found) or f"{PACKAGES[name]}, of no known version"


def _measured(asked: Question, open_engine: Callable[[str], Backend], before: Answer | None = None) -> Backend:
    """The fastest by a measurement, which is remembered. before: an earlier one, which was noisy."""
    engines, failures = _started(asked.names, open_engine)
    if len(engines) > 1:
        when = "again, as the machine was busy," if before else "once"
        PROGRESS.warning("measuring %s which engine is faster for %s: %s", when, asked.path, " or ".join(engines))
    feed = _feed(asked)
    first, *others = engines
    expected = _images(engines[first], asked, feed)
    for name in others:
        try:
            _compare(expected, _images(engines[name], asked, feed), asked.manifest, first)
        except CmRuntimeError as error:
            failures[name] = error
            del engines[name]
    _tell(failures)
    if len(engines) == 1:
        return engines[first]
    taken: dict[str, list[float]] = {name: [] for name in engines}
    began, waited = time.perf_counter(), _waited()
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            taken[name] += _turn(engine, feed)
    is_busy = _waited() - waited > BUSY * (time.perf_counter() - began)
    answer = _answer(taken, is_busy, before)
    _remember(asked, answer)
    return engines[next(iter(answer.seconds))]


def _answer(taken: Mapping[str, Sequence[float]], is_busy: bool, before: Answer | None) -> Answer:
    """The ranking by medians; of two noisy measurements the less disturbed time of each engine."""
    seconds = {name: statistics.median(each) for name, each in taken.items()}
    best, second = sorted(seconds, key=seconds.__getitem__)[:2]
    overlaps = statistics.quantiles(taken[best])[2] > statistics.quantiles(taken[second])[0]
    is_noisy = is_busy or (overlaps and seconds[second] > CLOSE * seconds[best])
    if before and is_noisy:
        seconds = {name: min(each, before.seconds.get(name, each)) for name, each in seconds.items()}
    return Answer(_ranked(seconds), was_remembered=False, tries=before.tries + 1 if before else 1, is_noisy=is_noisy)


def _ranked(seconds: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def _waited() -> float:
    """Seconds that threads of this process were ready to run and had no core; 0 where the kernel does not count."""
    total = 0.0
    with suppress(OSError, ValueError, IndexError):
        for thread in Path("/proc/self/task").iterdir():
            with suppress(FileNotFoundError):  # it ended
                total += int((thread / "schedstat").read_text().split()[1]) / 1e9
    return total


def _images(engine: Backend, asked: Question, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[np.float64]]:
    """What an engine makes of the measured inputs, and of a few images at the levels of two steps and at a low one.

    Each level's input is the image before it with new noise, as a request has it, so that what moves an image at one
    level moves it on.
    """
    made = [_run(engine, feed).astype(np.float64)]
    manifest, count = asked.manifest, min(asked.batch, COMPARED)
    if manifest.graph == "sampler":
        return made
    low = min(max(LOW_SIGMA, manifest.sigma_min), manifest.sigma_max)
    levels = manifest.noise_range.levels(2, manifest.sigmas)
    label = feed["label"][:count] if "label" in feed else None
    image = np.zeros((count, *manifest.image_shape), np.float32)
    for k, sigma in enumerate((*levels, low)):
        z = noise.normal(0, np.arange(count, dtype=np.uint64), k, manifest.image_shape)
        x0 = engine.denoise(image + np.float32(sigma) * z, sigma, label)
        made.append(x0.astype(np.float64))
        image = np.nan_to_num(x0).clip(-1, 1)
    return made


def _compare(
    expected: Sequence[NDArray[np.float64]], images: Sequence[NDArray[np.float64]], manifest: Manifest, first: str
) -> None:
    """Raise EngineError where an engine moves an image: in fp32 by over a grey level, in halves beyond 40 dB.

    Beyond black and white, where f is not clamped, a level is relative.
    """
    pairs = [(_grey(a, manifest), _grey(b, manifest)) for a, b in zip(expected, images, strict=True)]
    if manifest.precision == "fp32":
        levels = float(np.max([(np.abs(b - a) / np.maximum(1, np.abs(a) / 127.5)).max() for a, b in pairs]))
        if not levels <= MOST_LEVELS:
            raise EngineError(f"its images are {levels:.3g} grey levels from those of {first}, more than one")
        return
    errors = [b.clip(-127.5, 127.5) - a.clip(-127.5, 127.5) for a, b in pairs]
    worst = max(float(np.mean(each**2)) for each in errors)
    psnr = 10 * math.log10(255**2 / max(worst, 1e-9))
    if not (psnr >= LEAST_PSNR and all(np.isfinite(b).all() for _, b in pairs)):
        raise EngineError(f"its images are {psnr:.3g} dB from those of {first}, less than {LEAST_PSNR:g}")


def _grey(values: NDArray[np.float64], manifest: Manifest) -> NDArray[np.float64]:
    """Images in grey levels from the middle: -127.5 is black, 127.5 white."""
    return values - 127.5 if manifest.graph == "sampler" else values * 127.5


def _started(
    names: tuple[str, ...], open_engine: Callable[[str], Backend], most: int | None = None
) -> tuple[dict[str, Backend], dict[str, CmRuntimeError]]:
    """Those that start, in order, up to ``most``; and why others do not. Raises the first's error where none does."""
    engines: dict[str, Backend] = {}
    failures: dict[str, CmRuntimeError] = {}
    for name in names:
        if most is not None and len(engines) == most:
            break
        try:
            engines[name] = open_engine(name)
        except ArtifactError:
            raise  # what one engine calls damaged, no other should draw from
        except CmRuntimeError as error:
            failures[name] = error
    if not engines:
        raise next(iter(failures.values()))
    return engines, failures


def _tell(failures: Mapping[str, CmRuntimeError]) -> None:
    for name, error in failures.items():
        LOG.warning("auto does without %s: %s", name, error)


def _feed(asked: Question) -> dict[str, NDArray[Any]]:
    """Inputs of one run."""
    index = np.arange(asked.batch, dtype=np.uint64)
    shape = asked.manifest.image_shape
    feed: dict[str, NDArray[Any]]
    if asked.manifest.graph == "sampler":
        feed = {"noise": noise.normals(0, index, asked.manifest.steps, shape)}
    else:
        sigma = np.full(asked.batch, 1.0, np.float32)
        feed = {"x": noise.normal(0, index, 0, shape), "sigma": sigma}
    if asked.manifest.num_classes:
        feed["label"] = (index % np.uint64(asked.manifest.num_classes)).astype(np.int64)
    return feed


def _turn(engine: Backend, feed: Mapping[str, NDArray[Any]]) -> list[float]:
    """Seconds of each of a few runs, after one that is not timed."""
    time.sleep(PAUSE)
    _run(engine, feed)
    taken: list[float] = []
    while sum(taken) < SECONDS:
        began = time.perf_counter()
        _run(engine, feed)
        taken.append(time.perf_counter() - began)
    return taken


def _run(engine: Backend, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """One run, what it makes checked."""
    if "noise" in feed:
        return engine.draw(feed["noise"], feed.get("label"))
    return engine.denoise(feed["x"], feed["sigma"], feed.get("label"))


def _remember(asked: Question, answer: Answer) -> None:
    """A cache that cannot be written is none."""
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        with atomic.write(_folder() / f"{asked.key}.json") as temporary:
            kept = {"tries": answer.tries, "is_noisy": answer.is_noisy, "batch": asked.batch}
            temporary.write_text(json.dumps({"seconds": answer.seconds, **kept}), encoding="utf-8")
    except (OSError, OutputError, RuntimeError) as error:  # the last where there is no home folder
        LOG.debug("the choice of an engine cannot be kept: %s", error)


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cm-runtime" / "engines"


def _processor() -> str:
    """As the kernel calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
