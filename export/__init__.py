"""From a checkpoint to a file that an engine runs, proved equal to the torch model it came from; or to diffusers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cm_runtime.choices import GraphKind, Precision
from cm_runtime.extras import require

if TYPE_CHECKING:
    from cm_runtime.checkpoints.native import Checkpoint
    from cm_runtime.export.to_onnx import Exported

__all__ = ["diffusers", "onnx"]


def onnx(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    graph: GraphKind = "denoiser",
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    precision: Precision = "fp32",
    inline: bool = False,
    force: bool = False,
) -> Exported:
    """Exports ``checkpoint`` to ``path``; the manifest inside has the parity measured.

    Takes less than three times the memory of the float32 weights, one of which is the checkpoint's own if the caller
    keeps it. Weights that the checkpoint stores in float16 are stored so, and computed in float32. Weights above 1 GiB
    are stored in one data file beside ``path``, which the manifest names.

    Args:
        checkpoint: as `load_checkpoint` reads it.
        path: ends in .onnx.
        graph: denoiser, sampler (with steps, default 2, or sigmas: those levels and no others) or network.
        steps: of a sampler, evaluations an image.
        sigmas: of a sampler, its noise levels in place of steps.
        precision: of weights and feature maps; normalisations, the last convolution, coefficients and images stay
            float32.
        inline: cm::SkipScale as standard ops in the graph itself, for engines without local functions.
        force: replaces an existing file.

    Returns:
        The manifest, and how large the graph is.

    Raises:
        ParityError: the file's outputs miss the float32 torch model's (see `parity`).
        EngineError: they are not finite.
        MissingExtraError: torch is not installed, or no engine that could check the file.
        RequestError: the model has no such levels.
        OutputError: ``path`` cannot be written, or exists without ``force``. Nothing is left behind.
    """
    require("torch", "cm_runtime.export")
    require("onnx", "cm_runtime.export")
    from cm_runtime.export import to_onnx

    held = [checkpoint]
    del checkpoint  # its weights are not to be there beside an engine's: this frame must not keep them
    return to_onnx.onnx(
        held.pop(),
        path,
        graph=graph,
        steps=steps,
        sigmas=sigmas,
        precision=precision,
        inline=inline,
        force=force,
    )


def diffusers(checkpoint: Checkpoint, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Writes a folder that diffusers opens, whole or not at all, the weights as the checkpoint stores them.

    Args:
        checkpoint: as `load_checkpoint` reads it.
        path: of the folder.
        force: replaces an existing folder of that kind, and no other.

    Raises:
        CheckpointError: diffusers has no such model (patch 2, another form than boundary).
        MissingExtraError: torch or safetensors is not installed.
        OutputError: ``path`` cannot be written, exists without ``force``, or is no folder that could be replaced.
    """
    require("torch", "cm_runtime.export")
    from cm_runtime.export import to_diffusers

    to_diffusers.diffusers(checkpoint, path, force=force)
