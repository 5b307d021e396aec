"""cm::SkipScale, the one custom node of our graphs: y = c_skip(sigma) x + c_out(sigma) F.

A runtime with a kernel of that name may use it; any other runs the model-local function, which is standard ops.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from cm_runtime.export.builder import OPSET, Graph
from cm_runtime.precond import Precond

DOMAIN, NAME, VERSION = "cm", "SkipScale", 1


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
    """The same in standard ops (arXiv 2303.01469, appendix C; arXiv 2206.00364, table 1, at sigma_boundary 0).

    In float32 throughout: F is cast up where the network is of another type.
    """

    def constant(name: str, attribute: str) -> onnx.NodeProto:
        made = helper.make_node("Constant", [], [name])
        made.attribute.append(onnx.AttributeProto(name="value_float", type=onnx.AttributeProto.FLOAT))
        made.attribute[0].ref_attr_name = attribute
        return made

    def op(kind: str, *names: str) -> onnx.NodeProto:
        *inputs, output = names
        return helper.make_node(kind, inputs, [output])

    nodes = [
        constant("sigma_data", "sigma_data"),
        constant("sigma_boundary", "sigma_boundary"),
        helper.make_node("Constant", [], ["column"], value_ints=[-1, 1, 1, 1]),
        op("Reshape", "sigma", "column", "s"),
        op("Mul", "sigma_data", "sigma_data", "variance"),
        op("Sub", "s", "sigma_boundary", "d"),
        op("Mul", "d", "d", "d_squared"),
        op("Add", "d_squared", "variance", "skip_divisor"),
        op("Div", "variance", "skip_divisor", "c_skip"),
        op("Mul", "sigma_data", "d", "out_dividend"),
        op("Mul", "s", "s", "s_squared"),
        op("Add", "s_squared", "variance", "total"),
        op("Sqrt", "total", "out_divisor"),
        op("Div", "out_dividend", "out_divisor", "c_out"),
        helper.make_node("Cast", ["F"], ["F_float"], to=TensorProto.FLOAT),
        op("Mul", "c_skip", "x", "skip"),
        op("Mul", "c_out", "F_float", "out"),
        op("Add", "skip", "out", "y"),
    ]
    return helper.make_function(
        DOMAIN,
        NAME,
        ["x", "F", "sigma"],
        ["y"],
        nodes,
        [helper.make_opsetid("", opset)],
        ["sigma_data", "sigma_boundary", "plugin_namespace", "plugin_version"],
    )
