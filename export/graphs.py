"""Three graphs: f itself, a whole sampler of K fixed steps, and F alone for a GPU's fused step."""

from __future__ import annotations

from collections.abc import Sequence

from cm_runtime.choices import Precision, Target
from cm_runtime.export import skip_scale
from cm_runtime.export.builder import BFLOAT, FLOAT, HALF, INT64, Graph
from cm_runtime.export.embedding import project
from cm_runtime.export.steps import GraphEvaluation, GraphSteps
from cm_runtime.export.unet import NetworkWriter
from cm_runtime.export.unet_cuda import CudaNetworkWriter
from cm_runtime.export.unet_tensorrt import TensorRtNetworkWriter
from cm_runtime.manifest import OUTPUTS
from cm_runtime.networks.consistency import ConsistencyModel
from cm_runtime.onnx_graph.expression import Expression
from cm_runtime.sampling import run

KINDS: dict[Precision, int] = {"fp32": FLOAT, "fp16": HALF, "bf16": BFLOAT}
WRITERS: dict[Target, type[NetworkWriter]] = {
    "cpu": NetworkWriter,
    "cuda": CudaNetworkWriter,
    "tensorrt": TensorRtNetworkWriter,
}


def denoiser(model: ConsistencyModel, precision: Precision = "fp32", target: Target = "cpu") -> Graph:
    """f: x (N,C,H,W), sigma (N,) float32, label (N,) int64 with classes -> denoised (N,C,H,W) float32."""
    g = _graph(precision, target)
    shape: list[int | str] = ["N", *model.config.image_shape]
    x, sigma = g.input("x", FLOAT, shape), g.input("sigma", FLOAT, ["N"])
    label = _label(g, model)
    form, kind = model.precond, KINDS[precision]
    network = WRITERS[target](g, model.F, kind)
    column = g.op("Reshape", sigma, g.constant([-1, 1, 1, 1], INT64))
    x_in = g.op("Mul", form.c_in(Expression(g, column)).value, x)
    if kind != FLOAT:
        x_in = g.op("Cast", x_in, to=kind)
    c_noise = form.c_noise(Expression(g, sigma)).value
    F = network.evaluate(x_in, project(g, model.F, network.weights, c_noise, label, network.pixels))
    if form.form == "piecewise":
        s = Expression(g, column)
        y = (form.c_skip(s) * Expression(g, x) + form.c_out(s) * Expression(g, F)).value
    else:
        y = skip_scale.node(g, x, F, sigma, form)
    g.output(y, OUTPUTS["denoiser"][0], FLOAT, shape)
    return g


def network(model: ConsistencyModel, precision: Precision = "fp32", target: Target = "cpu") -> Graph:
    """F: x_in (N,C,H,W) of the network's type, c_noise (N,) float32, label -> F (N,C,H,W) float32."""
    g = _graph(precision, target)
    shape: list[int | str] = ["N", *model.config.image_shape]
    kind = KINDS[precision]
    x, c_noise = g.input("x_in", kind, shape), g.input("c_noise", FLOAT, ["N"])
    label = _label(g, model)
    writer = WRITERS[target](g, model.F, kind)
    F = writer.evaluate(x, project(g, model.F, writer.weights, c_noise, label, writer.pixels))
    g.output(F, OUTPUTS["network"][0], FLOAT, shape)
    return g


def sampler(
    model: ConsistencyModel,
    sigmas: Sequence[float],
    precision: Precision = "fp32",
    target: Target = "cpu",
    *,
    inline: bool = False,
) -> Graph:
    """`sampling.run` at fixed ``sigmas``, every one of them folded in.

    noise (K,N,C,H,W) float32 standard normals, label (N,) int64 with classes -> images (N,H,W,C) uint8, and finite (N,)
    bool: false for an image some x0 of which was not finite, before the clamp that would hide it. inline: the
    skip-scaling as products with constants, in place of cm::SkipScale.
    """
    g = _graph(precision, target)
    noise = g.input("noise", FLOAT, [len(sigmas), "N", *model.config.image_shape])
    label = _label(g, model)
    writer = WRITERS[target](g, model.F, KINDS[precision])
    evaluation = GraphEvaluation(writer, model.precond, sigmas, inline)
    run(evaluation, GraphSteps(g, model.config, len(sigmas), noise), sigmas, label)
    return g


def _graph(precision: Precision, target: Target) -> Graph:
    """A graph of the operators that it needs: convolutions in bf16 are in 22, GroupNormalization in 21."""
    return Graph(22) if precision == "bf16" or target == "tensorrt" else Graph()


def _label(g: Graph, model: ConsistencyModel) -> str | None:
    return g.input("label", INT64, ["N"]) if model.config.network.num_classes else None
