"""The three graphs of DESIGN: f itself, a whole sampler of K fixed steps, and F alone for a GPU's fused step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cm_runtime.choices import Precision
from cm_runtime.export import skip_scale
from cm_runtime.export.builder import BFLOAT, BOOL, FLOAT, HALF, INT64, UINT8, Graph
from cm_runtime.export.embedding import ByClass, Constant, Embedding, embedded
from cm_runtime.export.unet import NetworkWriter
from cm_runtime.manifest import OUTPUTS
from cm_runtime.networks.consistency import ConsistencyModel
from cm_runtime.onnx_graph.expression import Expression
from cm_runtime.precond import Precond

KINDS: dict[Precision, int] = {"fp32": FLOAT, "fp16": HALF, "bf16": BFLOAT}
LARGEST_SUM = 2.0**126  # of the values of an image; far above any, and finite in bfloat16, which engines may compute in


def denoiser(model: ConsistencyModel, precision: Precision = "fp32") -> Graph:
    """f: x (N,C,H,W), sigma (N,) float32, label (N,) int64 with classes -> denoised (N,C,H,W) float32."""
    g = _graph(precision)
    shape: list[int | str] = ["N", *model.config.image_shape]
    x, sigma = g.input("x", FLOAT, shape), g.input("sigma", FLOAT, ["N"])
    label = _label(g, model)
    form, kind = model.precond, KINDS[precision]
    network = NetworkWriter(g, model.F, kind)
    column = g.op("Reshape", sigma, g.constant([-1, 1, 1, 1], INT64))
    x_in = g.op("Mul", form.c_in(Expression(g, column)).value, x)
    if kind != FLOAT:
        x_in = g.op("Cast", x_in, to=kind)
    c_noise = form.c_noise(Expression(g, sigma)).value
    F = network.evaluate(x_in, embedded(g, model.F, network.weights, c_noise, label))
    if form.form == "piecewise":
        s = Expression(g, column)
        y = (form.c_skip(s) * Expression(g, x) + form.c_out(s) * Expression(g, F)).value
    else:
        y = skip_scale.node(g, x, F, sigma, form)
    g.output(y, OUTPUTS["denoiser"][0], FLOAT, shape)
    return g


def network(model: ConsistencyModel, precision: Precision = "fp32") -> Graph:
    """F: x_in (N,C,H,W) of the network's type, c_noise (N,) float32, label -> F (N,C,H,W) float32."""
    g = _graph(precision)
    shape: list[int | str] = ["N", *model.config.image_shape]
    kind = KINDS[precision]
    x, c_noise = g.input("x_in", kind, shape), g.input("c_noise", FLOAT, ["N"])
    label = _label(g, model)
    writer = NetworkWriter(g, model.F, kind)
    F = writer.evaluate(x, embedded(g, model.F, writer.weights, c_noise, label))
    g.output(F, OUTPUTS["network"][0], FLOAT, shape)
    return g


def sampler(
    model: ConsistencyModel, sigmas: Sequence[float], precision: Precision = "fp32", *, inline: bool = False
) -> Graph:
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1) at fixed ``sigmas``, every one of them folded in.

    noise (K,N,C,H,W) float32 standard normals, label (N,) int64 with classes -> images (N,H,W,C) uint8, and finite (N,)
    bool: false for an image some x0 of which was not finite, before the clamp that would hide it. inline: the
    skip-scaling as products with constants, in place of cm::SkipScale.
    """
    g = _graph(precision)
    c, h, w = model.config.image_shape
    noise = g.input("noise", FLOAT, [len(sigmas), "N", c, h, w])
    label = _label(g, model)
    writer, form = NetworkWriter(g, model.F, KINDS[precision]), model.precond
    x0 = total = ""
    for k, sigma in enumerate(sigmas):
        with g.scope(f"step{k}"):
            z = g.op("Gather", noise, g.constant(k, INT64), axis=0)
            spread = sigma if k == 0 else math.sqrt(sigma**2 - model.config.sigma_min**2)
            x = g.op("Mul", z, g.folded(np.float32(spread)))
            if k:
                x = g.op("Add", x0, x)
            embedding = _embedding(writer, float(form.c_noise(np.float32(sigma))), label, len(sigmas))
            F = writer.evaluate(x, embedding, float(form.c_in(np.float32(sigma))))
            x0 = _skip_scaled(g, form, x, F, sigma, inline=inline)
            added = g.op("ReduceSum", x0, g.constant([1, 2, 3], INT64), keepdims=0)
            total = g.op("Add", total, added) if k else added
            x0 = g.op("Clip", x0, *_bounds(g))
    grey = g.op("Mul", g.op("Add", x0, g.constant(np.float32(1))), g.constant(np.float32(127.5)))
    grey = g.op("Transpose", g.op("Round", grey), perm=[0, 2, 3, 1])
    images, finite = OUTPUTS["sampler"]
    g.output(g.op("Cast", grey, to=UINT8), images, UINT8, ["N", h, w, c])
    g.output(g.op("LessOrEqual", g.op("Abs", total), g.constant(np.float32(LARGEST_SUM))), finite, BOOL, ["N"])
    return g


def _skip_scaled(g: Graph, form: Precond, x: str, F: str, sigma: float, *, inline: bool) -> str:
    """c_skip x + c_out F at a noise level that is known."""
    s = np.float32(sigma)
    if form.form == "piecewise":  # every level of a sampler lies above the boundary
        return F
    if not inline:
        return skip_scale.node(g, x, F, g.folded(s.reshape(1)), form)
    skip, out = (g.folded(np.float32(c)) for c in (form.c_skip(s), form.c_out(s)))
    return g.op("Add", g.op("Mul", skip, x), g.op("Mul", out, F))


def _embedding(writer: NetworkWriter, c_noise: float, label: str | None, steps: int) -> Embedding:
    """The cheapest that the classes allow: a table is kept where it is smaller than the weights that make it."""
    net = writer.net
    if label is None:
        return Constant(net, c_noise)
    if steps * net.config.num_classes < 4 * net.config.channels:
        return ByClass(net, c_noise, label)
    return embedded(writer.g, net, writer.weights, c_noise, label)


def _graph(precision: Precision) -> Graph:
    return Graph(22) if precision == "bf16" else Graph()


def _label(g: Graph, model: ConsistencyModel) -> str | None:
    return g.input("label", INT64, ["N"]) if model.config.network.num_classes else None


def _bounds(g: Graph) -> tuple[str, str]:
    return g.constant(np.float32(-1)), g.constant(np.float32(1))
