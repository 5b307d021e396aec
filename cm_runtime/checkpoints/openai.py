"""OpenAI's consistency-model checkpoints: flat state dicts without a word about the network they belong to.

Our UNet has their names, so the tensors need no conversion; the architecture is read off names and shapes. What these
cannot tell are the channels of an attention head (64 in all published ones) and the size of the images.
Source: https://github.com/openai/consistency_models, cm/unet.py and cm/script_util.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm_runtime.checkpoints import published
from cm_runtime.checkpoints.native import Checkpoint, build_network, check_tensors, shapes_of
from cm_runtime.checkpoints.published import Published
from cm_runtime.choices import Form
from cm_runtime.errors import CheckpointError
from cm_runtime.errors.wording import quantity
from cm_runtime.files import atomic
from cm_runtime.networks.consistency import ModelConfig
from cm_runtime.networks.unet import UNet, UNetConfig
from cm_runtime.schedule import NoiseRange

HEAD_CHANNELS = 64
INNERMOST = 8  # pixels of the last level's feature map, in all published networks
EMA = "imported"

Shapes = Mapping[str, tuple[int, ...]]


def convert(
    content: Any,
    where: Path,
    model_card: Published | None,
    precond: Form | None,
    head_channels: int = HEAD_CHANNELS,
    image_size: int | None = None,
) -> Checkpoint:
    """The flat state dict ``content`` of the file ``where`` as a checkpoint; raises CheckpointError."""
    weights = _state_dict(content)
    network = infer({name: tuple(tensor.shape) for name, tensor in weights.items()}, head_channels, image_size)
    form = published.form(model_card, precond)
    with torch.device("meta"):
        shapes = shapes_of(UNet(network))
    check_tensors(shapes, weights, "its tensors do not fit the network that they suggest")
    return Checkpoint(
        config=ModelConfig(
            network=network, precond=form, sigma_boundary=0.0 if form == "edm" else NoiseRange.sigma_min
        ),
        default_ema=EMA,
        ema={EMA: {f"F.{name}": tensor for name, tensor in weights.items()}},
        training=published.summary(model_card, "openai"),
        sha256=atomic.sha256(where),
        sigmas=model_card.sigmas if model_card else {},
    )


def _state_dict(content: Any) -> dict[str, Tensor]:
    """``content`` if it looks like one; raises CheckpointError naming what it holds instead."""
    complaint = "neither a cm-runtime checkpoint nor a state dict of OpenAI's"
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{complaint}: it holds a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{complaint}: its {name} is a {type(value).__name__}, where tensors by name should be"
            )
    if "conv_in.weight" in content and "time_embedding.linear_1.weight" in content:
        raise CheckpointError("these are the weights of a diffusers model; give the folder that diffusers saved")
    for name in ("time_embed.0.weight", "input_blocks.0.0.weight"):
        if name not in content:
            raise CheckpointError(f"{complaint}: it has no {name}, but {next(iter(content), 'nothing at all')}")
    return dict(content)


def infer(shapes: Shapes, head_channels: int = HEAD_CHANNELS, image_size: int | None = None) -> UNetConfig:
    """The network whose tensors have these shapes; raises CheckpointError naming the first that no network of ours has.

    Levels are counted in the output blocks, where each of them ends in a resampler (in the input blocks a resampling
    residual block has the names of any other).
    """

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in shapes:
            raise CheckpointError(f"it has no {name}")
        if len(shapes[name]) != dims:
            raise CheckpointError(f"{name} is {shapes[name]}, where {quantity(dims, 'dimension')} should be")
        return shapes[name]

    channels = shape("time_embed.0.weight", 2)[1]
    depth = next(i for i in range(len(shapes) + 1) if f"output_blocks.{i}.0.in_layers.0.weight" not in shapes)
    blocks = [f"output_blocks.{i}" for i in range(depth)]
    if not channels or not blocks:
        raise CheckpointError("it has no output_blocks.0.0.in_layers.0.weight")
    resamplers = {
        i: "conv" if f"{block}.{layer}.conv.weight" in shapes else "resblock"
        for i, block in enumerate(blocks)
        for layer in (1, 2)
        if f"{block}.{layer}.conv.weight" in shapes or f"{block}.{layer}.in_layers.0.weight" in shapes
    }
    per_level = min(resamplers, default=depth - 1) + 1
    if depth % per_level or list(resamplers) != list(range(per_level - 1, depth - 1, per_level)):
        raise CheckpointError(f"its {depth} output blocks, resampled after {list(resamplers)}, are no equal levels")
    levels = blocks[::per_level][::-1]  # outermost first
    widths = [shape(f"{block}.0.out_layers.3.weight", 4)[0] for block in levels]
    size = INNERMOST << (len(levels) - 1) if image_size is None else image_size
    attended = [f"{block}.1.qkv.weight" in shapes for block in levels]
    for name in (f"{block}.1.qkv.weight" for block, there in zip(levels, attended, strict=True) if there):
        if len(shapes[name]) == 3:
            raise CheckpointError(
                f"{name} is {shapes[name]}: this is a guided-diffusion network, which orders its attention heads"
                " otherwise; those of consistency_models have four dimensions there"
            )
    if unequal := [width for width in widths if width % channels]:
        raise CheckpointError(f"its levels have {widths} channels, and {unequal[0]} is no multiple of {channels}")
    return build_network(
        image_size=size,
        image_channels=shape("input_blocks.0.0.weight", 4)[1],
        num_classes=shape("label_emb.weight", 2)[0] if "label_emb.weight" in shapes else 0,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        res_blocks=per_level - 1,
        attention=tuple(size >> level for level, there in enumerate(attended) if there),
        middle_attention="middle_block.1.qkv.weight" in shapes,
        head_channels=head_channels,
        scale_shift=shape(f"{levels[0]}.0.emb_layers.1.weight", 2)[0] == 2 * widths[0],
        resample="conv" if "conv" in resamplers.values() else "resblock",
    )
