"""The parts of a check in the order of their worth, with the findings of each. Names here cost no import."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from gpu.session import Part
from gpu.survey import BASE, ROOT

PRECISIONS = ("fp16", "bf16", "tf32", "fp32")  # in the order of their worth
KERNELS = ("test_noise.py", "test_steps.py", "test_skip_scale.py", "test_group_norm.py")
TORCH = (*BASE, "torch")
EXPORT = (*TORCH, "onnx", "onnxscript")
RACES = {  # part -> contenders, the baseline first; names of `gpu.contenders`
    "torch": ("torch", "cm-runtime torch", "torch.compile"),
    "onnxruntime": ("torch", "cm-runtime onnxruntime", "cm-runtime onnxruntime, standard operators", "onnxruntime"),
    "tensorrt": ("torch", "cm-runtime tensorrt", "cm-runtime tensorrt-rtx"),
    "compiled": ("torch", "cm-runtime torch.compile", "torch.compile"),
}


@dataclass(frozen=True)
class Options:
    """What is measured.

    device: cuda:0, or cpu for the kernels' host build and engines on the CPU; networks: standing ones, or paths of
    checkpoints; work: for what a call makes; caches: for what later calls take over.
    """

    device: str
    networks: tuple[str, ...]
    batches: tuple[int, ...]
    precisions: tuple[str, ...]
    work: Path = field(default=Path("work"))
    caches: Path = field(default=Path("caches"))


def parts(options: Options) -> tuple[Part, ...]:
    """All parts, what is worth most first. Their limits are seconds of one call."""
    is_gpu = options.device != "cpu"
    gpu = ("GPU", "cuda-bindings") if is_gpu else ("g++", "make")
    device = ("GPU", "cuda-bindings") if is_gpu else ()
    ort = "onnxruntime-gpu" if is_gpu else "onnxruntime"
    return (
        Part("bandwidth", 60, 10, (*TORCH, "GPU", "cuda-bindings"), _bandwidth(options)),
        Part("kernels", 120 if is_gpu else 420, 15, (*BASE, "pytest", *gpu), _tests("kernels", KERNELS, "", options)),
        Part("ops", 60, 15, (*TORCH, "pytest", "GPU", "cuda-bindings"), _tests("ops", gpu_tests(), "gpu", options)),
        Part("torch", 300, 30, (*TORCH, *device, *(["triton"] if is_gpu else [])), _races("torch", options)),
        Part("onnxruntime", 150, 45, (*EXPORT, *device, ort), _races("onnxruntime", options)),
        Part(
            "tensorrt", 150, 60, (*EXPORT, "GPU", "cuda-bindings", "tensorrt|tensorrt-rtx"), _races("tensorrt", options)
        ),
        Part("compiled", 150, 60, (*TORCH, *device, *(["triton"] if is_gpu else [])), _races("compiled", options)),
        Part("sanitizer", 120, 40, (*BASE, "pytest", "GPU", "cuda-bindings", "compute-sanitizer"), _sanitizer(options)),
    )


def gpu_tests() -> tuple[str, ...]:
    """The files of tests, from tests/ on, that have some for a GPU alone."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marks = re.compile(r"^(@|.*\[)pytest\.mark\.gpu", re.MULTILINE)
    return tuple(file.relative_to(ROOT / "tests").as_posix() for file in files if marks.search(file.read_text()))


def _bandwidth(options: Options) -> dict[str, Callable[[float], Any]]:
    steps = {
        f"steps {type}, {count} images of 3x64x64": partial(_call, "bandwidth", "time_steps", type, count)
        for type, count in product(("fp32", "fp16"), (4096, 1, 64))
    }
    norms = {
        f"norms fp16, {network}, batch {batch}": partial(_call, "bandwidth", "time_norms", "fp16", network, batch)
        for batch, network in product((1, 64), options.networks)
    }
    return {f"bandwidth {name}": body for name, body in (steps | norms).items()}


def _tests(part: str, files: tuple[str, ...], mark: str, options: Options) -> dict[str, Callable[[float], Any]]:
    where = "host" if options.device == "cpu" else "gpu"
    folder = "" if part == "ops" else "kernels/"
    return {f"{part} {file}": partial(_call, "suites", "run", folder + file, mark, where) for file in files}


def _sanitizer(options: Options) -> dict[str, Callable[[float], Any]]:
    return {
        f"sanitizer {tool} {file}": partial(_call, "suites", "run_sanitizer", f"kernels/{file}", tool)
        for tool in ("memcheck", "racecheck")
        for file in KERNELS[1:]
    }


def _races(part: str, options: Options) -> dict[str, Callable[[float], Any]]:
    return {
        f"{part} {Path(network).stem}, {precision}, batch {batch}": partial(
            _call, "race", "race", options, (network, precision, batch), RACES[part]
        )
        for precision, batch, network in product(options.precisions, options.batches, options.networks)
    }


def _call(module: str, function: str, *arguments: Any) -> Any:
    """Call a function of ``gpu.module``, which is imported here: the last argument is the seconds left."""
    return getattr(importlib.import_module(f"gpu.{module}"), function)(*arguments)
