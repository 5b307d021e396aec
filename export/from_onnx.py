"""``.onnx`` -> checkpoint: the torch model that an exported file of ours was made from, where it says its network.

Weights keep their names in a graph, as they are in a checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError
from torch import Tensor

from cm_runtime.checkpoints.native import Checkpoint, check_tensors, shapes_of
from cm_runtime.errors import ArtifactError, CheckpointError
from cm_runtime.errors.reasons import first_line
from cm_runtime.manifest import Manifest, TrainingSummary, data_path, read_manifest
from cm_runtime.networks.consistency import ModelConfig, build
from cm_runtime.networks.unet import UNetConfig

EMA = "exported"  # the rate is not in the file


def recover(path: str | os.PathLike[str], network: UNetConfig | None = None) -> Checkpoint:
    """The checkpoint in the exported file ``path``: its one set of weights as they are stored, in float16 or float32.

    network: by default that of the training run which the manifest records. Raises ArtifactError where it records
    none, and where the file is damaged, a sampler, whose embedding is folded, or in half precision, which rounded the
    weights, or its graph is not that of this network, every tensor found and of its shape.
    """
    where = Path(path)
    manifest = read_manifest(where)
    if manifest.graph != "denoiser" or manifest.precision != "fp32":
        raise ArtifactError(
            f"{where} is a {manifest.graph} graph in {manifest.precision}, without all of its checkpoint; use that"
        )
    config = _config(where, manifest, network)
    graph = _graph(where)
    model = build(config, "meta")
    shapes = shapes_of(model)
    stored, data = _initializers(graph), data_path(where, manifest)
    weights = {name: _tensor(where, data, stored[name]) for name in shapes if name in stored}
    try:
        check_tensors(shapes, weights, "its weights are not those of its network")
    except CheckpointError as error:
        raise ArtifactError(f"{where}: {error}") from error
    training = manifest.training or TrainingSummary(method="unknown", data="unknown")
    return Checkpoint(config, EMA, {EMA: weights}, training, manifest.source_sha256, manifest.sigmas)


def _config(where: Path, manifest: Manifest, network: UNetConfig | None) -> ModelConfig:
    """The model's config, all but the network's shape from the manifest. Raises ArtifactError."""
    channels, height, width = manifest.image_shape
    images = {"image_size": height, "image_channels": channels, "num_classes": manifest.num_classes}
    if network is None:
        shape = _recorded_network(manifest)
        if shape is None:
            raise ArtifactError(f"{where} does not say its network's shape: use the checkpoint that it was made from")
        try:
            network = UNetConfig.model_validate(shape | images)
        except ValidationError as error:
            raise ArtifactError(f"{where}: its manifest records no network of ours") from error
    if width != height or images != network.model_dump(include=set(images)):
        raise ArtifactError(f"{where} is for other images or classes than its network")
    shared = ("precond", "sigma_data", "sigma_boundary", "sigma_min", "sigma_max", "rho")
    return ModelConfig(network=network, **{name: getattr(manifest, name) for name in shared})


def _recorded_network(manifest: Manifest) -> dict[str, Any] | None:
    """The network in the configuration of the training run, or of the last where there were several."""
    config: Any = manifest.training.config if manifest.training else {}
    if isinstance(runs := config.get("runs"), list) and runs and isinstance(runs[-1], dict):
        config = runs[-1].get("config")
    network = config.get("network") if isinstance(config, dict) else None
    return network if isinstance(network, dict) else None


def _graph(where: Path) -> onnx.GraphProto:
    """The graph, without what lies in a data file. Raises ArtifactError."""
    try:
        return onnx.load(str(where), load_external_data=False).graph
    except Exception as error:  # protobuf's own
        raise ArtifactError(f"{where} is damaged: {first_line(error)}") from error


def _initializers(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    """Initializers by the names that nodes know them by: those stored in float16 have a Cast before them."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    casts = [node for node in graph.node if node.op_type == "Cast" and node.input[0] in stored]
    return stored | {node.output[0]: stored[node.input[0]] for node in casts}


def _tensor(where: Path, data: Path | None, stored: TensorProto) -> Tensor:
    """An initializer's values, in memory of their own. Raises ArtifactError."""
    try:
        array = numpy_helper.to_array(stored) if not stored.external_data else _external(data, stored)
        return torch.from_numpy(np.array(array))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{where}: its weights are damaged or cut short; export it again") from error


def _external(data: Path | None, stored: TensorProto) -> NDArray[Any]:
    """An initializer's values out of the data file; no other file is opened, whatever the graph says."""
    place = {entry.key: entry.value for entry in stored.external_data}
    if data is None or place["location"] != data.name:
        raise ValueError("another data file than the manifest's")
    kind = helper.tensor_dtype_to_np_dtype(stored.data_type).newbyteorder("<")
    array = np.fromfile(data, kind, count=int(np.prod(stored.dims)), offset=int(place["offset"]))
    return array.reshape(tuple(stored.dims))
