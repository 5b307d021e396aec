"""Bounds of foreign graphs, before an engine runs them.

They are walked at a batch of one. Shapes, and the integers that shapes are computed from, are known where the operators
are; elsewhere a value is taken to be as large as the largest that it is made of. So chains that double are seen for
what they are, and a tensor whose size comes from a number that only a run would know is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cm_runtime.errors import ArtifactError
from cm_runtime.onnx_graph.graph import Function, Graph, Node, Port
from cm_runtime.onnx_graph.message import MOST_NODES
from cm_runtime.onnx_graph.operators import MOST_ELEMENTS
from cm_runtime.onnx_graph.shapes import GROWING, RULES, arithmetic
from cm_runtime.onnx_graph.values import Call, Misfit, Unknown, Value, of_shape, of_tensor

OPSETS = range(7, 27)
IR_VERSIONS = range(3, 14)
MOST_TOTAL = 1 << 36  # of all values, which is minutes
MOST_ALIVE = 1 << 30  # of those that must be in memory together
OPEN = 64  # assumed of a dimension that is open and not the batch


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# No rule here bounds what they make
UNBOUNDED = _names("""
    Loop If Scan SequenceMap MelWeightMatrix BlackmanWindow HannWindow HammingWindow DFT STFT AffineGrid Col2Im
    CenterCropPad MaxUnpool RandomNormal RandomUniform SplitToSequence SequenceInsert StringConcat StringSplit
""")
SAME = _names("""
    CastLike Softmax LogSoftmax BatchNormalization InstanceNormalization GroupNormalization LayerNormalization LRN
    LpNormalization Dropout CumSum Clip ScatterElements ScatterND Hardmax Trilu Bernoulli RandomNormalLike
    RandomUniformLike
""")
ONE_EACH = _names("""
    Add Sub Mul Div Pow Mod Min Max Mean Sum Where And Or Xor Not Equal Greater Less GreaterOrEqual LessOrEqual PRelu
    BitShift Relu LeakyRelu Sigmoid Tanh Exp Log Sqrt Sin Cos Abs Neg Floor Ceil Round Erf Gelu Softplus Softsign
    Reciprocal Sign IsNaN IsInf Selu Mish HardSwish HardSigmoid Elu Celu ThresholdedRelu Swish
""")


def check(graph: Graph, where: str) -> None:
    """Raise ArtifactError for a graph that takes endless time or memory, as far as that shows in it."""
    if graph.ir_version not in IR_VERSIONS or graph.opsets.get("", 0) not in OPSETS:
        version = f"{graph.ir_version} with operators of {graph.opsets.get('')}"
        raise ArtifactError(f"{where}: its version of ONNX is {version}, which cm-runtime does not know")
    walk = _Walk(graph, where)
    values = {name: of_tensor(tensor) for name, tensor in graph.tensors.items()}
    for name, port in graph.inputs.items():
        if name not in values:
            values[name] = walk.check_size(of_shape(tuple(_sides(port))), name)
    walk.run(graph.nodes, values, ())
    alive = graph.most_alive({name: value.size for name, value in values.items() if name not in graph.tensors})
    if alive > MOST_ALIVE:
        raise ArtifactError(f"{where}: its graph holds {alive} numbers in memory for one image, more than any model")


def _sides(port: Port) -> Iterator[int]:
    """The sides of a port; the first open dimension is the batch, of one image."""
    is_batch = True
    for side in port.dims or ():
        if isinstance(side, int) and side > 0:
            yield side
        else:
            yield 1 if is_batch else OPEN
            is_batch = False


class _Walk:
    """One pass over a graph: counts nodes, those of its functions each time that they are called, and elements."""

    def __init__(self, graph: Graph, where: str) -> None:
        self.functions, self.where = graph.functions, where
        open_sides = {sum(not isinstance(side, int) for side in port.dims or ()) for port in graph.inputs.values()}
        self.is_exact = open_sides in ({0}, {1})  # all but the batch is known
        self.left, self.total = MOST_NODES, 0

    def run(self, nodes: Any, values: dict[str, Value], inside: tuple[tuple[str, str], ...]) -> None:
        """Add the outputs of each node to ``values``."""
        for node in nodes:
            self.left -= 1
            if self.left < 0:
                raise ArtifactError(f"{self.where}: its graph has over {MOST_NODES} nodes, its functions written out")
            unknown = [name for name in node.inputs if name and name not in values]
            if unknown:
                raise ArtifactError(f"{self.where}: its graph takes {unknown[0]!r}, which nothing before it makes")
            inputs = [values[name] if name else None for name in node.inputs]
            function = self.functions.get((node.domain, node.kind))
            outputs = self._call(node, function, inputs, inside) if function else self._infer(node, inputs)
            for name, value in zip(node.outputs, outputs, strict=False):
                if name and name in values:
                    raise ArtifactError(f"{self.where}: its graph makes {name!r} twice")
                values[name] = self.check_size(value, node.kind)

    def check_size(self, value: Value, kind: str) -> Value:
        """Return ``value``, if it is not too large."""
        self.total += value.size
        if value.size > MOST_ELEMENTS or self.total > MOST_TOTAL:
            raise ArtifactError(f"{self.where}: its graph makes values that are too large for images, at {kind}")
        return value

    def _call(
        self, node: Node, function: Function, inputs: list[Value | None], inside: tuple[tuple[str, str], ...]
    ) -> list[Value]:
        key = node.domain, node.kind
        if key in inside or len(inside) == 8:
            raise ArtifactError(f"{self.where}: its function {node.kind} calls itself, or others too deep")
        values = {name: value for name, value in zip(function.inputs, inputs, strict=False) if value is not None}
        self.run(function.nodes, values, (*inside, key))
        return [values.get(name, Value(None, 1)) for name in function.outputs]

    def _infer(self, node: Node, inputs: list[Value | None]) -> list[Value]:
        if node.domain or node.kind in UNBOUNDED:
            kind = f"{node.domain}::{node.kind}" if node.domain else node.kind
            raise ArtifactError(f"{self.where}: its graph has the operator {kind}, whose work has no known bound")
        rule = RULES.get(node.kind)
        most = max((value.size for value in inputs if value), default=1)
        estimate = [Value(None, most)] * len(node.outputs)
        try:
            if node.kind in ONE_EACH:
                return [arithmetic(node, [value for value in inputs if value], most)]
            if rule is None:
                first = inputs[0] if inputs else None
                same = node.kind in SAME and first is not None
                return [first if same and first else estimate[0], *estimate[1:]] if estimate else []
            return list(rule(Call(node, inputs)))
        except Unknown as error:
            if node.kind in GROWING:
                raise ArtifactError(
                    f"{self.where}: its graph has a {node.kind} whose size is not known before it runs"
                ) from error
            return estimate
        except (Misfit, ValueError, IndexError, TypeError, KeyError, ArithmeticError) as error:
            if (self.is_exact and isinstance(error, Misfit)) or node.kind in GROWING:
                raise ArtifactError(
                    f"{self.where}: its graph is damaged: a {node.kind} does not fit its input"
                ) from error
            return estimate  # an engine will say it better
