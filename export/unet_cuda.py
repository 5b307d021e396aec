"""F in operators of ONNX Runtime's CUDA provider, with feature maps (N,H,W,C), which tensor cores read as they lie.

NhwcConv             a convolution; its weight (O,I,h,w) of the checkpoint is transposed once, at loading
GroupNorm            statistics in float32, then scale and shift of each channel and SiLU, in two readings
MultiHeadAttention   of (N,pixels,C), without the scores in memory
QuickGelu            x sigmoid(x)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cm_runtime.errors import RequestError
from cm_runtime.errors.wording import quantity
from cm_runtime.export import ops
from cm_runtime.export.builder import FLOAT, INT64, Graph
from cm_runtime.export.ops import Shape
from cm_runtime.export.unet import NetworkWriter
from cm_runtime.networks.unet import AttentionBlock, GroupNorm, UNet
from cm_runtime.onnx_graph.rules import CONTRIB

TO_PIXELS, TO_CHANNELS = [0, 2, 3, 1], [0, 3, 1, 2]  # from channels first to last, and back
MOST_CHANNELS = 512  # of a group


class CudaNetworkWriter(NetworkWriter):
    """Writes evaluations for the CUDA provider.

    Weights and feature maps are float32 or float16. GroupNorm takes scales of channels alone: those that differ from
    image to image, and the SiLU behind them, are in the network's type.
    """

    channels, pixels = 3, (1, 2)

    def __init__(self, g: Graph, net: UNet, kind: int = FLOAT) -> None:
        super().__init__(g, net, kind)
        self._by_weight: dict[str, Any] = {}  # every step has the same

    def _enter(self, x: str) -> str:
        return self.g.op("Transpose", x, perm=TO_PIXELS)

    def _leave(self, h: str) -> str:
        return self.g.op("Transpose", h, perm=TO_CHANNELS)

    def _convolve(self, x: str, weight: str, bias: str, **attributes: Any) -> str:
        if weight not in self._by_weight:
            self._by_weight[weight] = self.g.op("Transpose", weight, perm=TO_PIXELS)
        return self.g.op("NhwcConv", x, self._by_weight[weight], bias, domain=CONTRIB, **attributes)

    def _average(self, x: str) -> str:
        return self._enter(super()._average(self._leave(x)))

    def _upsample(self, x: str, shape: Shape) -> str:
        return ops.upsample(self.g, x, self.pixels)

    def _upsample_conv(self, x: str, weight: str, bias: str, shape: Shape) -> str:
        return self._convolve(self._upsample(x, shape), weight, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    def _attention(self, block: AttentionBlock, x: str, shape: Shape) -> str:
        g, (c, height, width) = self.g, shape
        h = self._group_norm(block.norm, x, self.weights(block.norm))
        weight, bias = self.weights(block.qkv)
        if f"{weight}, split" not in self._by_weight:
            parts = [g.ops("Split", each, outputs=3, axis=0, num_outputs=3) for each in (weight, bias)]
            self._by_weight[f"{weight}, split"] = list(zip(*parts, strict=True))
        rows = g.constant([0, height * width, c], INT64)
        qkv = self._by_weight[f"{weight}, split"]
        q, k, v = (g.op("Reshape", self._convolve(h, *each, kernel_shape=[1, 1]), rows) for each in qkv)
        h = g.op("MultiHeadAttention", q, k, v, domain=CONTRIB, num_heads=block.heads)
        h = g.op("Reshape", h, g.constant([0, height, width, c], INT64))
        return g.op("Add", x, self._conv(block.proj_out, h))

    def _norm_silu(
        self,
        norm: GroupNorm,
        x: str,
        shape: Shape,
        kind: int | None = None,
        affine: tuple[str, str] | None = None,
        is_constant: bool = True,
    ) -> str:
        g, to = self.g, self.kind if kind is None else kind
        x = g.cast(x, self.kind, to)
        if affine is None or is_constant:
            return self._group_norm(norm, x, affine or self.weights(norm), activation=1)
        channels = norm.num_channels
        h = self._group_norm(norm, x, (g.constant(np.ones(channels)), g.constant(np.zeros(channels))))
        scale, shift = (g.cast(each, FLOAT, to) for each in affine)
        return g.op("QuickGelu", ops.image_affine(g, h, scale, shift), domain=CONTRIB, alpha=1.0)

    def _group_norm(self, norm: GroupNorm, x: str, affine: Any, activation: int = 0) -> str:
        size = norm.num_channels // norm.num_groups
        if size % 2 or size > MOST_CHANNELS:
            raise RequestError(
                f"ONNX Runtime's normalisation for a GPU takes an even number of channels in a group, at most"
                f" {MOST_CHANNELS}; this network has {quantity(size, 'channel')} in a group; export it with --for cpu"
            )
        how = {"groups": norm.num_groups, "epsilon": norm.eps, "activation": activation, "channels_last": 1}
        return self.g.op("GroupNorm", x, *affine, domain=CONTRIB, **how)
