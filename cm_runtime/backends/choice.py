"""The fastest installed engine for a file, by a short measurement that is remembered.

What is remembered is keyed by the file's content, the machine, the number of threads, the precision, the batch and the
versions of all engines: whatever of it changes, it is measured anew, and the images compared.
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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime import bounded, files, noise
from cm_runtime.artifact import Manifest, data_path
from cm_runtime.backends.base import Backend, images_at_once
from cm_runtime.errors import ArtifactError, CmRuntimeError, EngineError, OutputError
from cm_runtime.extras import EXTRAS, has, require
from cm_runtime.process import cores

LOG = logging.getLogger("cm_runtime")  # a warning is one line on standard error, unless somebody listens
FORMAT = 1  # another way to measure or to run an engine is another
ROUNDS, SECONDS = 3, 0.15  # of measuring, and of an engine's turn in each
LARGEST_BATCH = 8  # engines rank alike from there on
PAUSE = 0.2  # seconds: ONNX Runtime's threads look for work until then, and would slow another engine down
AGREEMENT = {  # in fp32 or not: of images in [-1, 1], or of a sampler grey levels
    True: {"denoiser": 1e-3, "sampler": 1.0, "network": 1e-3},
    False: {"denoiser": 0.1, "sampler": 12.0, "network": 0.1},
}
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
            "file": files.sha256(self.path),
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
    """seconds: of one run, by engine; the fastest first. was_remembered: in an earlier process."""

    seconds: dict[str, float]
    was_remembered: bool = field(default=True, compare=False)

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
    if known is None:
        return _measured(asked, open_engine)
    engines, failures = _started(tuple(known.seconds), open_engine, most=1)
    _tell(failures)
    return next(iter(engines.values()))


def remembered(asked: Question) -> Answer | None:
    """What was measured before; None where nothing was, or what is kept is not to be believed."""
    try:
        said = json.loads(bounded.read_text(_folder() / f"{asked.key}.json", ArtifactError, 1 << 16))["seconds"]
        seconds = {str(name): float(taken) for name, taken in said.items()}
    except (ArtifactError, OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError):
        return None
    if not seconds or not set(seconds) <= set(asked.names) or not all(0 < s < math.inf for s in seconds.values()):
        return None
    return Answer(dict(sorted(seconds.items(), key=lambda item: item[1])))


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
    return f"{next(iter(known.seconds))}, device {asked.device}: measured at batch {asked.batch}: {known}"


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


def _measured(asked: Question, open_engine: Callable[[str], Backend]) -> Backend:
    engines, failures = _started(asked.names, open_engine)
    feed = _feed(asked)
    first, *others = engines
    wanted = _run(engines[first], feed).astype(np.float64)
    for name in others:
        try:
            apart = float(np.abs(_run(engines[name], feed) - wanted).max())
            if not apart <= AGREEMENT[asked.manifest.precision == "fp32"][asked.manifest.graph]:
                raise EngineError(f"its images are {apart:.3g} from those of {first}")
        except CmRuntimeError as error:
            failures[name] = error
            del engines[name]
    _tell(failures)
    if len(engines) == 1:
        return engines[first]
    taken: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            taken[name] += _turn(engine, feed)
    seconds = {name: statistics.median(each) for name, each in taken.items()}
    answer = Answer(dict(sorted(seconds.items(), key=lambda item: item[1])), was_remembered=False)
    _remember(asked, answer)
    return engines[next(iter(answer.seconds))]


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
        with files.written(_folder() / f"{asked.key}.json") as temporary:
            temporary.write_text(json.dumps({"seconds": answer.seconds, "batch": asked.batch}), encoding="utf-8")
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
