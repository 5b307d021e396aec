"""An ONNX graph as it is written: nodes one after the other, and each weight once, under its name.

Values are their names. Weights stay views of the model's tensors until the file is written (see `weights_file`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

from cm_runtime.export.weights_file import Network

OPSET = 20  # what every engine reads
IR_VERSION = 10
FLOAT, HALF, BFLOAT, INT64, UINT8, BOOL = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.INT64,
    TensorProto.UINT8,
    TensorProto.BOOL,
)


class Graph:
    """A graph in the making."""

    def __init__(self, opset: int = OPSET) -> None:
        self.opset = opset
        self.weights: dict[str, NDArray[Any]] = {}
        self.functions: list[onnx.FunctionProto] = []
        self.folds = 0
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._scope: list[str] = []
        self._used: dict[str, int] = {}

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """A graph input; a dimension may be named."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, value: str, name: str, kind: int, shape: Sequence[int | str]) -> None:
        """Makes ``value``, which the last node made, the graph output ``name``."""
        assert list(self._nodes[-1].output) == [value]
        self._nodes[-1].output[0] = name
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes made inside are named ``name/...``."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """A node with one output."""
        (value,) = self.ops(kind, *inputs, outputs=1, domain=domain, **attributes)
        return value

    def ops(self, kind: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any) -> list[str]:
        """A node with several outputs."""
        name = "/".join([*self._scope, kind])
        count = self._used[name] = self._used.get(name, 0) + 1
        name = name if count == 1 else f"{name}_{count}"
        values = [name] if outputs == 1 else [f"{name}:{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, inputs, values, name=name, domain=domain, **attributes))
        return values

    def cast(self, value: str, old: int, new: int) -> str:
        """``value``, of element type ``old``, as ``new``."""
        return value if old == new else self.op("Cast", value, to=new)

    def weight(self, name: str, array: NDArray[Any], kind: int = FLOAT) -> str:
        """A tensor of the model, under its name there; it is stored once however often it is asked for."""
        if name not in self._initializers:
            self._initializers[name] = TensorProto(name=name, data_type=kind, dims=array.shape)
            self.weights[name] = array
        return name

    def constant(self, value: ArrayLike, kind: int = FLOAT) -> str:
        """A small tensor of numbers; equal ones are one."""
        array = np.asarray(value).astype(helper.tensor_dtype_to_np_dtype(kind))
        content = f"{kind} {array.shape}".encode() + array.tobytes()
        name = f"constant_{hashlib.sha256(content).hexdigest()[:16]}"
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def fold(self, value: ArrayLike) -> str:
        """A float32 constant that stands for what a plain export computes at each evaluation."""
        self.folds += 1
        return self.constant(value)

    def kind(self, name: str) -> int:
        """The element type of a weight or constant."""
        return self._initializers[name].data_type

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight or constant."""
        return tuple(self._initializers[name].dims)

    def network(self) -> Network:
        """The finished graph and its weights."""
        graph = helper.make_graph(
            self._nodes, "main", self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        domains = {"": self.opset} | {function.domain: 1 for function in self.functions}
        domains |= {node.domain: 1 for node in self._nodes if node.domain}
        model = helper.make_model(
            graph,
            producer_name="cm-runtime",
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in domains.items()],
            functions=self.functions,
            ir_version=IR_VERSION,
        )
        return Network(model, self.weights)
