"""The fastest installed engine for a file, by a short measurement that is remembered.

What a busy machine disturbed is measured again when it is next asked for, `measurements.MOST_TRIES` times in all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from cm_runtime.backends import measurements, trials
from cm_runtime.backends.base import Backend, images_at_once
from cm_runtime.backends.measurements import Question
from cm_runtime.errors import ArtifactError, CmRuntimeError, EngineError
from cm_runtime.extras import EXTRAS, has, require
from cm_runtime.manifest import Manifest

LOG = logging.getLogger("cm_runtime")  # a warning is one line on standard error, unless somebody listens
PROGRESS = logging.getLogger("cm_runtime.progress")  # of its own, so that --quiet can silence it
LARGEST_BATCH = 8  # engines rank alike from there on
PACKAGES = {"ort": "onnxruntime", "openvino": "openvino"}


def candidates(manifest: Manifest, device: str, precision: str) -> tuple[str, ...]:
    """The installed engines that can run a graph on ``device`` in ``precision``; the first where none is measured.

    ONNX Runtime computes in the file's own types, on a GPU those of fp32 in tf32 too, and its CPU has no convolution in
    bf16; OpenVINO has the CPU alone, and there fp32 and bf16, whatever the types.
    """
    if manifest.target == "cuda" and device == "cpu":
        return ()
    names = []
    own = {"auto", manifest.precision} | ({"tf32"} if device != "cpu" and manifest.precision == "fp32" else set())
    if precision in own and not (device == "cpu" and manifest.precision == "bf16"):
        names.append("ort")
    if device == "cpu" and precision in ("auto", "fp32", "bf16"):
        names.append("openvino")
    return tuple(name for name in names if has(PACKAGES[name]))


def question(
    path: Path, manifest: Manifest, device: str, threads: int = 0, precision: str = "auto", batch: int | None = None
) -> Question:
    """State the choice to be made for a file. batch: of a request, as far as it is known."""
    most = images_at_once(manifest, device)
    size = min(most if batch is None else max(1, batch), most, LARGEST_BATCH)
    return Question(path, manifest, candidates(manifest, device, precision), device, threads, precision, size)


def fastest(question: Question, open_engine: Callable[[str], Backend]) -> Backend:
    """Open the fastest engine.

    The first engine is what exports are proved with. Another that fails or makes other images is left out, and so is
    whichever cannot start, in one line on standard error; a file that any of them calls damaged is refused.

    Raises:
        CmRuntimeError: The first engine's, where none starts, and where it starts but fails.
    """
    if not question.names:
        require(_package(question), f"running {question.path}")
        raise EngineError(f"no installed engine runs {question.path} on {question.device} in {question.precision}")
    if len(question.names) == 1:
        return open_engine(question.names[0])
    before = measurements.load(question)
    if before is not None and before.is_final:
        return next(iter(_start(before.seconds, open_engine, most=1).values()))
    engines = _start(question.names, open_engine)
    if len(engines) > 1:
        when = "again, as the machine was busy," if before else "once"
        PROGRESS.warning("measuring %s which engine is faster for %s: %s", when, question.path, " or ".join(engines))
    engines = trials.drop_differing(engines, question)
    if len(engines) == 1:
        return next(iter(engines.values()))
    measurement = trials.measure(engines, question, before)
    measurements.save(question, measurement)
    return engines[next(iter(measurement.seconds))]


def _start(names: Iterable[str], open_engine: Callable[[str], Backend], most: int | None = None) -> dict[str, Backend]:
    """Start engines in order, up to ``most`` of them; warn of those that do not. Raises the first's error if none does.

    ArtifactError is raised by any: what one engine calls damaged, no other should draw from.
    """
    engines: dict[str, Backend] = {}
    failures: dict[str, CmRuntimeError] = {}
    for name in names:
        if len(engines) == most:
            break
        try:
            engines[name] = open_engine(name)
        except ArtifactError:
            raise
        except CmRuntimeError as error:
            failures[name] = error
    if not engines:
        raise next(iter(failures.values()))
    for name, failure in failures.items():
        LOG.warning("auto does without %s: %s", name, failure)
    return engines


def explain(question: Question) -> str:
    """Say which engine auto would choose and why, without loading or measuring anything."""
    if not question.names:
        if has(_package(question)):
            return f"no installed engine runs it on {question.device} in {question.precision}"
        return f"no installed engine: pip install 'cm-runtime[{EXTRAS[_package(question)]}]'"
    where = f"{' or '.join(question.names)}, device {question.device}"
    if len(question.names) == 1:
        return f"{where}: no other installed engine can"
    measurement = measurements.load(question)
    if measurement is None:
        return f"{where}: whichever is faster; measured on first use"
    again = "" if measurement.is_final else "; the machine was busy, so it is measured again on next use"
    best = next(iter(measurement.seconds))
    return f"{best}, device {question.device}: measured at batch {question.batch}: {measurement}{again}"


def _package(question: Question) -> str:
    """The package to install where no installed engine can."""
    is_bf16 = "bf16" in (question.precision, question.manifest.precision)
    return PACKAGES["openvino" if is_bf16 and question.device == "cpu" else "ort"]
