"""checkpoint -> ``.onnx``, graph ``denoiser``: x, sigma, label -> denoised, any batch size."""

from __future__ import annotations

import gc
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
from numpy.typing import NDArray
from onnx import TensorProto, helper, inliner
from torch import Tensor, nn

from cm_runtime import files
from cm_runtime.artifact import METADATA_KEY, Manifest, data_name, read_manifest, written
from cm_runtime.checkpoint import Checkpoint
from cm_runtime.errors import EngineError, RequestError
from cm_runtime.export import parity, skip_scale, weights
from cm_runtime.export.weights import Network
from cm_runtime.model import ConsistencyModel

LARGEST_INSIDE = 1 << 30  # bytes of weights in the .onnx itself: protobuf refuses a message of 2 GiB


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
    checkpoint stores in float16 are stored so, and computed in float32. Weights above 1 GiB are stored in one data file
    beside ``path``, which the manifest names. Takes less than three times the memory of the float32 weights, one of
    which is the checkpoint's own if the caller keeps it. Raises ParityError when the file's outputs miss the float32
    torch model's by more than 1e-4, OutputError when ``path`` cannot be written or exists without ``force``; either
    way nothing is left behind.
    """
    if precision != "fp32":
        raise RequestError(f"this version exports fp32, not {precision}")
    target = Path(path)
    if target.suffix != ".onnx":
        raise RequestError(f"{target}: an ONNX file's name ends in .onnx")
    files.check_writable(target, force=force)
    model = checkpoint.model()
    manifest = checkpoint.manifest()
    is_half = any(tensor.dtype == torch.float16 for tensor in checkpoint.ema[checkpoint.default_ema].values())
    del checkpoint  # here and below: an engine loads the weights, and those of torch are not to be there beside it
    network = build_graph(model)
    if is_half:
        store_halves(network)
    if inline:
        network = network._replace(graph=inliner.inline_local_functions(network.graph))
    graph = network.graph
    with written(target, force=force) as (temporary, data):
        is_apart = network.size > LARGEST_INSIDE
        if is_apart:
            sha256 = weights.write_apart(network, data)
        end = weights.write(network, temporary)
        expected = parity.expected(model, manifest)
        for parameter in model.parameters():  # torch's exporter remembers some, and one keeps a whole file mapped
            parameter.data = torch.empty(0)
        del model
        gc.collect()
        onnx_package.checker.check_model(str(temporary), full_check=True)
        manifest = manifest.model_copy(update={"parity": parity.measure(temporary, manifest, expected)})
        if is_apart:
            manifest = manifest.model_copy(update={"data_file": data_name(target, sha256)})
            weights.rename_apart(graph, manifest.data_file)
        helper.set_model_props(graph, {METADATA_KEY: manifest.model_dump_json()})
        if is_apart:
            temporary.write_bytes(graph.SerializeToString(deterministic=True))
        else:
            weights.write_behind(graph, temporary, end)
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


def build_graph(model: ConsistencyModel) -> Network:
    """The ``denoiser`` graph of f and its weights: one dynamic batch dimension N, SkipScale as a local function."""
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
    network = weights.detach(program.model)
    graph = network.graph
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    del graph.graph.value_info[:]  # they name the batch dimension otherwise; engines infer them again
    if model.precond.form != "piecewise":
        graph.functions.append(skip_scale.function())
    strip(graph)
    return network


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


def store_halves(network: Network) -> None:
    """Stores each weight that float16 holds exactly as float16 with a Cast behind it; engines fold the Cast at load."""
    casts = []
    for tensor in network.graph.graph.initializer:
        name = tensor.name
        if name not in network.weights or not _fits_half(network.weights[name]):
            continue
        tensor.name, tensor.data_type = f"{name}.half", TensorProto.FLOAT16
        tensor.ClearField("doc_string")
        network.weights[tensor.name] = network.weights.pop(name)
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    graph = network.graph.graph
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _fits_half(full: NDArray[np.generic]) -> bool:
    with np.errstate(over="ignore"):
        half = full.astype(np.float16)
    return np.array_equal(half.astype(np.float32), full)
