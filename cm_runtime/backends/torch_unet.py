"""F for inference: the UNet's weights in one type, feature maps in NHWC, and few bytes moved between convolutions.

Weights are copied once, so that nothing is cast at an evaluation; those of norms, of the noise level's embedding and of
the last convolution stay float32. GroupNorm, scale and shift, and SiLU are one op, `cm::group_norm_silu`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cm_runtime.backends.torch_layers import Convolution, Embeddings, Layers, Linear, Norm, bias_of
from cm_runtime.networks.consistency import ConsistencyModel
from cm_runtime.networks.unet import Block, GroupNorm, UNet, timestep_embedding


class InferenceUNet(nn.Module):
    """`UNet` without dropout: x (N,C,H,W), c_noise (N,) float32, label (N,) int64 -> (N,C,H,W) float32.

    Args:
        network: the UNet; what needs neither another type nor another layout is shared with it.
        dtype: float32, float16 or bfloat16, that x has too. x is channels_last, or has one channel.
    """

    label_emb: Tensor
    last_bias: Tensor

    def __init__(self, network: UNet, dtype: torch.dtype) -> None:
        super().__init__()
        self.channels, self.patch, self.dtype = network.config.channels, network.config.patch, dtype
        embedding, _, second = cast("tuple[nn.Linear, nn.SiLU, nn.Linear]", network.time_embed)
        self.time_embed = nn.ModuleList([Linear(embedding, torch.float32), Linear(second, torch.float32)])
        if network.config.num_classes:
            self.register_buffer("label_emb", network.label_emb.weight.detach())
        blocks = [cast("Block", block) for block in network.input_blocks]
        first = cast("nn.Conv2d", blocks[0][0])
        self.first, offset = Convolution(first, dtype, self.patch), bias_of(first)
        self.input_blocks, offsets, embeddings = nn.ModuleList(), [offset], list[Linear]()
        for block in blocks[1:]:
            self.input_blocks.append(layers := Layers(block, dtype, offset, embeddings))
            offsets.append(offset := layers.offset)
        self.middle_block = Layers(network.middle_block, dtype, offset, embeddings)
        offset = self.middle_block.offset
        self.output_blocks = nn.ModuleList()
        for block in (cast("Block", each) for each in network.output_blocks):
            layers = Layers(block, dtype, torch.cat([offset, offsets.pop()]), embeddings)
            self.output_blocks.append(layers)
            offset = layers.offset
        self.embeddings = Embeddings(embeddings)
        norm, _, last = cast("tuple[GroupNorm, nn.SiLU, nn.Conv2d]", network.out)
        self.norm, self.last = Norm(norm, offset), Convolution(last, torch.float32)
        self.register_buffer("last_bias", bias_of(last))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        first, second = self.time_embed
        e = second(functional.silu(first(timestep_embedding(c_noise, self.channels))))
        e = e + functional.embedding(label, self.label_emb) if label is not None else e
        scale_shifts = self.embeddings(functional.silu(e).to(self.dtype))
        skips = [h := self.first(x)]
        for block in self.input_blocks:
            skips.append(h := block(h, scale_shifts))
        h = self.middle_block(h, scale_shifts)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), scale_shifts)
        F = functional.conv2d(self.norm(h).float(), self.last.weight, self.last_bias, padding=1)
        return functional.pixel_shuffle(F, self.patch) if self.patch > 1 else F


class InferenceModel(nn.Module):
    """`ConsistencyModel` with an `InferenceUNet`: x (N,C,H,W) and sigma (N,) float32, label (N,) int64 -> float32."""

    def __init__(self, model: ConsistencyModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.precond, self.F = model.precond, InferenceUNet(model.F, dtype)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        s = sigma.reshape(-1, 1, 1, 1)
        x_in = (self.precond.c_in(s) * x).to(self.F.dtype, memory_format=torch.channels_last)
        F: Tensor = self.F(x_in, self.precond.c_noise(sigma), label)
        return self.precond.c_skip(s) * x + self.precond.c_out(s) * F
