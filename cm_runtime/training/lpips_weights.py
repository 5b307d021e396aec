"""Weights of LPIPS, from published files. Read without unpickling anything but tensors.

- VGG16: torchvision's state dict of IMAGENET1K_V1 (vgg16-397923af.pth). Its ``classifier.*`` is not used. The weights
  that torchvision calls IMAGENET1K_FEATURES have the same names and expect other colours: distances would be wrong.
- The heads, one non-negative weight a channel (not enforced): the lpips package's weights/v0.1/vgg.pth, a state dict,
  or piq's lpips_weights.pt, a list of five tensors.
- Or one file with both state dicts' tensors, as .pt or, where the safetensors package is installed, .safetensors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cm_runtime.checkpoints.native import is_dense, load_safetensors, load_torch
from cm_runtime.errors import CheckpointError

CHANNELS = (64, 128, 256, 512, 512)  # of the five stages
CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision's numbers of their layers
HINT = "name torchvision's vgg16-397923af.pth and lpips' vgg.pth or piq's lpips_weights.pt, or one file with both"


def weight(layer: int) -> str:
    """Published name of a convolution's kernel (C_out, C_in, 3, 3)."""
    return f"features.{layer}.weight"


def bias(layer: int) -> str:
    """Published name of a convolution's bias (C_out,)."""
    return f"features.{layer}.bias"


def head(stage: int) -> str:
    """Published name of a stage's head: stored as (1, C, 1, 1), read as (C,)."""
    return f"lin{stage}.model.1.weight"


def shapes() -> dict[str, tuple[int, ...]]:
    """Shape of each of the 31 tensors, by name."""
    sizes: dict[str, tuple[int, ...]] = {}
    inputs = 3
    for stage, (channels, layers) in enumerate(zip(CHANNELS, CONVOLUTIONS, strict=True)):
        for layer in layers:
            sizes |= {weight(layer): (channels, inputs, 3, 3), bias(layer): (channels,)}
            inputs = channels
        sizes[head(stage)] = (channels,)
    return sizes


def read_weights(paths: Sequence[str | os.PathLike[str]]) -> dict[str, Tensor]:
    """Read the tensors of ``shapes()``, float32 on the CPU. torchvision's file passes through memory whole, 0.5 GB.

    Raises CheckpointError, one line: a file missing, truncated, foreign or with code in it; or every tensor (the first
    five) that is missing, there twice, unexpected, misshapen or not finite.
    """
    sizes = shapes()
    tensors: dict[str, Tensor] = {}
    faults = []
    for path in map(Path, paths):
        for name, tensor in _read_tensors(path).items():
            if name in tensors:
                faults.append(f"{name} is there twice")
            elif name not in sizes:
                faults.append(f"unexpected {name}")
            elif not is_dense(tensor):
                faults.append(f"{name} is not a dense tensor of floats")
            elif (tuple(tensor.squeeze().shape) if name.startswith("lin") else tuple(tensor.shape)) != sizes[name]:
                faults.append(f"{name} is {tuple(tensor.shape)} and should be of {sizes[name]}")
            elif not bool(torch.isfinite(tensor).all()):
                faults.append(f"{name} is not finite")
            tensors[name] = tensor
    faults += [f"missing {name}" for name in sizes if name not in tensors]
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        where = ", ".join(map(str, paths)) or "no file"
        raise CheckpointError(f"{where}: not the weights of LPIPS: {'; '.join(faults[:5])}{more}; {HINT}")
    # Copies: a tensor of a file may be a view of something far larger, which it would keep in memory.
    return {name: tensors[name].detach().reshape(size).to(torch.float32, copy=True) for name, size in sizes.items()}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by their published names, without VGG's classifier."""
    try:
        content = load_safetensors(path) if path.suffix == ".safetensors" else load_torch(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {HINT}") from error
    if isinstance(content, list):
        content = {head(stage): tensor for stage, tensor in enumerate(content)}
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise CheckpointError(f"{path} holds no tensors by name; {HINT}")
    return {name: tensor for name, tensor in content.items() if not name.startswith("classifier.")}
