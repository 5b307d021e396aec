"""Arithmetic that writes itself as nodes: the formulas of `precond` serve NumPy, torch and every kind of graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from cm_runtime.onnx_graph.graph import FLOAT


class Emitter(Protocol):
    """A writer of nodes under ONNX's names; what stands for a value is its own affair."""

    def constant(self, value: float, /) -> Any:
        """A float32 scalar."""
        ...

    def op(self, kind: str, /, *inputs: Any, **attributes: Any) -> Any:
        """The one output of a node."""
        ...


@dataclass(frozen=True)
class Expression:
    """A float32 value of a graph, which arithmetic with numbers and its like turns into nodes."""

    emitter: Emitter
    value: Any

    def _op(self, kind: str, *operands: Expression | float) -> Expression:
        values = (each.value if isinstance(each, Expression) else self.emitter.constant(each) for each in operands)
        return Expression(self.emitter, self.emitter.op(kind, *values))

    def __add__(self, other: Expression | float) -> Expression:
        return self._op("Add", self, other)

    def __radd__(self, other: float) -> Expression:
        return self._op("Add", other, self)

    def __sub__(self, other: Expression | float) -> Expression:
        return self._op("Sub", self, other)

    def __mul__(self, other: Expression | float) -> Expression:
        return self._op("Mul", self, other)

    def __rmul__(self, other: float) -> Expression:
        return self._op("Mul", other, self)

    def __truediv__(self, other: Expression | float) -> Expression:
        return self._op("Div", self, other)

    def __rtruediv__(self, other: float) -> Expression:
        return self._op("Div", other, self)

    def __pow__(self, power: float) -> Expression:
        if power == 2:
            return self * self
        return self._op("Sqrt", self) if power == 0.5 else self._op("Pow", self, power)

    def __le__(self, other: float) -> Expression:
        return self._op("LessOrEqual", self, other)._as_float()

    def __gt__(self, other: float) -> Expression:
        return self._op("Greater", self, other)._as_float()

    def log(self) -> Expression:
        """The natural logarithm."""
        return self._op("Log", self)

    def _as_float(self) -> Expression:
        return Expression(self.emitter, self.emitter.op("Cast", self.value, to=FLOAT))
