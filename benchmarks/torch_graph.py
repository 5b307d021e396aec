"""Graphs of torch's own exporter, of networks that are not the UNet: their weights, and their notes."""

from __future__ import annotations

import onnx
import onnx_ir

from cm_runtime.export.weights_file import Network


def detach(model: onnx_ir.Model) -> Network:
    """Return the network of torch's exporter; ``model`` loses its float32 arrays to it, none of which is copied.

    Scalars and integers stay in the graph, where shape inference looks for them.
    """
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


def strip(graph: onnx.ModelProto) -> None:
    """Remove the exporter's notes on where nodes came from: a tenth of a small file, and paths of its machine."""
    inside = graph.graph
    for part in (graph, inside, *inside.node, *inside.initializer, *inside.input, *inside.output):
        del part.metadata_props[:]
        part.doc_string = ""
    graph.producer_name = "cm-runtime"
