"""The time and class embedding of residual blocks: constants where the noise level is fixed, nodes otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cm_runtime.export import ops
from cm_runtime.export.builder import FLOAT, INT64, Graph
from cm_runtime.networks.unet import ResBlock, UNet, timestep_embedding

Axes = tuple[int, int]


class Embedding(Protocol):
    """The modulation of a residual block."""

    is_constant: bool  # the same for every image: numbers a channel (C,), else (N,C,1,1), or as feature maps lie

    def affine(self, g: Graph, block: ResBlock) -> tuple[str, str]:
        """Scale and shift of the block's second normalisation, the norm's own weights in them."""
        ...

    def summand(self, g: Graph, block: ResBlock) -> str:
        """The summand before that normalisation, of a block without scale-shift."""
        ...


class Folded:
    """One noise level: torch computes the numbers, for no class or for each of a few, looked up by label."""

    def __init__(self, net: UNet, c_noise: float, label: str | None, pixels: Axes = (2, 3)) -> None:
        self._pixels = pixels
        self.is_constant = label is None
        with torch.inference_mode():
            e = time_embedding(net, c_noise)
            self._e = e if label is None else e + net.label_emb.weight
        self._label = label

    def affine(self, g: Graph, block: ResBlock) -> tuple[str, str]:
        norm = block.out_layers[0]
        with torch.inference_mode():
            scale, shift = block.emb_layers(self._e).chunk(2, dim=1)
            factor, summand = norm.weight * (1 + scale), norm.bias * (1 + scale) + shift
        return self._fold(g, factor), self._fold(g, summand)

    def summand(self, g: Graph, block: ResBlock) -> str:
        with torch.inference_mode():
            return self._fold(g, block.emb_layers(self._e))

    def _fold(self, g: Graph, table: Tensor) -> str:
        """A table (classes, C) as its one row (C,), or as the row of each label, (N,C,1,1)."""
        if self._label is None:
            return g.fold(_array(table[0]))
        return g.op("Gather", g.fold(np.expand_dims(_array(table), self._pixels)), self._label, axis=0)


class Projected:
    """Any noise level, or many classes: e as nodes, and each block's projection of it.

    e: writes the sum of the embeddings, (N or 1, 4 channels) float32.
    """

    is_constant = False

    def __init__(self, g: Graph, e: str, weights: Callable[[nn.Module], list[str]], pixels: Axes) -> None:
        self._pixels = pixels
        self._activated = ops.silu(g, e)
        self._weights = weights
        self._casts: dict[int, str] = {FLOAT: self._activated}

    def affine(self, g: Graph, block: ResBlock) -> tuple[str, str]:
        norm = block.out_layers[0]
        scale, shift = g.ops("Split", self._project(g, block), outputs=2, axis=1, num_outputs=2)
        weight, bias = self._weights(norm)
        scale = g.op("Add", scale, g.constant(np.float32(1)))
        factor = g.op("Mul", scale, weight)
        summand = g.op("Add", g.op("Mul", scale, bias), shift)
        return self._columns(g, factor), self._columns(g, summand)

    def summand(self, g: Graph, block: ResBlock) -> str:
        return self._columns(g, self._project(g, block))

    def _columns(self, g: Graph, value: str) -> str:
        """(N,C) with pixels, of which it has one."""
        return g.op("Unsqueeze", value, g.constant(self._pixels, INT64))

    def _project(self, g: Graph, block: ResBlock) -> str:
        weight, bias = self._weights(block.emb_layers[1])
        kind = g.kind(weight)
        if kind not in self._casts:
            self._casts[kind] = g.cast(self._activated, FLOAT, kind)
        return g.cast(g.op("Gemm", self._casts[kind], weight, bias, transB=1), kind, FLOAT)


def project(
    g: Graph,
    net: UNet,
    weights: Callable[[nn.Module], list[str]],
    c_noise: str | float,
    label: str | None,
    pixels: Axes = (2, 3),
) -> Projected:
    """The embedding as nodes: of c_noise (N,) float32, or of a number, which torch embeds."""
    if isinstance(c_noise, str):
        e = _time_embedding(g, net, weights, c_noise)
    else:
        e = g.fold(_array(time_embedding(net, c_noise)))
    if label is not None:
        (table,) = weights(net.label_emb)
        e = g.op("Add", g.cast(g.op("Gather", table, label, axis=0), g.kind(table), FLOAT), e)
    return Projected(g, e, weights, pixels)


def time_embedding(net: UNet, c_noise: float) -> Tensor:
    """The time embedding of one noise level, (1, 4 channels) float32."""
    with torch.inference_mode():
        e: Tensor = net.time_embed(timestep_embedding(torch.tensor([c_noise]), net.config.channels))
        return e


def _time_embedding(g: Graph, net: UNet, weights: Callable[[nn.Module], list[str]], c_noise: str) -> str:
    """`unet.timestep_embedding` and the layers behind it as nodes, in float32: (N, 4 channels)."""
    channels = net.config.channels
    half = channels // 2
    frequencies = np.exp(-np.log(10000) * np.arange(half, dtype=np.float32) / np.float32(half)).astype(np.float32)
    column = g.op("Reshape", c_noise, g.constant([-1, 1], INT64))
    angle = g.op("Mul", column, g.constant(frequencies.reshape(1, -1)))
    e = g.op("Concat", g.op("Cos", angle), g.op("Sin", angle), axis=1)
    if channels % 2:
        e = g.op("Pad", e, g.constant([0, 0, 0, 1], INT64))
    first, _, second = net.time_embed
    for i, layer in enumerate((first, second)):
        weight, bias = (g.cast(each, g.kind(each), FLOAT) for each in weights(layer))
        e = g.op("Gemm", ops.silu(g, e) if i else e, weight, bias, transB=1)
    return e


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().numpy()
    return array
