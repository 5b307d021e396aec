"""What several tests share: models as diffusers saves them, small ones with random weights, none of them silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# The smallest networks that have every part of the published ones
IMAGENET = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
    "num_class_embeds": 7,
}
LSUN = {
    **IMAGENET,
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 2,
    "resnet_time_scale_shift": "default",
    "attn_norm_num_groups": None,
    "num_class_embeds": None,
}
# The default of diffusers' own training scripts: convolutions resample, one level attends
SCRIPT = {
    "sample_size": 28,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
GREY = {
    **SCRIPT,
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
ODD = {
    "sample_size": 40,
    "block_out_channels": (16, 48, 32),
    "layers_per_block": 1,
    "attention_head_dim": None,
    "norm_num_groups": 4,
    "norm_eps": 1e-6,
    "add_attention": False,
    "down_block_types": ("UNetResDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
WIDE = {
    "sample_size": [7, 7],
    "block_out_channels": (64,),
    "layers_per_block": 3,
    "attention_head_dim": 32,
    "norm_num_groups": 16,
    "act_fn": "swish",
    "dropout": 0.1,
    "num_class_embeds": 3,
    "down_block_types": ("AttnDownBlock2D",),
    "up_block_types": ("AttnUpBlock2D",),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "imagenet": IMAGENET,
    "lsun": LSUN,
    "script": SCRIPT,
    "grey": GREY,
    "odd": ODD,
    "wide": WIDE,
}


def unet2d(config: dict[str, Any], seed: int = 0) -> Any:
    """A UNet2DModel of diffusers' own initial weights, none of which are zero."""
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    network = UNet2DModel(**config).eval().requires_grad_(False)
    for tensor in network.parameters():
        tensor += torch.randn_like(tensor) * 0.02
    return network


def save_pipeline(
    folder: Path, config: dict[str, Any], seed: int = 0, scheduler: dict[str, Any] | None = None, **how: Any
) -> Path:
    """A ConsistencyModelPipeline of random weights, saved by diffusers."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    made = ConsistencyModelPipeline(unet2d(config, seed), CMStochasticIterativeScheduler(**(scheduler or {})))
    made.save_pretrained(folder, **how)
    return folder


def f_of(unet: Any, scheduler: Any, x: torch.Tensor, sigma: float, label: torch.Tensor | None) -> torch.Tensor:
    """The consistency function that diffusers' UNet2DModel and CMStochasticIterativeScheduler make together."""
    level = torch.tensor(sigma)
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition(level)
    scaled = x / (level**2 + scheduler.config.sigma_data**2) ** 0.5
    timestep = torch.tensor(scheduler.sigma_to_t(sigma))
    with torch.no_grad():
        F = unet(scaled, timestep, class_labels=label, return_dict=False)[0]
    return c_out * F + c_skip * x  # type: ignore[no-any-return]


class Bomb:
    """Makes the file ``canary`` where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.canary.touch, ())
