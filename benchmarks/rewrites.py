"""The worth of each form of `export.ops`: a network as it is exported, against the same with one form made plain.

    python benchmarks/rewrites.py --network cifar32 --batch 1 8 --seconds 20

A one-step sampler of a standing network, exported with all forms as they are, and once for each plain or rejected form
below; each in a process of its own on ONNX Runtime and on OpenVINO, taking turns. A row says how many times as long the
other form takes: above 1, the exported form pays. Images are compared first: one grey level at most.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
from race import Runner, race, ratio_text

from cm_runtime import export, noise
from cm_runtime.bench.machine import machine
from cm_runtime.bench.networks import standing_checkpoint
from cm_runtime.checkpoints.native import Checkpoint, read_checkpoint
from cm_runtime.export import embedding, ops, steps
from cm_runtime.export.builder import INT64, Graph
from cm_runtime.export.ops import Shape
from cm_runtime.export.unet import NetworkWriter

GREY = 2 / 255 * 1.001
ENGINES = ("ort", "openvino")


def split_attention(g: Graph, x: str, qkv: tuple[str, str], heads: int, shape: Shape) -> str:
    """One product for q, k and v, which is then split."""
    c, height, width = shape
    dim = c // heads
    product = g.op("Conv", x, *qkv, kernel_shape=[1, 1])
    parts = g.op("Reshape", product, g.constant([0, 3 * heads, dim, height * width], INT64))
    q, k, v = g.ops("Split", parts, outputs=3, axis=1, num_outputs=3)
    q = g.op("Mul", q, g.constant(np.float32(dim**-0.5)))
    scores = g.op("MatMul", g.op("Transpose", q, perm=[0, 1, 3, 2]), k)
    shares = g.op("Softmax", scores, axis=-1)
    h = g.op("MatMul", v, g.op("Transpose", shares, perm=[0, 1, 3, 2]))
    return g.op("Reshape", h, g.constant([0, *shape], INT64))


def plain_upsampled_conv(g: Graph, x: str, weight: str, bias: str) -> str:
    """The 3x3 convolution of the larger image."""
    return g.op("Conv", ops.upsample(g, x), weight, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1])


def transposed_conv(g: Graph, x: str, weight: str, bias: str) -> str:
    """One transposed convolution of 4x4, whose kernel is the 3x3 one summed over 2x2."""
    end = np.iinfo(np.int64).min
    flips = [g.constant(each, INT64) for each in ([-1, -1], [end, end], [2, 3], [-1, -1])]
    w = g.op("Transpose", g.op("Slice", weight, *flips), perm=[1, 0, 2, 3])
    for axis in (2, 3):
        before, after = [0] * 8, [0] * 8
        before[axis], after[4 + axis] = 1, 1
        w = g.op("Add", g.op("Pad", w, g.constant(after, INT64)), g.op("Pad", w, g.constant(before, INT64)))
    return g.op("ConvTranspose", x, w, bias, strides=[2, 2], pads=[1, 1, 1, 1], kernel_shape=[4, 4])


def moments(g: Graph, x: str, groups: int, eps: float, shape: Shape) -> str:
    """Mean and mean square of each channel, put together for each group: x is read twice and written once."""
    c = shape[0]
    mean, square = (g.op("ReduceMean", v, g.constant([2, 3], INT64), keepdims=1) for v in (x, g.op("Mul", x, x)))
    split = g.constant([0, groups, c // groups, 1], INT64)
    mean, square = (
        g.op("ReduceMean", g.op("Reshape", v, split), g.constant([2], INT64), keepdims=1) for v in (mean, square)
    )
    variance = g.op("Sub", square, g.op("Mul", mean, mean))
    deviation = g.op("Sqrt", g.op("Add", variance, g.constant(np.float32(eps))))
    each = g.constant(np.ones((1, 1, c // groups, 1)))
    mean, deviation = (
        g.op("Reshape", g.op("Mul", v, each), g.constant([0, c, 1, 1], INT64)) for v in (mean, deviation)
    )
    return g.op("Div", g.op("Sub", x, mean), deviation)


def opset_norm(g: Graph, x: str, groups: int, eps: float, shape: Shape) -> str:
    """GroupNormalization of opset 21."""
    g.opset = 21
    one, zero = g.constant(np.ones(shape[0])), g.constant(np.zeros(shape[0]))
    return g.op("GroupNormalization", x, one, zero, num_groups=groups, epsilon=eps)


def layer_norm(g: Graph, x: str, groups: int, eps: float, shape: Shape) -> str:
    """LayerNormalization over whole groups."""
    groups_of_x = g.op("Reshape", x, g.constant([0, groups, -1], INT64))
    size = int(np.prod(shape)) // groups
    normal = g.op("LayerNormalization", groups_of_x, g.constant(np.ones(size)), axis=-1, epsilon=eps)
    return g.op("Reshape", normal, g.constant([0, *shape], INT64))


def compute_embedding(writer: NetworkWriter, c_noise: float, label: str | None, steps: int) -> embedding.Embedding:
    """The embedding computed at each evaluation, for each image, as of an input."""
    g = writer.g
    one = g.op("Gather", g.op("Shape", "noise"), g.constant([1], INT64))
    c_noises = g.op("Expand", g.constant(np.full(1, c_noise, np.float32)), one)
    return embedding.project(g, writer.net, writer.weights, c_noises, label)


def mul_and_add(g: Graph, x: str, scale: str, shift: str) -> str:
    """Two products, of numbers a channel."""
    column = g.constant([-1, 1, 1], INT64)
    return ops.image_affine(g, x, g.op("Reshape", scale, column), g.op("Reshape", shift, column))


PLAIN: dict[str, tuple[object, str, Callable[..., object]]] = {
    "embedding computed, not folded": (steps, "_embed", compute_embedding),
    "upsampled convolution: 3x3 of the larger image": (ops, "upsample_conv", plain_upsampled_conv),
    "upsampled convolution: transposed 4x4": (ops, "upsample_conv", transposed_conv),
    "scale and shift: Mul and Add": (ops, "channel_affine", mul_and_add),
    "attention: one product, split": (ops, "attention", split_attention),
    "normalisation: GroupNormalization (opset 21)": (ops, "normalise", opset_norm),
    "normalisation: LayerNormalization": (ops, "normalise", layer_norm),
    "normalisation: moments of channels": (ops, "normalise", moments),
}


def _export_forms(checkpoint: Checkpoint, folder: Path) -> dict[str, Path]:
    """The graph as it is exported, under "", and one for each other form."""
    paths = {}
    for number, name in enumerate(["", *PLAIN]):
        paths[name] = folder / f"{number}.onnx"
        with ExitStack() as stack:
            if name:
                where, attribute, plain = PLAIN[name]
                stack.enter_context(mock.patch.object(where, attribute, plain))
            export.onnx(checkpoint, paths[name], graph="sampler", steps=1)
    return paths


def _table(network: str, batches: Sequence[int], seconds: float, folder: Path) -> list[list[str]]:
    checkpoint = read_checkpoint(standing_checkpoint(network, folder))
    paths = _export_forms(checkpoint, folder)
    classes = checkpoint.config.network.num_classes
    cells: dict[str, list[str]] = {name: [] for name in PLAIN}
    for engine in ENGINES:
        for batch in batches:
            z = noise.normal(0, np.arange(batch), 0, checkpoint.config.image_shape)[None]
            label = np.arange(batch) % classes if classes else None
            runners = {name: Runner(path, engine, "fp32") for name, path in paths.items()}
            times = race(runners, z, (checkpoint.config.sigma_max,), label, folder, seconds=seconds)
            for name in PLAIN:
                difference = float(np.abs(times[name].images - times[""].images).max())
                assert difference <= GREY, f"{name}: the images differ by {difference}"
                cells[name].append(ratio_text(times[name], times[""]))
    heads = [f"{engine}, batch {batch}" for engine in ENGINES for batch in batches]
    return [["the other form takes", *heads], ["---", *["---:"] * len(heads)], *([k, *v] for k, v in cells.items())]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure the forms in which a network is exported.")
    parser.add_argument("--network", default="cifar32", help="a standing network (%(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="(1 8)")
    parser.add_argument("--seconds", type=float, default=30, help="of each race at least (%(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for row in _table(options.network, options.batch, options.seconds, Path(folder)):
            print(f"| {' | '.join(row)} |")
    print(f"\n{options.network}, one step; {machine().processor.model}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
