"""An ONNX graph as a check needs it: nodes, ports and functions, and the numbers of small tensors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

FLOAT, UINT8, INT32, INT64, BOOL, HALF, DOUBLE, BFLOAT = 1, 2, 6, 7, 9, 10, 11, 16  # of TensorProto.DataType
_BITS = (32, 8, 8, 16, 16, 32, 64, 0, 8, 16, 64, 32, 64, 64, 128, 16, 8, 8, 8, 8, 4, 4, 4, 8, 2)
ITEM_BITS = dict(enumerate(_BITS, 1))  # by TensorProto.DataType; strings have none
A_FLOAT, AN_INT, A_STRING, A_TENSOR, INTS, TENSORS = 1, 2, 3, 4, 7, 9  # of AttributeProto.AttributeType


class Tensor(NamedTuple):
    """numbers: of a small one of float32, int32 or int64, else None. bytes: where they are raw, else None."""

    name: str
    type: int
    dims: tuple[int, ...]
    numbers: tuple[float, ...] | None
    bytes: int | None
    external: dict[str, str] | None

    @property
    def size(self) -> int:
        """Bytes that its numbers take; of strings 0."""
        return (math.prod(self.dims) * ITEM_BITS.get(self.type, 0) + 7) // 8


class Attribute(NamedTuple):
    """type: of AttributeProto.AttributeType; reference: the attribute of the function that it stands for, or ""."""

    type: int
    value: Any
    reference: str


class Node(NamedTuple):
    """One node, its names as text."""

    domain: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Attribute]


class Port(NamedTuple):
    """An input or output of the graph; a dimension is a number, or a name, or None."""

    type: int
    dims: tuple[int | str | None, ...] | None


class Function(NamedTuple):
    """A local function."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[str, ...]
    defaults: int
    nodes: tuple[Node, ...]
    opsets: dict[str, int]


class Graph(NamedTuple):
    """All of a file that decides what is computed. functions: by domain and name."""

    ir_version: int
    opsets: dict[str, int]
    nodes: list[Node]
    tensors: dict[str, Tensor]
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    functions: dict[tuple[str, str], Function]

    def most_alive(self, sizes: Mapping[str, int]) -> int:
        """The largest sum of ``sizes`` of values that are needed at one time, in the order of the nodes."""
        last = {name: i for i, node in enumerate(self.nodes) for name in node.inputs}
        last |= dict.fromkeys(self.outputs, len(self.nodes))
        alive = most = sum(sizes.get(name, 0) for name in self.inputs)
        for i, node in enumerate(self.nodes):
            alive += sum(sizes.get(name, 0) for name in node.outputs)
            most = max(most, alive)
            alive -= sum(sizes.get(name, 0) for name in {*node.inputs, *node.outputs} if last.get(name, i) == i)
        return most

    def all_tensors(self) -> list[Tensor]:
        """Initializers, and those inside nodes and functions."""
        tensors = list(self.tensors.values())
        for nodes in (self.nodes, *(function.nodes for function in self.functions.values())):
            for attribute in (each for node in nodes for each in node.attributes.values()):
                if attribute.type in (A_TENSOR, TENSORS):
                    tensors += (attribute.value,) if attribute.type == A_TENSOR else attribute.value
        return tensors
