"""torch's own exporter: of networks that are not our UNet, and of the plain export that ours is compared with."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import onnx as onnx_package
import torch

from cm_runtime.checkpoints.native import Checkpoint
from cm_runtime.export.weights_file import Network

if TYPE_CHECKING:
    import onnx_ir


def plain(checkpoint: Checkpoint, path: Path) -> None:
    """What one call of torch.onnx.export makes of f: x, sigma, label -> denoised, as a user would write it."""
    config = checkpoint.config
    names = ["x", "sigma", "label"][: 3 if config.network.num_classes else 2]
    inputs = (torch.zeros(2, *config.image_shape), torch.ones(2), torch.zeros(2, dtype=torch.int64))
    with quiet():
        torch.onnx.export(
            checkpoint.model().eval(),
            inputs[: len(names)],
            path,
            dynamo=True,
            input_names=names,
            output_names=["denoised"],
            dynamic_shapes={name: {0: torch.export.Dim("N")} for name in names},
            verbose=False,
        )


def detach(model: onnx_ir.Model) -> Network:
    """The network of torch's exporter; ``model`` loses its float32 arrays to it, none of which is copied.

    Scalars and integers stay in the graph, where shape inference looks for them.
    """
    import onnx_ir  # it comes with onnxscript, which torch's exporter needs

    weights = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == onnx_ir.DataType.FLOAT and len(tensor.shape):
            weights[name] = tensor.numpy()
            value.const_value = onnx_ir.ExternalTensor(
                "",
                None,
                None,
                tensor.dtype,
                shape=onnx_ir.Shape(weights[name].shape),
                name=name,
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props),
            )
    graph = onnx_ir.to_proto(model)
    for tensor in graph.graph.initializer:
        if tensor.name in weights:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return Network(graph, weights)


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
