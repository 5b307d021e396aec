"""F, the UNet of `unet`, as nodes of a graph.

It repeats what `unet.UNet.forward` does; that it does is proved with every export (see `parity`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from cm_runtime.export import ops
from cm_runtime.export.builder import BFLOAT, FLOAT, Graph
from cm_runtime.export.embedding import Embedding
from cm_runtime.export.ops import Shape
from cm_runtime.networks.unet import AttentionBlock, Block, Downsample, GroupNorm, ResBlock, UNet, Upsample


class NetworkWriter:
    """Writes evaluations of ``net`` into ``g``, all of them with the same weights.

    kind: the element type of weights and feature maps. Whatever it is, normalisations, SiLU and the last convolution
    compute in float32, between casts: sums of squares leave the range of float16, and the last layer's rounding would
    be the image's.

    Images are (N,C,H,W), and operators the standard's; writers for one engine alone replace the parts that differ.
    """

    channels, pixels = 1, (2, 3)  # axes of feature maps

    def __init__(self, g: Graph, net: UNet, kind: int = FLOAT) -> None:
        self.g, self.net, self.kind = g, net, kind
        self._names = {module: f"F.{name}" for name, module in net.named_modules()}

    def evaluate(self, x: str, embedding: Embedding, scale: float | None = None) -> str:
        """F(scale x): x (N,C,H,W) of ``kind``, or of float32 where there is a scale -> (N,C,H,W) float32."""
        g, config = self.g, self.net.config
        first, *blocks = _layers(self.net.input_blocks)
        h, shape = self._first(first[0], x, scale)
        skips = [(h, shape)]
        for block in blocks:
            h, shape = self._block(block, h, shape, embedding)
            skips.append((h, shape))
        h, shape = self._block(self.net.middle_block, h, shape, embedding)
        for block in _layers(self.net.output_blocks):
            skip, (channels, _, _) = skips.pop()
            h, shape = g.op("Concat", h, skip, axis=self.channels), (shape[0] + channels, *shape[1:])
            h, shape = self._block(block, h, shape, embedding)
        norm, _, conv = _layers(self.net.out)
        with g.scope("F.out"):
            h = self._leave(self._conv(conv, self._norm_silu(norm, h, shape, FLOAT), kind=FLOAT))
            return g.op("DepthToSpace", h, blocksize=config.patch, mode="CRD") if config.patch > 1 else h

    def weights(self, layer: nn.Module) -> list[str]:
        """The weight of a layer, and its bias if it has one; those of normalisations are float32."""
        return self._weights(layer, FLOAT if isinstance(layer, nn.GroupNorm) else self.kind)

    def _weights(self, layer: nn.Module, kind: int) -> list[str]:
        return [self._weight(layer, name, kind) for name, _ in layer.named_parameters(recurse=False)]

    def _weight(self, layer: nn.Module, name: str, kind: int) -> str:
        tensor: Tensor = getattr(layer, name)
        return self.g.weight(f"{self._names[layer]}.{name}", tensor.detach().numpy(), kind)

    def _first(self, conv: nn.Conv2d, x: str, scale: float | None) -> tuple[str, Shape]:
        g, config = self.g, self.net.config
        shape = (config.image_channels, config.image_size, config.image_size)
        with g.scope(self._names[conv]):
            if scale is not None and self.kind == FLOAT:
                weight = g.fold(conv.weight.detach().numpy() * np.float32(scale))
            else:
                weight = self._weight(conv, "weight", self.kind)
            bias = self._weight(conv, "bias", self.kind)
            if scale is not None and self.kind != FLOAT:  # in a half type the scaled weights could be subnormal
                x = g.op("Cast", g.op("Mul", x, g.fold(np.float32(scale))), to=self.kind)
            if config.patch > 1:
                x = ops.unshuffle(g, x, config.patch, shape)
            h = self._convolve(self._enter(x), weight, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        return h, (conv.out_channels, shape[1] // config.patch, shape[2] // config.patch)

    def _block(self, block: Block, h: str, shape: Shape, embedding: Embedding) -> tuple[str, Shape]:
        for layer in _layers(block):
            with self.g.scope(self._names[layer]):
                if isinstance(layer, ResBlock):
                    h, shape = self._res_block(layer, h, shape, embedding)
                elif isinstance(layer, AttentionBlock):
                    h = self._attention(layer, h, shape)
                else:
                    h, shape = self._resample(layer, h, shape)
        return h, shape

    def _res_block(self, block: ResBlock, x: str, shape: Shape, embedding: Embedding) -> tuple[str, Shape]:
        g = self.g
        norm, _, conv = _layers(block.in_layers)
        h = self._norm_silu(norm, x, shape)
        weight, bias = self.weights(conv)
        summand = None if block.scale_shift else embedding.summand(g, block)
        if summand and embedding.is_constant:
            bias = g.cast(g.op("Add", g.cast(bias, self.kind, FLOAT), summand), FLOAT, self.kind)
            summand = None
        if isinstance(block.resample, Upsample):
            h = self._upsample_conv(h, weight, bias, shape)
            x, shape = self._resample(block.resample, x, shape)
        else:
            if block.resample is not None:
                h, _ = self._resample(block.resample, h, shape)
                x, shape = self._resample(block.resample, x, shape)
            h = self._convolve(h, weight, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        shape = (conv.out_channels, *shape[1:])
        norm, _, _, conv = _layers(block.out_layers)
        if block.scale_shift:
            h = self._norm_silu(norm, h, shape, affine=embedding.affine(g, block), is_constant=embedding.is_constant)
        else:
            h = g.op("Add", h, g.cast(summand, FLOAT, self.kind)) if summand else h
            h = self._norm_silu(norm, h, shape)
        h = self._conv(conv, h)
        if isinstance(block.skip_connection, nn.Conv2d):
            x = self._conv(block.skip_connection, x)
        return g.op("Add", x, h), shape

    def _attention(self, block: AttentionBlock, x: str, shape: Shape) -> str:
        h = self.g.cast(self._norm(block.norm, x, shape), FLOAT, self.kind)
        weight, bias = self.weights(block.qkv)
        h = ops.attention(self.g, h, (weight, bias), block.heads, shape)
        return self.g.op("Add", x, self._conv(block.proj_out, h))

    def _resample(self, layer: nn.Module, h: str, shape: Shape) -> tuple[str, Shape]:
        c, height, width = shape
        if isinstance(layer, Upsample):
            if layer.conv is not None:
                weight, bias = self.weights(layer.conv)
                return self._upsample_conv(h, weight, bias, shape), (c, 2 * height, 2 * width)
            return self._upsample(h, shape), (c, 2 * height, 2 * width)
        assert isinstance(layer, Downsample)
        h = self._conv(layer.op, h) if isinstance(layer.op, nn.Conv2d) else self._average(h)
        return h, (c, height // 2, width // 2)

    def _norm(
        self, norm: GroupNorm, x: str, shape: Shape, affine: tuple[str, str] | None = None, is_constant: bool = True
    ) -> str:
        """Group normalisation in float32; ``affine``: in place of the norm's own weights."""
        normal = ops.normalise(self.g, self.g.cast(x, self.kind, FLOAT), norm.num_groups, norm.eps, shape)
        scale, shift = affine or self.weights(norm)
        return (ops.channel_affine if is_constant else ops.image_affine)(self.g, normal, scale, shift)

    def _norm_silu(
        self,
        norm: GroupNorm,
        x: str,
        shape: Shape,
        kind: int | None = None,
        affine: tuple[str, str] | None = None,
        is_constant: bool = True,
    ) -> str:
        """Normalisation and SiLU, the result of ``kind``, or of the network's."""
        h = ops.silu(self.g, self._norm(norm, x, shape, affine, is_constant))
        return self.g.cast(h, FLOAT, self.kind if kind is None else kind)

    def _conv(self, conv: nn.Conv2d, x: str, kind: int | None = None) -> str:
        return self._convolve(
            x,
            *self._weights(conv, self.kind if kind is None else kind),
            kernel_shape=list(conv.kernel_size),
            strides=list(conv.stride),
            pads=[int(each) for each in conv.padding] * 2,
        )

    # The parts that depend on the layout of feature maps

    def _enter(self, x: str) -> str:
        return x

    def _leave(self, h: str) -> str:
        return h

    def _convolve(self, x: str, weight: str, bias: str, **attributes: Any) -> str:
        return self.g.op("Conv", x, weight, bias, **attributes)

    def _average(self, x: str) -> str:
        """The mean of each 2x2 pixels."""
        return self.g.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])

    def _upsample(self, x: str, shape: Shape) -> str:
        return ops.repeat(self.g, x, shape) if self.kind == BFLOAT else ops.upsample(self.g, x)

    def _upsample_conv(self, x: str, weight: str, bias: str, shape: Shape) -> str:
        return ops.upsample_conv(self.g, x, weight, bias, *[shape] * (self.kind == BFLOAT))


def _layers(several: nn.Module) -> list[Any]:
    """The layers in turn, as what they are: torch types them all as modules."""
    return list(several.children())
