"""The standing networks: fixed sizes, random weights from a seed, for benchmarks that need no trained model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cm_runtime.errors import RequestError
from cm_runtime.errors.reasons import output_errors
from cm_runtime.files.streams import exists

if TYPE_CHECKING:
    from torch import Tensor

    from cm_runtime.checkpoints.native import Checkpoint
    from cm_runtime.networks.consistency import ModelConfig

SEED, VERSION = 0, 1  # another way to make the weights is another version, and so another file
NETWORKS: dict[str, dict[str, Any]] = {
    # 38,307,203 parameters, 12.4 GFLOP an image: the presets' network for CIFAR-10
    "cifar32": {
        "image_size": 32,
        "image_channels": 3,
        "channels": 128,
        "channel_mult": (1, 2, 2, 2),
        "res_blocks": 2,
        "attention": (16,),
    },
    # 295,899,267 parameters, 219 GFLOP an image: the published ImageNet-64 network (openai/consistency_models)
    "imagenet64": {
        "image_size": 64,
        "image_channels": 3,
        "num_classes": 1000,
        "channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "res_blocks": 3,
        "attention": (32, 16, 8),
        "resample": "resblock",
    },
}
STANDING = tuple(NETWORKS)


def standing_checkpoint(name: str, folder: Path) -> Path:
    """The checkpoint of a standing network in ``folder``, made where it is not there yet.

    Raises RequestError for another name, and OutputError where the folder cannot be written.
    """
    if name not in NETWORKS:
        raise RequestError(f"there is no standing network {name!r}; they are {', '.join(STANDING)}")
    path = folder / f"{name}-seed{SEED}-{VERSION}.pt"
    if exists(path):
        return path
    from cm_runtime.checkpoints.native import save_checkpoint

    with output_errors(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(random_checkpoint(config(name)), path)
    return path


def config(name: str) -> ModelConfig:
    """The config of a standing network: a consistency model of the boundary form."""
    from cm_runtime.networks.consistency import ModelConfig
    from cm_runtime.networks.unet import UNetConfig

    return ModelConfig(network=UNetConfig(**NETWORKS[name]), precond="boundary", sigma_boundary=0.002)


def random_checkpoint(config: ModelConfig, seed: int = SEED) -> Checkpoint:
    """A checkpoint of ``config`` whose every weight is random, so that no layer is silent."""
    from cm_runtime.checkpoints.native import Checkpoint
    from cm_runtime.manifest import TrainingSummary

    training = TrainingSummary(method="none", data="random weights", steps=0, config={"seed": seed})
    return Checkpoint(config, "0", {"0": _weights(config, seed)}, training)


def _weights(config: ModelConfig, seed: int) -> Mapping[str, Tensor]:
    """Normal by the inverse root of the fan-in, which keeps F of order 1; 0.1 for biases, and 1 +- 0.1 for norms."""
    import torch

    from cm_runtime.networks.consistency import build

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, like in build(config, "meta").state_dict().items():
        tensor = torch.randn(like.shape, generator=generator)
        tensor *= 0.1 if like.ndim == 1 else like[0].numel() ** -0.5
        weights[name] = tensor.add_(1) if like.ndim == 1 and name.endswith("weight") else tensor
    return weights
