"""Small extractors for tests, as onnx.helper makes them: what they compute can be written down in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

METADATA_KEY = "cm_runtime_extractor"
OURS = {"format_version": 1, "layout": "NHWC", "value_range": "0:255", "resize": "none", "features": "features"}


def linear(
    path: Path,
    shape: Sequence[int | str] = ("N", 8, 8, 1),
    outputs: Mapping[str, NDArray[np.float32]] | None = None,
    kind: int = TensorProto.UINT8,
    metadata: str | None = None,
) -> Path:
    """An ONNX file from images of ``shape`` to the flattened pixels times a matrix, for each of ``outputs``.

    Without outputs: ``features``, the pixels themselves. A side may be a name, then outputs must be given.
    """
    if outputs is None:
        width = int(np.prod([side for side in shape[1:] if isinstance(side, int)]))
        outputs = {"features": np.eye(width, dtype=np.float32)}
    nodes = [
        helper.make_node("Cast", ["images"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["numbers"], ["flat"], axis=1),
    ]
    for name in outputs:
        nodes.append(helper.make_node("MatMul", ["flat", f"{name}.weight"], [name]))
    weights = [numpy_helper.from_array(np.float32(matrix), f"{name}.weight") for name, matrix in outputs.items()]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [shape[0], matrix.shape[1]])
        for name, matrix in outputs.items()
    ]
    images = helper.make_tensor_value_info("images", kind, list(shape))
    return save(path, nodes, [images], ends, weights, metadata)


def save(path: Path, nodes: Any, inputs: Any, outputs: Any, weights: Any = (), metadata: str | None = None) -> Path:
    """A checked file of one graph."""
    graph = helper.make_graph(nodes, "toy", inputs, outputs, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if metadata is not None:
        helper.set_model_props(made, {METADATA_KEY: metadata})
    onnx.checker.check_model(made)
    onnx.save(made, path)
    return path
