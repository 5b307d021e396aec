"""From a checkpoint to a file that an engine runs, proved equal to the torch model it came from; or to diffusers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cm_runtime.choices import GraphKind, Precision, Target
from cm_runtime.extras import require

if TYPE_CHECKING:
    from cm_runtime.backends.engine_file import EngineManifest, Package
    from cm_runtime.checkpoints.native import Checkpoint
    from cm_runtime.export.to_onnx import OnnxExport

__all__ = ["diffusers", "onnx", "tensorrt"]


def onnx(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    graph: GraphKind = "denoiser",
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    precision: Precision = "fp32",
    inline: bool = False,
    target: Target = "cpu",
    force: bool = False,
) -> OnnxExport:
    """Export ``checkpoint`` to ``path``, with the measured parity in the file's manifest.

    The export takes less than three times the memory of the float32 weights. One of the three is the checkpoint's own,
    if the caller keeps it. Weights that the checkpoint stores in float16 are stored so, and computed in float32.
    Weights above 1 GiB go into one data file beside ``path``, which the manifest names.

    Args:
        checkpoint: as `load_checkpoint` reads it.
        path: ends in .onnx.
        graph: denoiser, sampler (with steps, default 2, or sigmas: those levels and no others) or network.
        steps: of a sampler, evaluations an image.
        sigmas: of a sampler, its noise levels in place of steps.
        precision: of weights and feature maps; normalisations, the last convolution, coefficients and images stay
            float32.
        inline: cm::SkipScale as standard ops in the graph itself, for engines without local functions.
        target: cpu for standard operators, which every engine runs; cuda for ONNX Runtime's own on a GPU, which no
            other engine runs, in fp32 or fp16; tensorrt for standard ones in the forms that TensorRT fuses.
        force: replaces an existing file.

    Returns:
        The manifest, and how large the graph is.

    Raises:
        ParityError: the file's outputs miss the float32 torch model's (see `parity`).
        EngineError: they are not finite.
        MissingExtraError: torch is not installed, or no engine that could check the file.
        RequestError: the model has no such levels, or no such form for ``target``.
        OutputError: ``path`` cannot be written, or exists without ``force``. Nothing is left behind.

    Example:
        >>> checkpoint = cm.load_checkpoint("runs/fashion-mnist/ckpt.pt")
        >>> cm.export.onnx(checkpoint, "sampler.onnx", graph="sampler", steps=2)
        >>> images = cm.sample(cm.load("sampler.onnx"), count=64)
    """
    require("torch", "cm_runtime.export")
    require("onnx", "cm_runtime.export")
    from cm_runtime.export import to_onnx

    options = to_onnx.Options(graph, steps, sigmas, precision, inline, target)
    checkpoints = [checkpoint]
    del checkpoint  # its weights are not to be there beside an engine's: this frame must not keep them
    return to_onnx.write(checkpoints.pop(), path, options, force=force)


def tensorrt(
    onnx_path: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    package: Package = "tensorrt",
    batches: Sequence[int | tuple[int, int, int]] = (),
    gpus: Sequence[str] = (),
    optimization_level: int | None = None,
    force: bool = False,
) -> EngineManifest:
    """Build a TensorRT engine of an exported file, with its manifest and TensorRT's log beside it.

    Where the GPU of this machine can open the engine, its parity with ``onnx_path`` on the CPU is measured, and its
    layers are written beside it. Neither torch nor onnx is needed.

    Args:
        onnx_path: as `onnx` writes it, of any graph; fastest for the target tensorrt.
        path: ends in .engine.
        package: "tensorrt", for this machine's GPU alone; or "tensorrt_rtx", TensorRT for RTX, for any.
        batches: numbers of images that the engine takes, each with kernels of its own: N, which smaller batches are
            padded to, or the smallest, the fastest and the largest. By default from one to as many as a GPU sees
            together.
        gpus: compute capabilities to build for, as "8.9", of tensorrt_rtx; by default that of this machine's GPU.
        optimization_level: of TensorRT's own builder, 0 to 5, the default; lower builds faster, for slower engines.
        force: replaces an existing engine.

    Returns:
        The engine's manifest.

    Raises:
        ParityError: the engine's outputs miss those of ``onnx_path``.
        ArtifactError: ``onnx_path`` is damaged, is no export of cm-runtime, or TensorRT cannot read it.
        EngineError: TensorRT cannot build it, or has no GPU; the log says why.
        RequestError: the sizes do not ascend, or the package does not build for such a GPU.
        MissingExtraError: the package is not installed.
        OutputError: ``path`` cannot be written, or exists without ``force``.

    Example:
        >>> cm.export.onnx(checkpoint, "sampler.onnx", graph="sampler", precision="fp16", target="tensorrt")
        >>> cm.export.tensorrt("sampler.onnx", "sampler.engine", batches=[1, 8, (64, 64, 256)])
        >>> images = cm.sample(cm.load("sampler.engine"), count=256)
    """
    from cm_runtime.backends.batch_profiles import parse_profiles
    from cm_runtime.export import to_tensorrt

    text = ",".join(":".join(map(str, sizes if isinstance(sizes, tuple) else (sizes,))) for sizes in batches)
    options = to_tensorrt.BuildOptions(parse_profiles(text) if text else (), tuple(gpus), optimization_level)
    return to_tensorrt.build(onnx_path, path, package, options, force=force)


def diffusers(checkpoint: Checkpoint, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a folder that diffusers opens, whole or not at all, the weights as the checkpoint stores them.

    Args:
        checkpoint: as `load_checkpoint` reads it.
        path: of the folder.
        force: replaces an existing folder of that kind, and no other.

    Raises:
        CheckpointError: diffusers has no such model (patch 2, another form than boundary).
        MissingExtraError: torch or safetensors is not installed.
        OutputError: ``path`` cannot be written, exists without ``force``, or is no folder that could be replaced.

    Example:
        >>> cm.export.diffusers(cm.load_checkpoint("runs/cifar10/ckpt.pt"), "cifar10")
        >>> pipeline = diffusers.ConsistencyModelPipeline.from_pretrained("cifar10")
    """
    require("torch", "cm_runtime.export")
    from cm_runtime.export import to_diffusers

    to_diffusers.write(checkpoint, path, force=force)
