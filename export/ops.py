"""The parts of a network as nodes, each in the form that measures fastest (benchmarks/README.md, the rewrites).

Images are (N,C,H,W), of which N is dynamic and all else known; C, H and W are an argument where a form needs them.
What a form makes of weights alone, engines compute once, when they load the graph: in the file is the plain weight.
"""

from __future__ import annotations

import math

import numpy as np

from cm_runtime.export.builder import FLOAT, INT64, Graph

Shape = tuple[int, int, int]


def normalise(g: Graph, x: str, groups: int, eps: float, shape: Shape) -> str:
    """(x - mean) / std with the statistics of each group, float32: InstanceNormalization over whole groups.

    From opset 22 on ONNX Runtime's CUDA provider has none, and LayerNormalization, which is as fast, stands there.
    """
    if g.opset >= 22:
        grouped = g.op("Reshape", x, g.constant([0, groups, -1], INT64))
        ones = g.constant(np.ones(math.prod(shape) // groups))
        normal = g.op("LayerNormalization", grouped, ones, axis=-1, epsilon=eps)
    else:
        one, zero = g.constant(np.ones(groups)), g.constant(np.zeros(groups))
        grouped = g.op("Reshape", x, g.constant([0, groups, -1], INT64))
        normal = g.op("InstanceNormalization", grouped, one, zero, epsilon=eps)
    return g.op("Reshape", normal, g.constant([0, *shape], INT64))


def channel_affine(g: Graph, x: str, scale: str, shift: str) -> str:
    """scale x + shift, numbers a channel (C,): a BatchNormalization of variance 1, one pass where two ops are two."""
    zeros, ones = g.constant(np.zeros(g.shape(scale))), g.constant(np.ones(g.shape(scale)))
    return g.op("BatchNormalization", x, scale, shift, zeros, ones, epsilon=0.0)


def image_affine(g: Graph, x: str, scale: str, shift: str) -> str:
    """scale x + shift, another pair for each image: (N,C,1,1)."""
    return g.op("Add", g.op("Mul", x, scale), shift)


def silu(g: Graph, x: str) -> str:
    """x sigmoid(x), of which engines make one node."""
    return g.op("Mul", x, g.op("Sigmoid", x))


def attention(g: Graph, x: str, qkv: tuple[str, str], heads: int, shape: Shape) -> str:
    """softmax(q^T k / sqrt(dim)) v of q, k and v: 1x1 convolutions of x, their weights one after another in ``qkv``.

    Three products make no copies as one that is split does; pixels stay innermost, so that the result needs no
    transposition; and the root goes into the weights of q, which also keeps scores in range in half precision.
    """
    c, height, width = shape
    dim, kind = c // heads, g.kind(qkv[0])
    root = g.constant(np.float32(dim**-0.5))
    projected = []
    weights, biases = (g.ops("Split", each, outputs=3, axis=0, num_outputs=3) for each in qkv)
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if i == 0:
            w, b = (g.cast(g.op("Mul", g.cast(each, kind, FLOAT), root), FLOAT, kind) for each in (w, b))
        projection = g.op("Conv", x, w, b, kernel_shape=[1, 1])
        projected.append(g.op("Reshape", projection, g.constant([0, heads, dim, height * width], INT64)))
    q, k, v = projected
    scores = g.op("MatMul", g.op("Transpose", q, perm=[0, 1, 3, 2]), k)
    shares = g.op("Softmax", scores, axis=-1)
    h = g.op("MatMul", v, g.op("Transpose", shares, perm=[0, 1, 3, 2]))
    return g.op("Reshape", h, g.constant([0, *shape], INT64))


def upsample(g: Graph, x: str, pixels: tuple[int, int] = (2, 3)) -> str:
    """Nearest-neighbour x2 along the axes ``pixels``."""
    scales = g.constant([2.0 if axis in pixels else 1.0 for axis in range(4)], FLOAT)
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return g.op("Resize", x, "", scales, **how)


def repeat(g: Graph, x: str, shape: Shape) -> str:
    """`upsample` for bfloat16, in which ONNX Runtime's CUDA provider has no Resize. shape: of x."""
    c, height, width = shape
    apart = g.op("Reshape", x, g.constant([0, c, height, 1, width, 1], INT64))
    repeated = g.op("Expand", apart, g.constant([1, 1, 1, 2, 1, 2], INT64))
    return g.op("Reshape", repeated, g.constant([0, c, 2 * height, 2 * width], INT64))


def upsample_conv(g: Graph, x: str, weight: str, bias: str, shape: Shape | None = None) -> str:
    """A 3x3 convolution after nearest-neighbour x2, as four 2x2 convolutions of x itself: 4 taps a pixel and not 9.

    Each makes the pixels of one place in 2x2; two neighbours that show the same pixel of x share a tap, the sum of
    theirs. shape: of x, for bfloat16, in which ONNX Runtime's CUDA provider has no DepthToSpace.
    """

    def taps(w: str, axis: int, place: int) -> str:
        first, second, third = (g.op("Slice", w, *(g.constant([v], INT64) for v in (i, i + 1, axis))) for i in range(3))
        pair = (first, g.op("Add", second, third)) if place == 0 else (g.op("Add", first, second), third)
        return g.op("Concat", *pair, axis=axis)

    parts, kind = [], g.kind(weight)
    full = g.cast(weight, kind, FLOAT)
    for i in (0, 1):
        rows = taps(full, 2, i)
        for j in (0, 1):
            pads = [1 - i, 1 - j, i, j]
            kernel = g.cast(taps(rows, 3, j), FLOAT, kind)
            parts.append(g.op("Conv", x, kernel, bias, kernel_shape=[2, 2], pads=pads))
    together = g.op("Concat", *parts, axis=1)
    if shape is None:
        return g.op("DepthToSpace", together, blocksize=2, mode="DCR")
    c, (_, height, width) = g.shape(weight)[0], shape
    places = g.op("Reshape", together, g.constant([0, 2, 2, c, height, width], INT64))
    pixels = g.op("Transpose", places, perm=[0, 3, 4, 1, 5, 2])
    return g.op("Reshape", pixels, g.constant([0, c, 2 * height, 2 * width], INT64))


def unshuffle(g: Graph, x: str, patch: int, shape: Shape) -> str:
    """torch's pixel_unshuffle of images of ``shape``, whose order of channels no one node makes."""
    c, height, width = (shape[0], shape[1] // patch, shape[2] // patch)
    x = g.op("Reshape", x, g.constant([0, c, height, patch, width, patch], INT64))
    x = g.op("Transpose", x, perm=[0, 1, 3, 5, 2, 4])
    return g.op("Reshape", x, g.constant([0, c * patch**2, height, width], INT64))
