"""Arithmetic that writes itself into a graph, so that the coefficients of `precond` are the only ones there are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cm_runtime.export.builder import FLOAT, Graph


@dataclass(frozen=True)
class Expression:
    """A float32 value of a graph, which arithmetic with numbers and its like turns into nodes."""

    g: Graph
    name: str

    def _binary(self, kind: str, other: Expression | float, *, swapped: bool = False) -> Expression:
        name = other.name if isinstance(other, Expression) else self.g.constant(np.float32(other))
        return Expression(self.g, self.g.op(kind, *((name, self.name) if swapped else (self.name, name))))

    def __add__(self, other: Expression | float) -> Expression:
        return self._binary("Add", other)

    def __radd__(self, other: float) -> Expression:
        return self._binary("Add", other, swapped=True)

    def __sub__(self, other: Expression | float) -> Expression:
        return self._binary("Sub", other)

    def __mul__(self, other: Expression | float) -> Expression:
        return self._binary("Mul", other)

    def __rmul__(self, other: float) -> Expression:
        return self._binary("Mul", other, swapped=True)

    def __truediv__(self, other: Expression | float) -> Expression:
        return self._binary("Div", other)

    def __rtruediv__(self, other: float) -> Expression:
        return self._binary("Div", other, swapped=True)

    def __pow__(self, power: float) -> Expression:
        if power == 2:
            return self * self
        if power == 0.5:
            return Expression(self.g, self.g.op("Sqrt", self.name))
        return self._binary("Pow", power)

    def __le__(self, other: float) -> Expression:
        return self._binary("LessOrEqual", other)._as_float()

    def __gt__(self, other: float) -> Expression:
        return self._binary("Greater", other)._as_float()

    def log(self) -> Expression:
        """The natural logarithm."""
        return Expression(self.g, self.g.op("Log", self.name))

    def _as_float(self) -> Expression:
        return Expression(self.g, self.g.op("Cast", self.name, to=FLOAT))
