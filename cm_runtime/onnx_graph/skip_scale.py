"""The local function of cm::SkipScale, y = c_skip(sigma) x + c_out(sigma) F, which any runtime without a kernel runs.

Its nodes come out of the formulas in `precond`; the exporter writes them, and the check of a graph compares with them.
"""

from __future__ import annotations

from typing import Any

from cm_runtime.onnx_graph.expression import Expression
from cm_runtime.onnx_graph.graph import A_FLOAT, AN_INT, FLOAT, INTS, Attribute, Function, Node
from cm_runtime.precond import c_out, c_skip

DOMAIN, NAME = "cm", "SkipScale"
CONSTANTS = ("sigma_data", "sigma_boundary")  # attributes of the node, float32
_VALUES = (  # in order of evaluation
    *CONSTANTS,
    *("column", "s", "variance", "d", "d_squared", "skip_divisor", "c_skip", "out_dividend", "s_squared", "total"),
    *("out_divisor", "c_out", "F_float", "skip", "out", "y"),
)


def function(opset: int) -> Function:
    """The function in standard operators of ``opset``: float32 throughout, F cast up where the network is of a half."""
    emitter = _Nodes()
    data, boundary = (
        Expression(emitter, emitter.op("Constant", value_float=Attribute(A_FLOAT, None, name))) for name in CONSTANTS
    )
    column = emitter.op("Constant", value_ints=Attribute(INTS, (-1, 1, 1, 1), ""))
    s = Expression(emitter, emitter.op("Reshape", "sigma", column))
    skip, out = c_skip(s, data, boundary), c_out(s, data, boundary)
    x, F = (Expression(emitter, value) for value in ("x", emitter.op("Cast", "F", to=Attribute(AN_INT, FLOAT, ""))))
    y = skip * x + out * F
    attributes = (*CONSTANTS, "plugin_namespace", "plugin_version")
    return Function(("x", "F", "sigma"), (y.value,), attributes, 0, tuple(emitter.nodes), {"": opset})


class _Nodes:
    """An emitter of nodes that computes equal values once and names them by ``_VALUES``."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._values: dict[Any, str] = {}

    def constant(self, value: float) -> str:
        return self.op("Constant", value_float=Attribute(A_FLOAT, value, ""))

    def op(self, kind: str, *inputs: str, **attributes: Attribute) -> str:
        key = kind, inputs, tuple(attributes.values())
        if key not in self._values:
            self._values[key] = _VALUES[len(self._values)]
            self.nodes.append(Node("", kind, inputs, (self._values[key],), attributes))
        return self._values[key]
