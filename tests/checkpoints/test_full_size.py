"""The published networks at full size, random weights: 296M and 526M parameters. Slow; 8 GiB of memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import f_of, save_pipeline

import cm_runtime as cm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

# As diffusers' conversion script has them (scripts/convert_consistency_to_diffusers.py)
IMAGENET_64: dict[str, Any] = {
    "sample_size": 64,
    "layers_per_block": 3,
    "num_class_embeds": 1000,
    "block_out_channels": (192, 384, 576, 768),
    "attention_head_dim": 64,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
LSUN_256: dict[str, Any] = {
    "sample_size": 256,
    "layers_per_block": 2,
    "block_out_channels": (256, 256, 512, 512, 1024, 1024),
    "attention_head_dim": 64,
    "down_block_types": (*("ResnetDownsampleBlock2D",) * 3, *("AttnDownBlock2D",) * 3),
    "up_block_types": (*("AttnUpBlock2D",) * 3, *("ResnetUpsampleBlock2D",) * 3),
    "resnet_time_scale_shift": "default",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}


@pytest.mark.parametrize(
    ("config", "parameters", "tensors", "sigmas"),
    [
        (IMAGENET_64, 295_899_267, 541, (0.002, 0.05, 0.5, 1.382368, 10.0, 80.0)),
        (LSUN_256, 526_304_771, 566, (0.002, 0.5, 80.0)),
    ],
    ids=["imagenet64", "lsun256"],
)
def test_a_published_network_is_what_diffusers_computes(
    config: dict[str, Any], parameters: int, tensors: int, sigmas: tuple[float, ...], tmp_path: Path
) -> None:
    """From diffusers' folder, and from the flat state dict of OpenAI's names that the same tensors make."""
    from diffusers import ConsistencyModelPipeline

    folder = save_pipeline(tmp_path / "pipe", config)
    gc.collect()
    pipe = ConsistencyModelPipeline.from_pretrained(folder)
    size = config["sample_size"]
    label = torch.tensor([145]) if "num_class_embeds" in config else None
    torch.manual_seed(1)
    inputs = [torch.randn(1, 3, size, size) * (sigma**2 + 0.25) ** 0.5 for sigma in sigmas]
    expected = [f_of(pipe.unet, pipe.scheduler, x, sigma, label) for x, sigma in zip(inputs, sigmas, strict=True)]
    del pipe
    gc.collect()
    checkpoint = cm.load_checkpoint(folder)
    weights = checkpoint.ema["imported"]
    assert sum(tensor.numel() for tensor in weights.values()) == parameters and len(weights) == tensors
    flat = tmp_path / f"cd_{'imagenet64' if label is not None else 'bedroom256'}_l2.pt"
    torch.save({name.removeprefix("F."): tensor for name, tensor in weights.items()}, flat)
    for source in (folder, flat):
        checkpoint = cm.load_checkpoint(source)
        model = checkpoint.model()
        del checkpoint
        for x, sigma, wanted in zip(inputs, sigmas, expected, strict=True):
            with torch.no_grad():
                found = model(x, torch.tensor([sigma]), label)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
            assert sigma < 0.01 or (wanted - x).abs().max() > 0.1
