"""F, the network: the ADM UNet (Dhariwal and Nichol 2021, arXiv 2105.05233) under its public state-dict names.

The names, the order of blocks and the (three, heads, dim) layout of ``qkv`` are those of the published
consistency-model checkpoints, so that their weights load by name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional

from cm_runtime.files.records import Record
from cm_runtime.manifest import MOST_PIXELS
from cm_runtime.networks.dropout import Dropout


class NetworkShape(Record):
    """The choices a UNet leaves open once the images are known; unknown keys are refused."""

    channels: int = Field(gt=0, le=4096, description="of the outermost level")
    channel_mult: tuple[int, ...] = Field(min_length=1, max_length=8)
    res_blocks: int = Field(gt=0, le=16, description="per level")
    attention: tuple[int, ...] = Field((), description="feature-map sizes with attention, descending")
    middle_attention: bool = Field(True, description="between the two middle blocks, whatever their size")
    head_channels: int = Field(64, gt=0)
    scale_shift: bool = Field(True, description="the embedding scales and shifts the second norm; else it is added")
    resample: Literal["conv", "resblock"] = "conv"
    norm_groups: int | None = Field(None, gt=0, description="of a normalisation; None: 32, or as many as divide")
    norm_eps: float = Field(1e-5, gt=0, lt=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    patch: Literal[1, 2] = Field(1, description="pixel-unshuffle in, pixel-shuffle out, by this factor")

    @field_validator("attention")
    @classmethod
    def _descending(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(sizes), reverse=True))  # one network, one config


class UNetConfig(NetworkShape):
    """A whole UNet: its shape and the images it is for. Sizes are in pixels."""

    image_size: int = Field(gt=0, le=4096, description="height and width of the images")
    image_channels: int = Field(gt=0, le=64)
    num_classes: int = Field(0, ge=0, le=1_000_000, description="0: unconditional")

    @model_validator(mode="after")
    def _fits(self) -> UNetConfig:
        divisor = self.patch * 2 ** (len(self.channel_mult) - 1)
        if self.image_size % divisor:
            raise ValueError(f"image_size {self.image_size} must be a multiple of {divisor} for this depth and patch")
        if self.image_channels * self.image_size**2 > MOST_PIXELS:
            raise ValueError(f"images of {self.image_channels}x{self.image_size}x{self.image_size} are too large")
        if not all(0 < m <= 64 for m in self.channel_mult):
            raise ValueError("channel_mult must be from 1 to 64")
        sizes = [self.image_size // self.patch // 2**level for level in range(len(self.channel_mult))]
        if unmet := set(self.attention) - set(sizes):
            raise ValueError(f"attention at {sorted(unmet)}, but the feature maps are {sizes}")
        attention_mults = [m for m, size in zip(self.channel_mult, sizes, strict=True) if size in self.attention]
        for mult in {*attention_mults, *self.channel_mult[-1:] * self.middle_attention}:
            if self.channels * mult % self.head_channels:
                raise ValueError(f"{self.channels * mult} channels do not split into heads of {self.head_channels}")
        if self.norm_groups and self.channels % self.norm_groups:
            raise ValueError(f"channels {self.channels} do not split into norm_groups {self.norm_groups}")
        return self


class GroupNorm(nn.GroupNorm):
    """Group normalisation over the config's groups (32, or as many as divide the channels), statistics in float32."""

    def __init__(self, channels: int, config: NetworkShape) -> None:
        super().__init__(config.norm_groups or math.gcd(32, channels), channels, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype) if x.dtype == torch.float16 else super().forward(x)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """[cos, sin] of t at geometric frequencies exp(-ln(10000) i / half): t (N,) float32 -> (N, dim) float32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * frequencies[None]
    embedding = torch.cat([angle.cos(), angle.sin()], dim=-1)
    return functional.pad(embedding, (0, 1)) if dim % 2 else embedding


def conv3x3(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size, but for its stride."""
    return nn.Conv2d(channels, out, 3, stride=stride, padding=1)


def zero_weights(module: nn.Conv2d) -> nn.Conv2d:
    """The convolution with zero weights: a residual branch that starts silent."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class Upsample(nn.Module):
    """Nearest-neighbour x2, then a convolution unless ``channels`` is None."""

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels) if channels else None

    def forward(self, x: Tensor) -> Tensor:
        x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.conv is not None else x


class Downsample(nn.Module):
    """A strided convolution, or the mean of 2x2 where ``channels`` is None."""

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.op: nn.Module = conv3x3(channels, channels, stride=2) if channels else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.op(x)
        return h


class ResBlock(nn.Module):
    """Norm, SiLU, convolution twice around the embedding; ``resample`` changes the size between norm and conv."""

    def __init__(
        self,
        channels: int,
        out: int,
        dropout: Dropout,
        config: NetworkShape,
        resample: type[Upsample] | type[Downsample] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = config.scale_shift
        self.in_layers = nn.Sequential(GroupNorm(channels, config), nn.SiLU(), conv3x3(channels, out))
        self.resample = resample() if resample else None
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(4 * config.channels, 2 * out if config.scale_shift else out)
        )
        self.out_layers = nn.Sequential(GroupNorm(out, config), nn.SiLU(), dropout, zero_weights(conv3x3(out, out)))
        self.skip_connection = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, embedding: Tensor, key: Tensor | None = None) -> Tensor:
        h = self.in_layers[:-1](x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers[-1](h)
        e = self.emb_layers(embedding).type(h.dtype)[:, :, None, None]
        norm, silu, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + e)
        total: Tensor = self.skip_connection(x) + conv(dropout(silu(h), key))
        return total


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map, with a residual connection."""

    def __init__(self, channels: int, config: NetworkShape) -> None:
        super().__init__()
        self.heads = channels // config.head_channels
        self.norm = GroupNorm(channels, config)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = zero_weights(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, 3, self.heads, c // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each (n, heads, pixels, dim)
        h = functional.scaled_dot_product_attention(q, k, v)
        residual: Tensor = self.proj_out(h.transpose(-1, -2).reshape(n, c, height, width))
        return x + residual


class Block(nn.ModuleList):
    """Layers in turn; those that take the embedding, and the key of their dropout, get them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(layers)

    def forward(self, x: Tensor, embedding: Tensor, key: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x, embedding, key) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """F(x, c_noise, label): x (N,C,H,W), c_noise (N,) float32, label (N,) int64 -> (N,C,H,W).

    dropout_key: (N, 2) int64, in training only; see `Dropout`.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        patched = config.image_channels * config.patch**2
        embedding = 4 * config.channels
        layers = itertools.count()
        self.time_embed = nn.Sequential(
            nn.Linear(config.channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        if config.num_classes:
            self.label_emb = nn.Embedding(config.num_classes, embedding)

        def res(channels: int, out: int, resample: type[Upsample] | type[Downsample] | None = None) -> ResBlock:
            dropout = Dropout(config.dropout, next(layers))
            return ResBlock(channels, out, dropout, config, resample)

        def attention(channels: int, size: int) -> Iterator[AttentionBlock]:
            if size in config.attention:
                yield AttentionBlock(channels, config)

        size = config.image_size // config.patch
        widths = [config.channels * mult for mult in config.channel_mult]
        channels = widths[0]
        self.input_blocks = nn.ModuleList([Block(conv3x3(patched, channels))])
        skips = [channels]
        for level, width in enumerate(widths):
            for _ in range(config.res_blocks):
                self.input_blocks.append(Block(res(channels, width), *attention(width, size)))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                down = Downsample(channels) if config.resample == "conv" else res(channels, channels, Downsample)
                self.input_blocks.append(Block(down))
                skips.append(channels)
                size //= 2
        middle_attention = [AttentionBlock(channels, config)] if config.middle_attention else []
        self.middle_block = Block(res(channels, channels), *middle_attention, res(channels, channels))
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.res_blocks + 1):
                block = Block(res(channels + skips.pop(), width), *attention(width, size))
                channels = width
                if level and i == config.res_blocks:
                    block.append(Upsample(channels) if config.resample == "conv" else res(channels, channels, Upsample))
                    size *= 2
                self.output_blocks.append(block)
        self.out = nn.Sequential(GroupNorm(channels, config), nn.SiLU(), zero_weights(conv3x3(channels, patched)))

    def forward(
        self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, dropout_key: Tensor | None = None
    ) -> Tensor:
        patch = self.config.patch
        embedding = timestep_embedding(c_noise, self.config.channels)
        e = self.time_embed(embedding.to(next(self.time_embed.parameters()).dtype))
        if self.config.num_classes:
            e = e + self.label_emb(label)
        h = functional.pixel_unshuffle(x, patch) if patch > 1 else x
        skips = []
        for block in self.input_blocks:
            h = block(h, e, dropout_key)
            skips.append(h)
        h = self.middle_block(h, e, dropout_key)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), e, dropout_key)
        h = self.out(h)
        return functional.pixel_shuffle(h, patch) if patch > 1 else h
