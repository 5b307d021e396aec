"""checkpoint -> ``.onnx``, graph ``denoiser``: x, sigma, label -> denoised, any batch size."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import onnx as onnx_package
import torch
from onnx import TensorProto, helper, inliner, numpy_helper
from torch import Tensor, nn

from cm_runtime import files
from cm_runtime.artifact import METADATA_KEY, Manifest, read_manifest
from cm_runtime.checkpoint import Checkpoint
from cm_runtime.errors import EngineError, RequestError
from cm_runtime.export import skip_scale
from cm_runtime.export.parity import measure
from cm_runtime.model import ConsistencyModel


def onnx(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    precision: Literal["fp32"] = "fp32",
    inline: bool = False,
    force: bool = False,
) -> Manifest:
    """Exports ``checkpoint`` to ``path`` and returns the manifest inside it, with the parity measured.

    inline: cm::SkipScale as standard ops in the graph itself, for engines without local functions. Weights that the
    checkpoint stores in float16 are stored so, and computed in float32. Raises ParityError when the file's outputs
    miss the float32 torch model's by more than 1e-4, OutputError when ``path`` cannot be written or exists without
    ``force``; either way nothing is left behind.
    """
    if precision != "fp32":
        raise RequestError(f"this version exports fp32, not {precision}")
    target = Path(path)
    if target.suffix != ".onnx":
        raise RequestError(f"{target}: an ONNX file's name ends in .onnx")
    files.check_writable(target, force=force)
    model = checkpoint.model()
    graph = build_graph(model)
    if any(tensor.dtype == torch.float16 for tensor in checkpoint.ema[checkpoint.default_ema].values()):
        store_halves(graph)
    if inline:
        graph = inliner.inline_local_functions(graph)
    manifest = checkpoint.manifest()
    manifest = manifest.model_copy(update={"parity": measure(graph.SerializeToString(), model, manifest)})
    helper.set_model_props(graph, {METADATA_KEY: manifest.model_dump_json()})
    onnx_package.checker.check_model(graph, full_check=True)
    with files.written(target, force=force) as temporary:
        temporary.write_bytes(graph.SerializeToString(deterministic=True))
        if read_manifest(temporary) != manifest:
            raise EngineError(f"{target}: the manifest does not read back as it was written")
    return manifest


class _Denoiser(nn.Module):
    """f with SkipScale as one node; the piecewise form has no smooth coefficients and stays standard ops."""

    def __init__(self, model: ConsistencyModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        F = self.model.network(x, sigma, label)
        if self.model.precond.form == "piecewise":
            return self.model.skip_scale(x, F, sigma)
        return skip_scale.node(x, F, sigma, self.model.precond)


def build_graph(model: ConsistencyModel) -> onnx_package.ModelProto:
    """The ``denoiser`` graph of f: weights inside, one dynamic batch dimension N, SkipScale as a local function."""
    n = 2  # an example batch; torch.export treats 1 as a constant
    config = model.config
    inputs = [torch.zeros(n, *config.image_shape), torch.ones(n)]
    names = ["x", "sigma"]
    if config.network.num_classes:
        inputs.append(torch.zeros(n, dtype=torch.int64))
        names.append("label")
    N = torch.export.Dim("N", min=1, max=1 << 20)
    with quiet():
        program = torch.onnx.export(
            _Denoiser(model).eval(),
            tuple(inputs),
            dynamo=True,
            opset_version=skip_scale.OPSET,
            input_names=names,
            output_names=["denoised"],
            dynamic_shapes={name: {0: N} for name in names},
            verbose=False,
        )
    if program is None:
        raise EngineError("torch.onnx.export returned no program")
    graph = program.model_proto
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    del graph.graph.value_info[:]  # they name the batch dimension otherwise; engines infer them again
    if model.precond.form != "piecewise":
        graph.functions.append(skip_scale.function())
    strip(graph)
    return graph


def strip(graph: onnx_package.ModelProto) -> None:
    """Removes the exporter's notes on where nodes came from: a tenth of a small file, and paths of its machine."""
    inside = graph.graph
    for part in (graph, inside, *inside.node, *inside.initializer, *inside.input, *inside.output):
        del part.metadata_props[:]
        part.doc_string = ""
    graph.producer_name = "cm-runtime"


@contextmanager
def quiet() -> Iterator[None]:
    """torch's exporter warns of packages that are no concern of ours."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def store_halves(graph: onnx_package.ModelProto) -> None:
    """Stores each weight that float16 holds exactly as float16 with a Cast behind it; engines fold the Cast at load."""
    casts = []
    for weight in graph.graph.initializer:
        if weight.data_type != TensorProto.FLOAT or not weight.dims:
            continue
        full = numpy_helper.to_array(weight)
        with np.errstate(over="ignore"):
            half = full.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), full):
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
