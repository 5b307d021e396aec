"""What other tools do with the same weights: each draws as its user would write it, by the noise that it is given.

The loops over steps here are theirs, not ours. Whoever times a peer compares its images with ours first, so that an
option of theirs which came to mean something else is a disagreement and not a wrong time.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.backends import openvino
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends.ort import open_session
from cm_runtime.bench.scenario import PEERS, Peer
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
    """A peer that is loaded. version: of the packages that draw, as "diffusers 0.42.1, torch 2.13.0"."""

    draw: Callable[[Array, Sequence[float], Label], Array]
    version: str

    def __call__(self, z: Array, sigmas: Sequence[float], label: Label = None) -> Array:
        """z (K,N,C,H,W) float32 standard normals, K sigmas, label (N,) -> images (N,H,W,C) float32 in [-1, 1]."""
        return self.draw(z, sigmas, label)


def peer(name: Peer, checkpoint: Checkpoint | Path, work: Path, threads: int = 0, device: str = "cpu") -> Drawer:
    """The peer of that name with the weights of a checkpoint, or of a path to one or to an exported file of ours.

    work: where what it loads is written, and removed again; threads: 0 leaves them to the peer, others are the whole
    process's; device: auto, cpu or cuda:N. torch.compile compiles when it first draws a batch of some size. Raises
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
    loaded = _read(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=work) as folder:
        if name == "diffusers":
            return _diffusers(loaded, Path(folder), str(where))
        if name in ("onnx", "openvino"):
            return (_onnx if name == "onnx" else _openvino)(loaded, Path(folder), str(where), threads)
        return _compiled(loaded, where) if name == "torch.compile" else _eager(loaded, where)


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
    opened = package.ConsistencyModelPipeline.from_pretrained(str(folder), low_cpu_mem_usage=False).to(device)
    opened.set_progress_bar_config(disable=True)
    grid = {"num_train_timesteps": MOST_STEPS + 1}
    scheduler = opened.scheduler = type(opened.scheduler).from_config(opened.scheduler.config, **grid)

    def draw(z: Array, sigmas: Sequence[float], label: Label) -> Array:
        # Its timesteps are indices into a grid; ours say how many there are, and the levels are these.
        scheduler._convert_to_karras = lambda _: np.array(sigmas, np.float64)
        with _given(z, device):
            images = opened(
                batch_size=z.shape[1],
                class_labels=None if label is None else torch.from_numpy(label),
                num_inference_steps=None,
                timesteps=list(range(len(sigmas)))[::-1],
                output_type="np",
            ).images
        return np.asarray(images * 2 - 1, np.float32)

    return Drawer(draw, f"diffusers {package.__version__}, torch {torch.__version__}")


@contextmanager
def _given(z: Array, device: str) -> Iterator[None]:
    """diffusers draws ``z``, step by step, and then zeros, which its last step weighs by 0."""
    import torch

    left = [torch.from_numpy(part).to(device) for part in z]
    modules = [importlib.import_module(f"diffusers.{name}") for name in RANDN]
    before = [module.randn_tensor for module in modules]

    def randn_tensor(shape: Sequence[int], **_: Any) -> torch.Tensor:
        return left.pop(0) if left else torch.zeros(tuple(shape), device=device)

    try:
        for module in modules:
            module.randn_tensor = randn_tensor  # type: ignore[attr-defined]
        yield
    finally:
        for module, real in zip(modules, before, strict=True):
            module.randn_tensor = real  # type: ignore[attr-defined]


def _read(path: Path) -> Checkpoint:
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


def _eager(checkpoint: Checkpoint, device: torch.device) -> Drawer:
    import torch

    return Drawer(_torch_loop(checkpoint.model().to(device), checkpoint, device), f"torch {torch.__version__}")


def _compiled(checkpoint: Checkpoint, device: torch.device) -> Drawer:
    import torch

    compiled = torch.compile(
        checkpoint.model().to(device),
        fullgraph=True,  # or else what cannot be compiled would run uncompiled, unseen
        dynamic=False,
        mode="max-autotune" if device.type == "cuda" else "default",
    )
    loop = _torch_loop(compiled, checkpoint, device)

    def draw(z: Array, sigmas: Sequence[float], label: Label) -> Array:
        try:
            return loop(z, sigmas, label)
        except Exception as error:  # a compiler's errors are of many kinds
            raise EngineError(f"torch.compile: {compiler_reason(error)}") from error

    return Drawer(draw, f"torch {torch.__version__}")


def _torch_loop(
    f: Callable[..., torch.Tensor], checkpoint: Checkpoint, device: torch.device
) -> Callable[[Array, Sequence[float], Label], Array]:
    """The sampler in torch, everything between the first noise and the images on the device."""
    import torch

    def draw(z: Array, sigmas: Sequence[float], label: Label) -> Array:
        with torch.inference_mode():
            noise = torch.from_numpy(z).to(device)
            labels = None if label is None else torch.from_numpy(label).to(device)

            def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
                return f(x, torch.full((len(x),), sigma, device=device), labels)

            x0 = _multistep(denoise, noise, sigmas, checkpoint.config.sigma_min)
            images: Array = x0.permute(0, 2, 3, 1).contiguous().cpu().numpy()
            return images

    return draw


def _onnx(checkpoint: Checkpoint, folder: Path, device: str, threads: int) -> Drawer:
    import torch

    ort = require("onnxruntime", "the peer onnx")
    path = _plain(checkpoint, folder)
    session = open_session(path, str(path), EngineOptions(device=device, threads=threads))

    def denoise(feed: dict[str, Any]) -> Array:
        (x0,) = session.run(None, feed)
        return x0  # type: ignore[no-any-return]

    version = f"onnxruntime {ort.__version__}, exported by torch {torch.__version__}"
    return Drawer(_numpy_loop(denoise, checkpoint.config.sigma_min), version)


def _openvino(checkpoint: Checkpoint, folder: Path, device: str, threads: int) -> Drawer:
    """In float32, which OpenVINO leaves for bfloat16 by itself where the processor has it."""
    import torch

    if device != "cpu":
        raise RequestError(f"the peer openvino runs on the CPU, not on {device}")
    ov = openvino.package()
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if number := engine_threads(threads):
        options["INFERENCE_NUM_THREADS"] = str(number)
    compiled = openvino.core().compile_model(str(_plain(checkpoint, folder)), "CPU", options)

    def denoise(feed: dict[str, Any]) -> Array:
        return np.array(compiled(feed)[0])

    version = f"openvino {ov.__version__.partition('-')[0]}, exported by torch {torch.__version__}"
    return Drawer(_numpy_loop(denoise, checkpoint.config.sigma_min), version)


def _plain(checkpoint: Checkpoint, folder: Path) -> Path:
    from cm_runtime.export.torch_exporter import plain

    path = folder / "model.onnx"
    plain(checkpoint, path)
    return path


def _numpy_loop(
    denoise: Callable[[dict[str, Any]], Array], sigma_min: float
) -> Callable[[Array, Sequence[float], Label], Array]:
    """The sampler in NumPy, around an engine's denoiser."""

    def draw(z: Array, sigmas: Sequence[float], label: Label) -> Array:
        def denoised(x: Array, sigma: float) -> Array:
            feed = {"x": x, "sigma": np.full(len(x), sigma, np.float32)}
            return denoise(feed if label is None else feed | {"label": label})

        return to_nhwc(_multistep(denoised, z, sigmas, sigma_min))

    return draw


def _multistep(denoise: Callable[[Any, float], Any], z: Any, sigmas: Sequence[float], sigma_min: float) -> Any:
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1), on NumPy or torch arrays: x0 (N,C,H,W)."""
    x0 = denoise(sigmas[0] * z[0], sigmas[0]).clip(-1, 1)
    for noise, sigma in zip(z[1:], sigmas[1:], strict=True):
        x0 = denoise(x0 + (sigma**2 - sigma_min**2) ** 0.5 * noise, sigma).clip(-1, 1)
    return x0
