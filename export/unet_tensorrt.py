"""F in the forms that TensorRT makes the fewest kernels of, in standard operators, so that other engines can check it.

GroupNormalization   its scale and shift inside. The form of other engines, normalisation between two Reshapes, ties
                     feature maps to (N,C,H,W), where convolutions in half types want (N,H,W,C).
attention            softmax(q k^T) v of (N,heads,pixels,dim), q scaled before, as TensorRT's fused attention wants it
weights              of every convolution as they are stored, since those that are computed restrict its choice
"""

from __future__ import annotations

import numpy as np

from cm_runtime.export import ops
from cm_runtime.export.builder import FLOAT, INT64
from cm_runtime.export.ops import Shape
from cm_runtime.export.unet import NetworkWriter
from cm_runtime.networks.unet import AttentionBlock, GroupNorm


class TensorRtNetworkWriter(NetworkWriter):
    """Writes evaluations for the parsers of TensorRT 10.16 and 11, and of TensorRT for RTX."""

    def _norm(
        self, norm: GroupNorm, x: str, shape: Shape, affine: tuple[str, str] | None = None, is_constant: bool = True
    ) -> str:
        if norm.num_groups == 1:  # of which the parsers make a normalisation of each channel (NVIDIA/TensorRT 4756)
            return super()._norm(norm, x, shape, affine, is_constant)
        g, x, how = self.g, self.g.cast(x, self.kind, FLOAT), {"num_groups": norm.num_groups, "epsilon": norm.eps}
        if affine is None or is_constant:
            return g.op("GroupNormalization", x, *(affine or self.weights(norm)), domain="", **how)
        one, zero = g.constant(np.ones(norm.num_channels)), g.constant(np.zeros(norm.num_channels))
        return ops.image_affine(g, g.op("GroupNormalization", x, one, zero, domain="", **how), *affine)

    def _attention(self, block: AttentionBlock, x: str, shape: Shape) -> str:
        g, (c, height, width), dim = self.g, shape, shape[0] // block.heads
        h = g.cast(self._norm(block.norm, x, shape), FLOAT, self.kind)
        qkv = g.ops("Split", self._conv(block.qkv, h), outputs=3, axis=1, num_outputs=3)
        heads = g.constant([0, block.heads, dim, height * width], INT64)
        q, k, v = (g.op("Reshape", each, heads) for each in qkv)
        q = g.op("Mul", q, g.constant(np.float32(dim**-0.5), self.kind))
        q, v = (g.op("Transpose", each, perm=[0, 1, 3, 2]) for each in (q, v))
        h = g.op("MatMul", g.op("Softmax", g.op("MatMul", q, k), axis=-1), v)
        h = g.op("Reshape", g.op("Transpose", h, perm=[0, 1, 3, 2]), g.constant([0, c, height, width], INT64))
        return g.op("Add", x, self._conv(block.proj_out, h))

    def _upsample(self, x: str, shape: Shape) -> str:
        return ops.upsample(self.g, x)

    def _upsample_conv(self, x: str, weight: str, bias: str, shape: Shape) -> str:
        return self._convolve(self._upsample(x, shape), weight, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
