"""Every operator of every form of the export, in its types, is a kernel of ONNX Runtime's CUDA provider.

A graph of which one node is not runs its rest on the GPU without a CUDA graph, or does not load. The list of kernels is
that of a wheel (see list_cuda_kernels.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import pytest

from cm_runtime.checkpoints.native import Checkpoint
from cm_runtime.export import graphs
from cm_runtime.onnx_graph import message, operators
from cm_runtime.onnx_graph.graph import BFLOAT, BOOL, FLOAT, HALF, INT64, ITEM_BITS, UINT8
from cm_runtime.onnx_graph.rules import CONTRIB

TABLE = json.loads(Path(__file__).with_name("cuda_kernels.json").read_text())
NAMES = {FLOAT: "float", HALF: "float16", BFLOAT: "bfloat16", INT64: "int64", UINT8: "uint8", BOOL: "bool"}
# The names that its operators' inputs have in the documentation; the standard's are in the onnx package.
CONTRIB_INPUTS = {
    "NhwcConv": ("T", "T", "T"),
    "GroupNorm": ("T", "M", "M"),
    "MultiHeadAttention": ("T", "T", "T"),
    "QuickGelu": ("T",),
}
LEVELS = (80.0, 1.5)
FORMS = (("denoiser", "fp32"), ("sampler", "fp16"), ("network", "fp16"), ("sampler", "bf16"), ("network", "bf16"))


def has_kernel(domain: str, kind: str, opset: int, inputs: list[str], outputs: list[str]) -> bool:
    """As ONNX Runtime looks: a kernel without a last version is of the operator's own version alone."""
    if domain:
        since, types = 1, dict(zip(CONTRIB_INPUTS[kind], inputs, strict=True))
    else:
        schema = onnx.defs.get_schema(kind, opset)
        since, formal = schema.since_version, [each.type_str for each in schema.inputs]
        formal += formal[-1:] * (len(inputs) - len(formal))
        types = dict(zip(formal, inputs, strict=False))
        types |= dict(zip([each.type_str for each in schema.outputs], outputs, strict=False))
    for row_domain, row_kind, first, last, constraints in TABLE["kernels"]:
        is_version = first == since or first < since <= last
        is_type = all(types[name] in allowed for name, allowed in constraints.items() if name in types)
        if (row_domain, row_kind) == (domain, kind) and is_version and is_type:
            return True
    return False


def missing(whole: Checkpoint, kind: Any, precision: Any, target: Any) -> Iterator[str]:
    """Nodes of that graph, as text, that have no kernel; those of weights alone are computed at loading."""
    manifest = whole.manifest().model_copy(update={"graph": kind, "precision": precision, "target": target})
    model = whole.model().eval()
    if kind == "sampler":
        manifest = manifest.model_copy(update={"sigmas": {len(LEVELS): LEVELS}})
        network = graphs.sampler(model, LEVELS, precision, target).network()
    else:
        network = getattr(graphs, kind)(model, precision, target).network()
    proto = onnx.inliner.inline_local_functions(network.graph)
    for tensor in proto.graph.initializer:
        if tensor.name in network.weights:
            tensor.raw_data = bytes(int(np.prod(tensor.dims)) * ITEM_BITS[tensor.data_type] // 8)
    graph = message.read_graph(proto.SerializeToString(), "m")
    values = operators._constants(graph) | operators.inputs(manifest)
    for node in graph.nodes:
        made = dict(zip(node.outputs, operators._apply(node, values, manifest, graph), strict=True))
        values |= made
        if all(value.is_static for value in made.values()):
            continue
        types = [[NAMES[values[name].type] for name in names if name] for names in (node.inputs, node.outputs)]
        if not has_kernel(node.domain, node.kind, graph.opsets[""], *types):
            yield f"{node.kind} {types}"


@pytest.mark.process
@pytest.mark.parametrize("kind", exports.KINDS)
def test_every_node_of_the_standard_form_has_a_kernel(kind: str) -> None:
    whole = exports.checkpoint(kind)
    for graph, precision in FORMS:
        assert set(missing(whole, graph, precision, "cpu")) == set(), (graph, precision)


@pytest.mark.process
@pytest.mark.parametrize("kind", ["boundary", "edm"])
def test_every_node_of_the_cuda_form_has_a_kernel(kind: str) -> None:
    plain = exports.checkpoint(kind)
    network = plain.config.network.model_copy(update={"norm_groups": 8})
    config = plain.config.model_copy(update={"network": network})
    whole = Checkpoint(config, "0.999", plain.ema, plain.training)
    for graph, precision in FORMS[:3]:
        assert set(missing(whole, graph, precision, "cuda")) == set(), (graph, precision)


def test_the_list_is_a_wheels() -> None:
    """What it lacks as telling as what it has."""
    assert TABLE["source"].startswith("onnxruntime_gpu-1.31.1")
    assert has_kernel("", "Conv", 22, ["bfloat16"] * 3, ["bfloat16"])
    assert not has_kernel("", "Conv", 20, ["bfloat16"] * 3, ["bfloat16"])
    assert not has_kernel("", "InstanceNormalization", 22, ["float"] * 3, ["float"])  # of 6 alone, and 22 is another
    assert not has_kernel("", "Resize", 22, ["bfloat16", "float"], ["bfloat16"])
    assert not has_kernel("", "DepthToSpace", 22, ["bfloat16"], ["bfloat16"])
    assert has_kernel(CONTRIB, "GroupNorm", 20, ["float16", "float", "float"], ["float16"])
    assert not has_kernel(CONTRIB, "NhwcConv", 20, ["bfloat16"] * 3, ["bfloat16"])
