"""The arithmetic of one evaluation, counted on the exported graph."""

from __future__ import annotations

import math
import os
from typing import Any

from cm_runtime.errors import ArtifactError
from cm_runtime.errors.reasons import first_line
from cm_runtime.extras import require
from cm_runtime.manifest import read_manifest

_MOST = 10**21  # operations for one image: a day of the fastest computers
_SMALL = 1024  # bytes; larger initializers are weights, whose values say nothing about shapes
_UNCOUNTED = {
    *("Attention", "Einsum", "GRU", "LSTM", "RNN", "If", "Loop", "Scan", "DeformConv", "DFT"),
    *("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"),
}


def gflop(path: str | os.PathLike[str]) -> float:
    """GFLOP that the exported file ``path`` takes to evaluate one image, by its shapes; its data file is not read.

    Counts the products and sums, two for each pair, of Conv, ConvTranspose, Gemm and MatMul, without biases. Raises
    ArtifactError for a file that is foreign or damaged, or whose shapes or operators give no number, and
    MissingExtraError without onnx.
    """
    read_manifest(path)
    graph = _single_image(path)
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            shapes[value.name] = [dim.dim_value for dim in tensor.shape.dim]  # 0 where it is not known
    total = 0
    for node in graph.node:
        if node.op_type in _UNCOUNTED or node.domain not in ("", "ai.onnx"):
            raise ArtifactError(f"{path}: the arithmetic of {node.op_type} cannot be counted")
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            sizes = [shapes.get(name, []) for name in (*node.input[:2], *node.output[:1])]
            if len(sizes) != 3 or not all(size and all(dim > 0 for dim in size) for size in sizes):
                raise ArtifactError(f"{path}: the shapes of {node.op_type} {node.name} cannot be told")
            total += 2 * _products(node, *sizes)
            if total > _MOST:
                raise ArtifactError(f"{path}: its shapes tell of more arithmetic than any machine does")
    return total / 1e9


def _products(node: Any, a: list[int], b: list[int], out: list[int]) -> int:
    """Multiplications of a node whose first two inputs are a and b."""
    if node.op_type == "Conv":  # b: (M, C / groups, kernel)
        return math.prod(out) * math.prod(b[1:])
    if node.op_type == "ConvTranspose":  # b: (C, M / groups, kernel)
        return math.prod(a) * math.prod(b[1:])
    is_transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(out) * a[0 if is_transposed else -1]


def _single_image(path: str | os.PathLike[str]) -> Any:
    """The graph for a batch of one, functions inlined, with the shapes that onnx infers and without weights."""
    onnx = require("onnx", "counting the arithmetic of a graph")
    from onnx import inliner, shape_inference

    try:
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) > _SMALL:  # inference copies the model several times
                tensor.ClearField("raw_data")
                tensor.data_location = onnx.TensorProto.EXTERNAL
        _cast_constants(model.graph)
        model = inliner.inline_local_functions(model)
        for value in model.graph.input:
            for dim in value.type.tensor_type.shape.dim[:1]:
                dim.dim_value = 1
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        del model.graph.value_info[:]
        return shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    except Exception as error:  # protobuf's and onnx's own have no common base
        raise ArtifactError(f"{path}: the shapes of its graph cannot be told: {first_line(error)}") from error


def _cast_constants(graph: Any) -> None:
    """Cast the remaining initializers: inference follows no cast to the scales of a Resize, stored as halves."""
    from onnx import TensorProto, helper, numpy_helper

    small = {tensor.name: tensor for tensor in graph.initializer if tensor.data_location != TensorProto.EXTERNAL}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in small:
            to = next(attribute.i for attribute in node.attribute if attribute.name == "to")
            array = numpy_helper.to_array(small[node.input[0]]).astype(helper.tensor_dtype_to_np_dtype(to))
            constant = helper.make_node("Constant", [], node.output, value=numpy_helper.from_array(array))
            node.CopyFrom(constant)
