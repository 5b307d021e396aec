"""Values of a foreign graph as far as they are known without a run, and the calls of operators on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cm_runtime.onnx_graph.graph import FLOAT, Node, Tensor
from cm_runtime.onnx_graph.rules import Shape


class Value(NamedTuple):
    """size: elements; an estimate where shape is None. numbers: of small ones that are known."""

    shape: Shape | None
    size: int
    numbers: NDArray[Any] | None = None


class Unknown(Exception):
    """The size of a node's output depends on numbers that only a run would know."""


class Misfit(Exception):
    """A node that no engine can run."""


def of_shape(shape: Shape, numbers: NDArray[Any] | None = None) -> Value:
    """A value of known shape. Raises ValueError for negative sides."""
    if any(side < 0 for side in shape):
        raise ValueError
    return Value(shape, math.prod(shape), numbers)


def of_tensor(tensor: Tensor) -> Value:
    """A stored value."""
    numbers = None
    if tensor.numbers is not None:
        numbers = np.array(tensor.numbers, np.float64 if tensor.type == FLOAT else np.int64).reshape(tensor.dims)
    return Value(tensor.dims, math.prod(tensor.dims), numbers)


class Call(NamedTuple):
    """A node with its inputs. What the node does not say raises Unknown."""

    node: Node
    inputs: list[Value | None]

    def input(self, i: int) -> Value | None:
        """An input, or None where it is left out."""
        return self.inputs[i] if i < len(self.inputs) else None

    def shape(self, i: int = 0) -> Shape:
        value = self.inputs[i]
        if value is None or value.shape is None:
            raise Unknown
        return value.shape

    def numbers(self, i: int) -> NDArray[Any]:
        value = self.inputs[i]
        if value is None or value.numbers is None:
            raise Unknown
        return value.numbers

    def ints(self, i: int) -> list[int]:
        return [int(number) for number in self.numbers(i).reshape(-1)]

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.node.attributes[name].value if name in self.node.attributes else default

    def axis(self, shape: Shape) -> int:
        """The attribute axis, counted from the front."""
        axis: int = self.attribute("axis", 0)
        return range(len(shape))[axis]

    def axes(self, rank: int) -> set[int]:
        """The axes by attribute or second input, or all."""
        axes = self.attribute("axes")
        if axes is None:
            axes = self.ints(1) if self.input(1) else range(rank)
        return {range(rank)[axis] for axis in axes}

    def reshaped(self, sides: Sequence[int]) -> Value:
        """The first input in another shape."""
        value = self.inputs[0]
        numbers = None if value is None or value.numbers is None else value.numbers.reshape(sides)
        return of_shape(tuple(sides), numbers)
