"""cm::SkipScale, the one custom node of exported graphs: y = c_skip(sigma) x + c_out(sigma) F.

A runtime with a kernel of that name may use it; any other runs the local function, which is standard operators.
"""

from __future__ import annotations

import onnx
from onnx import helper

from cm_runtime.export.builder import OPSET, Graph
from cm_runtime.onnx_graph import skip_scale
from cm_runtime.onnx_graph.graph import Node
from cm_runtime.onnx_graph.skip_scale import DOMAIN, NAME
from cm_runtime.precond import Precond

VERSION = 1


def node(g: Graph, x: str, F: str, sigma: str, precond: Precond) -> str:
    """The node: x, F (N,C,H,W) and sigma (N,) or (1,) float32 -> (N,C,H,W) float32.

    ``plugin_namespace`` and ``plugin_version`` are how TensorRT finds a registered plugin for it.
    """
    if not g.functions:
        g.functions.append(function(g.opset))
    return g.op(
        NAME,
        x,
        F,
        sigma,
        domain=DOMAIN,
        sigma_data=precond.sigma_data,
        sigma_boundary=precond.sigma_boundary,
        plugin_namespace=DOMAIN,
        plugin_version=str(VERSION),
    )


def function(opset: int = OPSET) -> onnx.FunctionProto:
    """`onnx_graph.skip_scale.function` as a message of a file."""
    source = skip_scale.function(opset)
    nodes, opsets = map(_node, source.nodes), [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, NAME, source.inputs, source.outputs, list(nodes), opsets, source.attributes)


def _node(node: Node) -> onnx.NodeProto:
    message = helper.make_node(node.kind, node.inputs, node.outputs)
    for name, attribute in node.attributes.items():
        if attribute.reference:
            message.attribute.add(name=name, type=onnx.AttributeProto.FLOAT, ref_attr_name=attribute.reference)
        else:
            message.attribute.append(helper.make_attribute(name, attribute.value))
    return message
