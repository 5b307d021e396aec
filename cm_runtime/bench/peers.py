"""Other tools with the same weights: each draws as its users would write it, from noise that it receives.

The loops over steps here belong to those tools. Before a peer is timed, its images are compared with cm-runtime's, so
that a tool's option which came to mean something else is a disagreement and not a wrong time.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.backends import openvino
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends.ort import open_session
from cm_runtime.bench.scenario import PEERS, Peer
from cm_runtime.choices import ComputePrecision
from cm_runtime.errors import CheckpointError, EngineError, RequestError
from cm_runtime.errors.reasons import compiler_reason
from cm_runtime.extras import require
from cm_runtime.sampling import Array, to_nhwc
from cm_runtime.subprocesses import engine_threads

if TYPE_CHECKING:
    import torch

    from cm_runtime.checkpoints.native import Checkpoint

Label = NDArray[np.int64] | None
MOST_STEPS = 1000
RANDN = ("pipelines.consistency_models.pipeline_consistency_models", "schedulers.scheduling_consistency_models")


@dataclass(frozen=True)
class Drawer:
    """A loaded peer. version: of the packages that draw, as "diffusers 0.42.1, torch 2.13.0"."""

    draw: Callable[[Array, Sequence[float], Label], Array]
    version: str

    def __call__(self, z: Array, sigmas: Sequence[float], label: Label = None) -> Array:
        """z (K,N,C,H,W) float32 standard normals, K sigmas, label (N,) -> images (N,H,W,C) float32 in [-1, 1]."""
        return self.draw(z, sigmas, label)


def peer(
    name: Peer,
    checkpoint: Checkpoint | Path,
    work: Path,
    threads: int = 0,
    device: str = "cpu",
    precision: ComputePrecision = "auto",
) -> Drawer:
    """The peer of that name with the weights of a checkpoint, or of a path to one or to an exported file.

    work: where what it loads is written, and removed again; threads: 0 leaves them to the peer, others are the whole
    process's; device: auto, cpu or cuda:N; precision: auto is fp32, IEEE's; half precisions are torch.autocast's, and
    plain exports have fp32 alone. torch.compile compiles when it first draws a batch of some size. Raises
    RequestError with the reason where a peer cannot express the model, EngineError where it cannot run it, here or in
    drawing, and MissingExtraError.
    """
    if name not in PEERS:
        raise RequestError(f"there is no peer {name!r}; they are {', '.join(PEERS)}")
    for package in NEEDED[name]:
        if package == "openvino":
            openvino.package()
        else:
            require(package, f"the peer {name}")
    from cm_runtime.backends.torch import find_device, set_threads

    where = find_device(device)
    set_threads(EngineOptions(threads=threads).threads)
    source = _load_checkpoint(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=work) as folder:
        if name == "diffusers":
            return _compute_in(precision, where, _diffusers(source, Path(folder), str(where)))
        if name in ("torch", "torch.compile"):
            return _compute_in(precision, where, _torch(source, where, is_compiled=name == "torch.compile"))
        if precision not in ("auto", "fp32"):
            raise RequestError(f"the peer {name}, a plain export, computes in fp32, not in {precision}")
        from cm_runtime.export.torch_exporter import plain

        path = Path(folder) / "model.onnx"
        plain(source, path)
        return (_onnx if name == "onnx" else _openvino)(source, path, str(where), threads)


def _compute_in(precision: ComputePrecision, device: torch.device, drawer: Drawer) -> Drawer:
    """``drawer`` with torch's settings for that precision; without them a GPU's fp32 would be TF32."""
    import torch

    from cm_runtime.backends.torch_settings import products

    if precision == "tf32" and device.type == "cpu":
        raise RequestError("tf32 is a precision of GPUs; on the CPU take fp32")
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)

    def draw(z: Array, sigmas: Sequence[float], label: Label) -> Array:
        with products("tf32" if precision == "tf32" else "ieee"), torch.autocast(device.type, half, enabled=bool(half)):
            return drawer.draw(z, sigmas, label)

    return replace(drawer, draw=draw)


NEEDED: dict[Peer, tuple[str, ...]] = {
    "diffusers": ("torch", "safetensors", "diffusers"),
    "torch": ("torch",),
    "torch.compile": ("torch",),
    "onnx": ("torch", "onnx", "onnxscript", "onnxruntime"),
    "openvino": ("torch", "onnx", "onnxscript", "openvino"),
}


def pipeline(folder: Path, device: str = "cpu") -> Drawer:
    """diffusers' ConsistencyModelPipeline of a folder, in eager torch."""
    package = require("diffusers", "the peer diffusers")
    import torch

    package.utils.logging.disable_progress_bar()  # of loading
    pipe = package.ConsistencyModelPipeline.from_pretrained(str(folder), low_cpu_mem_usage=False).to(device)
    pipe.set_progress_bar_config(disable=True)
    grid = {"num_train_timesteps": MOST_STEPS + 1}
    scheduler = pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **grid)

    def draw(z: Array, sigmas: Sequence[float], label: Label) -> Array:
        # Its timesteps are indices into a grid; these only count the steps, and the levels are replaced.
        scheduler._convert_to_karras = lambda _: np.array(sigmas, np.float64)
        with _replace_noise(z, device):
            images = pipe(
                batch_size=z.shape[1],
                class_labels=None if label is None else torch.from_numpy(label),
                num_inference_steps=None,
                timesteps=list(range(len(sigmas)))[::-1],
                output_type="np",
            ).images
        return np.asarray(images * 2 - 1, np.float32)

    return Drawer(draw, f"diffusers {package.__version__}, torch {torch.__version__}")


@contextmanager
def _replace_noise(z: Array, device: str) -> Iterator[None]:
    """diffusers draws ``z``, step by step, and then zeros, which its last step weighs by 0."""
    import torch

    parts = [torch.from_numpy(part).to(device) for part in z]
    modules = [importlib.import_module(f"diffusers.{name}") for name in RANDN]
    before = [module.randn_tensor for module in modules]

    def randn_tensor(shape: Sequence[int], **_: Any) -> torch.Tensor:
        return parts.pop(0) if parts else torch.zeros(tuple(shape), device=device)

    try:
        for module in modules:
            module.randn_tensor = randn_tensor  # type: ignore[attr-defined]
        yield
    finally:
        for module, real in zip(modules, before, strict=True):
            module.randn_tensor = real  # type: ignore[attr-defined]


def _load_checkpoint(path: Path) -> Checkpoint:
    if path.suffix == ".onnx":
        require("onnx", f"reading the weights of {path}")
        from cm_runtime.export.from_onnx import recover

        return recover(path)
    from cm_runtime.checkpoints.load import load_checkpoint

    return load_checkpoint(path)


def _diffusers(checkpoint: Checkpoint, folder: Path, device: str) -> Drawer:
    from cm_runtime.export import to_diffusers

    try:
        to_diffusers.write(checkpoint, folder / "pipeline")
    except CheckpointError as error:
        raise RequestError(str(error)) from error
    return pipeline(folder / "pipeline", device)


def _torch(checkpoint: Checkpoint, device: torch.device, is_compiled: bool) -> Drawer:
    """The sampler in torch, everything between the first noise and the images on the device."""
    import torch

    f: Any = checkpoint.model().to(device)
    if is_compiled:
        mode = "max-autotune" if device.type == "cuda" else "default"
        f = torch.compile(f, fullgraph=True, dynamic=False, mode=mode)  # else a part may run uncompiled

    def denoise(x: torch.Tensor, sigma: float, label: torch.Tensor | None) -> torch.Tensor:
        sigmas = torch.full((len(x),), sigma, device=device)
        try:
            return f(x, sigmas, label)  # type: ignore[no-any-return]
        except Exception as error:  # a compiler's errors are of many kinds
            if not is_compiled:
                raise
            raise EngineError(f"torch.compile: {compiler_reason(error)}") from error

    def draw(z: Array, sigmas: Sequence[float], label: Label) -> Array:
        with torch.inference_mode():
            noise = torch.from_numpy(z).to(device)
            labels = None if label is None else torch.from_numpy(label).to(device)
            x0 = _multistep(partial(denoise, label=labels), noise, sigmas, checkpoint.config.sigma_min)
            images: Array = x0.permute(0, 2, 3, 1).contiguous().cpu().numpy()
            return images

    return Drawer(draw, f"torch {torch.__version__}")


def _onnx(checkpoint: Checkpoint, path: Path, device: str, threads: int) -> Drawer:
    ort = require("onnxruntime", "the peer onnx")
    session = open_session(path, str(path), EngineOptions(device=device, threads=threads))
    return _numpy_drawer(lambda feed: session.run(None, feed)[0], checkpoint, f"onnxruntime {ort.__version__}")


def _openvino(checkpoint: Checkpoint, path: Path, device: str, threads: int) -> Drawer:
    """In float32, which OpenVINO leaves for bfloat16 by itself where the processor has it."""
    if device != "cpu":
        raise RequestError(f"the peer openvino runs on the CPU, not on {device}")
    ov = openvino.package()
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if number := engine_threads(threads):
        options["INFERENCE_NUM_THREADS"] = str(number)
    model = openvino.core().compile_model(str(path), "CPU", options)
    version = f"openvino {ov.__version__.partition('-')[0]}"
    return _numpy_drawer(lambda feed: np.array(model(feed)[0]), checkpoint, version)


def _numpy_drawer(run: Callable[[dict[str, Any]], Array], checkpoint: Checkpoint, version: str) -> Drawer:
    """The sampler in NumPy, around an engine that runs a plain export."""
    import torch

    def draw(z: Array, sigmas: Sequence[float], label: Label) -> Array:
        def denoise(x: Array, sigma: float) -> Array:
            feed = {"x": x, "sigma": np.full(len(x), sigma, np.float32)}
            return run(feed if label is None else feed | {"label": label})

        return to_nhwc(_multistep(denoise, z, sigmas, checkpoint.config.sigma_min))

    return Drawer(draw, f"{version}, exported by torch {torch.__version__}")


def _multistep(denoise: Callable[[Any, float], Any], z: Any, sigmas: Sequence[float], sigma_min: float) -> Any:
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1), on NumPy or torch arrays: x0 (N,C,H,W)."""
    x0 = denoise(sigmas[0] * z[0], sigmas[0]).clip(-1, 1)
    for noise, sigma in zip(z[1:], sigmas[1:], strict=True):
        x0 = denoise(x0 + (sigma**2 - sigma_min**2) ** 0.5 * noise, sigma).clip(-1, 1)
    return x0
