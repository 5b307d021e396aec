"""checkpoint -> ``.onnx``: one of the graphs of `graphs`, for any batch size, written with its proof or not at all."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx as onnx_package
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, inliner

from cm_runtime.checkpoints.native import Checkpoint
from cm_runtime.choices import GraphKind, Precision, Target
from cm_runtime.errors import EngineError, RequestError
from cm_runtime.export import graphs, parity, weights_file
from cm_runtime.export.builder import Graph
from cm_runtime.export.weights_file import Network
from cm_runtime.files import atomic
from cm_runtime.manifest import METADATA_KEY, Manifest, read_manifest
from cm_runtime.networks.consistency import ConsistencyModel
from cm_runtime.onnx_graph import operators
from cm_runtime.onnx_graph.export_writer import data_name, write_export
from cm_runtime.onnx_graph.message import read_graph
from cm_runtime.onnx_graph.rules import NotOwn

LARGEST_INSIDE = 1 << 30  # bytes of weights in the .onnx itself: protobuf refuses a message of 2 GiB


@dataclass(frozen=True)
class Options:
    """The graph to export; as in `export.onnx`."""

    graph: GraphKind = "denoiser"
    steps: int | None = None
    sigmas: Sequence[float] | None = None
    precision: Precision = "fp32"
    inline: bool = False
    target: Target = "cpu"

    def __post_init__(self) -> None:
        if self.target == "cuda" and self.precision == "bf16":
            raise RequestError("ONNX Runtime's operators for a GPU have no bf16: export for cuda in fp16 or fp32")


@dataclass(frozen=True)
class OnnxExport:
    """The file that `write` wrote.

    nodes: of the graph; folds: constants in place of what a plain export computes each time.
    """

    manifest: Manifest
    nodes: int
    folds: int
    bytes: int


def write(checkpoint: Checkpoint, path: str | os.PathLike[str], options: Options, *, force: bool = False) -> OnnxExport:
    """Export ``checkpoint`` to ``path``; errors are those of `export.onnx`."""
    target = Path(path)
    if target.suffix != ".onnx":
        raise RequestError(f"{target}: an ONNX file's name ends in .onnx")
    atomic.check_writable(target, force=force)
    parity.check_engine(options.precision)
    facts = {"graph": options.graph, "precision": options.precision, "target": options.target}
    manifest = checkpoint.manifest().model_copy(update=facts)
    levels = _levels(manifest, options)
    if levels:
        manifest = manifest.model_copy(update={"sigmas": {len(levels): levels}})
    model = checkpoint.model().eval()
    is_half = any(tensor.dtype == torch.float16 for tensor in checkpoint.ema[checkpoint.default_ema].values())
    del checkpoint  # here and below: an engine loads the weights, and those of torch are not to be there beside it
    g = _build(model, manifest, levels, inline=options.inline)
    network = g.network()
    if is_half and manifest.precision == "fp32":
        store_halves(network)
    if options.inline:
        network = network._replace(graph=inliner.inline_local_functions(network.graph))
    message = network.graph
    nodes = len(message.graph.node)
    with write_export(target, force=force) as (temporary, data):
        is_external = network.size > LARGEST_INSIDE
        size = network.size + message.ByteSize()
        if is_external:
            sha256 = weights_file.write_external(network, data)
        end = weights_file.write(network, temporary)
        answers = parity.answers(model, manifest)
        for parameter in model.parameters():  # one may keep a whole mapped file
            parameter.data = torch.empty(0)
        del model
        gc.collect()
        onnx_package.checker.check_model(str(temporary), full_check=True)
        manifest = manifest.model_copy(update={"parity": parity.measure(temporary, manifest, answers)})
        if is_external:
            manifest = manifest.model_copy(update={"data_file": data_name(target, sha256)})
            weights_file.rename_external(message, manifest.data_file)
        helper.set_model_props(message, {METADATA_KEY: manifest.model_dump_json()})
        if is_external:
            temporary.write_bytes(message.SerializeToString(deterministic=True))
        else:
            weights_file.write_behind(message, temporary, end)
        if read_manifest(temporary) != manifest:
            raise EngineError(f"{target}: the manifest does not read back as it was written")
        _check_own(temporary, target, manifest)
    return OnnxExport(manifest, nodes, g.folds, size)


def _check_own(temporary: Path, target: Path, manifest: Manifest) -> None:
    """Raise EngineError for a graph that no engine would be given to run."""
    try:
        operators.check(read_graph(temporary, str(target)), manifest)
    except NotOwn as error:
        raise EngineError(f"{target}: no engine would be given this model to run: {error}") from error


def _levels(manifest: Manifest, options: Options) -> tuple[float, ...]:
    """The noise levels of a sampler graph; none of another. Raises RequestError."""
    steps, sigmas = options.steps, options.sigmas
    if manifest.graph != "sampler":
        if steps is not None or sigmas is not None:
            raise RequestError(f"a {manifest.graph} graph takes any noise level; steps and sigmas are of a sampler")
        return ()
    if manifest.is_teacher:
        raise RequestError("this checkpoint is an EDM teacher, which a few steps cannot sample; export its denoiser")
    if sigmas is not None:
        if steps is not None:
            raise RequestError("give steps or sigmas, not both")
        return manifest.noise_range.check(sigmas)
    return manifest.noise_range.levels(2 if steps is None else steps, manifest.sigmas)


def _build(model: ConsistencyModel, manifest: Manifest, levels: Sequence[float], *, inline: bool) -> Graph:
    if manifest.graph == "sampler":
        return graphs.sampler(model, levels, manifest.precision, manifest.target, inline=inline)
    build = graphs.denoiser if manifest.graph == "denoiser" else graphs.network
    return build(model, manifest.precision, manifest.target)


def store_halves(network: Network) -> None:
    """Store each weight that float16 holds exactly as float16 with a Cast behind it; engines fold the Cast at load."""
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
