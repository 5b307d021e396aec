"""The tensors of diffusers' UNet2DModel under our UNet's names, and ours under theirs.

Both are the ADM UNet; only the attention is cut differently: three matrices there, one 1x1 convolution of three times
the channels here. Source: diffusers 0.42, models/unets/unet_2d_blocks.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cm_runtime.checkpoints.native import check_tensors, shapes_of
from cm_runtime.networks.unet import UNet, UNetConfig

RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "qkv": "to_q to_k to_v", "proj_out": "to_out.0"}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.18


def to_ours(state_dict: Mapping[str, Tensor], network: UNetConfig) -> dict[str, Tensor]:
    """A UNet2DModel's state dict under our UNet's names.

    Raises CheckpointError listing the tensors, by their names, that are missing, extra or misshapen.
    """
    with torch.device("meta"):
        shapes = shapes_of(UNet(network))
    names = _tensors(network, shapes)
    weights = {_modern(name): tensor for name, tensor in state_dict.items()}
    shapes_of_theirs = {
        name: _cut(shapes[mine], mine, len(theirs)) for mine, theirs in names.items() for name in theirs
    }
    check_tensors(shapes_of_theirs, weights, "its tensors do not fit its config.json")
    result = {}
    for mine, theirs in names.items():
        parts = [weights[name] for name in theirs]
        result[mine] = (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(shapes[mine])
    return result


def to_theirs(weights: Mapping[str, Tensor], network: UNetConfig) -> dict[str, Tensor]:
    """Our UNet's state dict under a UNet2DModel's names; no two tensors share memory, which safetensors asks for."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    result = {}
    for mine, theirs in _tensors(network, shapes).items():
        shape = _cut(shapes[mine], mine, len(theirs))
        for name, part in zip(theirs, weights[mine].chunk(len(theirs)), strict=True):
            result[name] = part.reshape(shape).clone(memory_format=torch.contiguous_format)
    return result


def _tensors(network: UNetConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """For each of our tensors the one of theirs, or the three that are its equal parts."""
    result = {}
    for mine, theirs in _layers(network):
        for kind in ("weight", "bias"):
            if f"{mine}.{kind}" in shapes:
                result[f"{mine}.{kind}"] = tuple(f"{name}.{kind}" for name in theirs)
    return result


def _layers(network: UNetConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our layers with weights, and theirs, in the order of our network."""

    def inside(mine: str, theirs: str, names: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        for name, other in names.items():
            yield f"{mine}.{name}", tuple(f"{theirs}.{part}" for part in other.split())

    def resampler(mine: str, theirs: str, resampler_name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        yield from inside(mine, theirs, RES if network.resample == "resblock" else {resampler_name: "conv"})

    for mine, theirs in ENDS.items():
        yield mine, (theirs,)
    last = len(network.channel_mult) - 1
    attended = [network.image_size >> level in network.attention for level in range(last + 1)]
    block = 0
    for level in range(last + 1):
        for i in range(network.res_blocks):
            block += 1
            yield from inside(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{i}", RES)
            if attended[level]:
                yield from inside(f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{i}", ATTENTION)
        if level < last:
            block += 1
            yield from resampler(f"input_blocks.{block}.0", f"down_blocks.{level}.downsamplers.0", "op")
    yield from inside("middle_block.0", "mid_block.resnets.0", RES)
    if network.middle_attention:
        yield from inside("middle_block.1", "mid_block.attentions.0", ATTENTION)
    yield from inside(f"middle_block.{1 + network.middle_attention}", "mid_block.resnets.1", RES)
    block = 0
    for up, level in enumerate(range(last, -1, -1)):
        for i in range(network.res_blocks + 1):
            yield from inside(f"output_blocks.{block}.0", f"up_blocks.{up}.resnets.{i}", RES)
            if attended[level]:
                yield from inside(f"output_blocks.{block}.1", f"up_blocks.{up}.attentions.{i}", ATTENTION)
            block += 1
        if level:
            mine = f"output_blocks.{block - 1}.{1 + attended[level]}"
            yield from resampler(mine, f"up_blocks.{up}.upsamplers.0", "conv")


def _cut(shape: tuple[int, ...], mine: str, parts: int) -> tuple[int, ...]:
    """The shape of theirs for one of our tensors: attention projects by matrices there, by 1x1 convolutions here."""
    projection = mine.rpartition(".")[0].rpartition(".")[2] in ("qkv", "proj_out")
    return (shape[0] // parts, *(shape[1:2] if projection else shape[1:]))


def _modern(name: str) -> str:
    """The present name of a tensor that older versions of diffusers saved under another."""
    return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{OLD[m[2]]}.", name)
