"""Graphs of others: what can be bounded of them before an engine runs them.

They are walked at a batch of one. Shapes, and the integers that shapes are computed from, are known where the operators
are; elsewhere a value is taken to be as large as the largest that it is made of. So chains that double are seen for
what they are, and a tensor whose size comes from a number that only a run would know is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import ArtifactError
from cm_runtime.onnx_graph.message import FLOAT, INT32, INT64, MOST_NODES, Function, Graph, Node, Port, Tensor
from cm_runtime.onnx_graph.operators import broadcast

OPSETS = range(7, 27)
IR_VERSIONS = range(3, 14)
MOST_ELEMENTS = 1 << 28  # of one value, for one image
MOST_TOTAL = 1 << 36  # of all values, which is minutes
MOST_ALIVE = 1 << 30  # of those that must be in memory together
OPEN = 64  # assumed of a dimension that is open and not the batch
SMALL = 4096  # integers whose values are followed


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

Shape = tuple[int, ...]


class Value(NamedTuple):
    """size: elements; an estimate where shape is None. numbers: of small ones that are known."""

    shape: Shape | None
    size: int
    numbers: NDArray[Any] | None = None


class _Unknown(Exception):
    """What this node makes cannot be told before a run."""


def check(graph: Graph, where: str) -> None:
    """Refuse graphs that take endless time or memory, as far as that shows in them.

    Args:
        graph: The graph.
        where: Its file, for errors.

    Raises:
        ArtifactError: Its version of ONNX is not known, it has a local function that calls itself or too many, an
            operator whose size is not known before it runs, or values larger than any image model has.
    """
    if graph.ir_version not in IR_VERSIONS or graph.opsets.get("", 0) not in OPSETS:
        version = f"{graph.ir_version} with operators of {graph.opsets.get('')}"
        raise ArtifactError(f"{where}: its version of ONNX is {version}, which cm-runtime does not know")
    walk = _Walk(graph, where)
    values = {name: _stored(tensor) for name, tensor in graph.tensors.items()}
    for name, port in graph.inputs.items():
        if name not in values:
            values[name] = walk.bounded(_of(tuple(_sides(port))), name)
    walk.run(graph.nodes, values, ())
    alive = graph.most_alive({name: value.size for name, value in values.items() if name not in graph.tensors})
    if alive > MOST_ALIVE:
        raise ArtifactError(f"{where}: its graph holds {alive} numbers in memory for one image, more than any model")


def _sides(port: Port) -> Iterator[int]:
    """At a batch of one: the first dimension that is open."""
    is_batch = True
    for side in port.dims or ():
        if isinstance(side, int) and side > 0:
            yield side
        else:
            yield 1 if is_batch else OPEN
            is_batch = False


class _Walk:
    """One pass over a graph; counts nodes, those of its functions each time that they are called, and elements."""

    def __init__(self, graph: Graph, where: str) -> None:
        self.functions, self.where = graph.functions, where
        opened = {sum(not isinstance(side, int) for side in port.dims or ()) for port in graph.inputs.values()}
        self.is_exact = opened in ({0}, {1})  # all but the batch is known
        self.left, self.total = MOST_NODES, 0

    def run(self, nodes: Any, values: dict[str, Value], inside: tuple[tuple[str, str], ...]) -> None:
        """Puts what each node makes into ``values``."""
        for node in nodes:
            self.left -= 1
            if self.left < 0:
                raise ArtifactError(f"{self.where}: its graph has over {MOST_NODES} nodes, its functions written out")
            unknown = [name for name in node.inputs if name and name not in values]
            if unknown:
                raise ArtifactError(f"{self.where}: its graph takes {unknown[0]!r}, which nothing before it makes")
            taken = [values[name] if name else None for name in node.inputs]
            function = self.functions.get((node.domain, node.kind))
            made = self._called(node, function, taken, inside) if function else self._made(node, taken)
            for name, value in zip(node.outputs, made, strict=False):
                if name and name in values:
                    raise ArtifactError(f"{self.where}: its graph makes {name!r} twice")
                values[name] = self.bounded(value, node.kind)

    def bounded(self, value: Value, kind: str) -> Value:
        """``value``, if it is not too large."""
        self.total += value.size
        if value.size > MOST_ELEMENTS or self.total > MOST_TOTAL:
            raise ArtifactError(f"{self.where}: its graph makes values that are too large for images, at {kind}")
        return value

    def _called(
        self, node: Node, function: Function, taken: list[Value | None], inside: tuple[tuple[str, str], ...]
    ) -> list[Value]:
        key = node.domain, node.kind
        if key in inside or len(inside) == 8:
            raise ArtifactError(f"{self.where}: its function {node.kind} calls itself, or others too deep")
        values = {name: value for name, value in zip(function.inputs, taken, strict=False) if value is not None}
        self.run(function.nodes, values, (*inside, key))
        return [values.get(name, Value(None, 1)) for name in function.outputs]

    def _made(self, node: Node, taken: list[Value | None]) -> list[Value]:
        if node.domain or node.kind in UNBOUNDED:
            called = f"{node.domain}::{node.kind}" if node.domain else node.kind
            raise ArtifactError(f"{self.where}: its graph has the operator {called}, whose work has no known bound")
        rule = _RULES.get(node.kind)
        most = max((value.size for value in taken if value), default=1)
        estimate = [Value(None, most)] * len(node.outputs)
        try:
            if node.kind in ONE_EACH:
                return [_arithmetic(node, [value for value in taken if value], most)]
            if rule is None:
                first = taken[0] if taken else None
                same = node.kind in SAME and first is not None
                return [first if same and first else estimate[0], *estimate[1:]] if estimate else []
            return list(rule(node, taken))
        except _Unknown as error:
            if node.kind in _GROWING:
                raise ArtifactError(
                    f"{self.where}: its graph has a {node.kind} whose size is not known before it runs"
                ) from error
            return estimate
        except (_Misfit, ValueError, IndexError, TypeError, KeyError, ArithmeticError) as error:
            if (self.is_exact and isinstance(error, _Misfit)) or node.kind in _GROWING:
                raise ArtifactError(
                    f"{self.where}: its graph is damaged: a {node.kind} does not fit its input"
                ) from error
            return estimate  # an engine will say it better


class _Misfit(Exception):
    """A node that no engine can run."""


def _of(shape: Shape, numbers: NDArray[Any] | None = None) -> Value:
    if any(side < 0 for side in shape):
        raise ValueError
    return Value(shape, math.prod(shape), numbers)


def _stored(tensor: Tensor) -> Value:
    numbers = None
    if tensor.numbers is not None:
        numbers = np.array(tensor.numbers, np.float64 if tensor.type == FLOAT else np.int64).reshape(tensor.dims)
    return Value(tensor.dims, math.prod(tensor.dims), numbers)


def _shape(value: Value | None) -> Shape:
    if value is None or value.shape is None:
        raise _Unknown
    return value.shape


def _ints(value: Value | None) -> list[int]:
    return [int(number) for number in _numbers(value).reshape(-1)]


def _numbers(value: Value | None) -> NDArray[Any]:
    if value is None or value.numbers is None:
        raise _Unknown
    return value.numbers


def _attribute(node: Node, name: str, default: Any = None) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _at(taken: list[Value | None], i: int) -> Value | None:
    return taken[i] if i < len(taken) else None


def _arithmetic(node: Node, taken: list[Value], most: int) -> Value:
    if any(value.shape is None for value in taken):
        return Value(None, most)
    shape = broadcast(value.shape for value in taken if value.shape is not None)
    numbers = None
    fold = _FOLDS.get(node.kind)
    if fold and all(value.numbers is not None for value in taken) and math.prod(shape) <= SMALL:
        with np.errstate(all="ignore"):
            numbers = np.asarray(fold(*(value.numbers for value in taken)))
    return _of(shape, numbers)


def _axis(node: Node, shape: Shape, default: int = 0) -> int:
    axis: int = _attribute(node, "axis", default)
    return range(len(shape))[axis]


def _constant(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    ((name, attribute),) = node.attributes.items()
    if name == "value" and isinstance(attribute.value, Tensor):
        yield _stored(attribute.value)
    elif name in ("value_int", "value_ints"):
        numbers = np.array(attribute.value, np.int64)
        yield _of(numbers.shape, numbers)
    else:
        is_list = isinstance(attribute.value, tuple)
        yield _of((len(attribute.value),) if is_list else ())


def _shape_of(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    shape = _shape(taken[0])[_attribute(node, "start", 0) : _attribute(node, "end", None)]
    yield _of((len(shape),), np.array(shape, np.int64))


def _size(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    yield _of((), np.array(math.prod(_shape(taken[0])), np.int64))


def _filled(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    sides = tuple(_ints(taken[0]))
    fill = _attribute(node, "value")
    numbers = None
    if fill is not None and fill.type == INT64 and fill.numbers and 0 <= math.prod(sides) <= SMALL:
        numbers = np.full(sides, int(fill.numbers[0]), np.int64)
    yield _of(sides, numbers)


def _range(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    numbers: list[Any] = [_numbers(value).item() for value in taken]
    start, limit, step = numbers
    count = max(0, math.ceil((limit - start) / step))
    yield _of((count,), np.arange(start, limit, step) if count <= SMALL else None)


def _expand(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    shape = broadcast((_shape(taken[0]), tuple(_ints(taken[1]))))
    numbers = taken[0].numbers if taken[0] else None
    is_small = numbers is not None and math.prod(shape) <= SMALL
    yield _of(shape, np.broadcast_to(numbers, shape) if is_small and numbers is not None else None)


def _tile(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    yield _of(tuple(side * times for side, times in zip(_shape(taken[0]), _ints(taken[1]), strict=True)))


def _pad(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    shape = _shape(taken[0])
    pads = list(_attribute(node, "pads", ())) or _ints(_at(taken, 1))
    axes = _ints(taken[3]) if _at(taken, 3) else range(len(shape))
    sides = list(shape)
    for i, axis in enumerate(axes):
        sides[axis] += pads[i] + pads[i + len(pads) // 2]
    yield _of(tuple(sides))


def _resize(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    shape = _shape(taken[0])
    sizes = _at(taken, 3)
    if sizes is not None and sizes.shape != (0,):
        sides = _ints(sizes)
        axes = _attribute(node, "axes", range(len(shape) - len(sides), len(shape)))
        yield _of(tuple(sides[list(axes).index(i)] if i in axes else side for i, side in enumerate(shape)))
        return
    scales = _attribute(node, "scales")  # of Upsample, once
    if scales is None:
        scales = _numbers(_at(taken, 1 if len(taken) == 2 else 2)).reshape(-1).tolist()
    axes = list(_attribute(node, "axes", range(len(shape))))
    factors = dict(zip(axes, scales, strict=True))
    yield _of(tuple(int(side * factors.get(i, 1)) for i, side in enumerate(shape)))


def _one_hot(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    (depth,) = _ints(taken[1])
    yield Value(None, depth * math.prod(_shape(taken[0])))


def _concat(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    values = [value for value in taken if value]
    size = sum(value.size for value in values)
    if any(value.shape is None for value in values):
        yield Value(None, size)
        return
    shape = _shape(values[0])
    axis = _axis(node, shape)
    numbers = None
    if size <= SMALL and all(value.numbers is not None for value in values):
        numbers = np.concatenate([value.numbers for value in values if value.numbers is not None], axis)
    yield _of((*shape[:axis], sum(_shape(value)[axis] for value in values), *shape[axis + 1 :]), numbers)


def _gather(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    data, index = taken[0], taken[1]
    shape, picked = _shape(data), _shape(index)
    axis = _axis(node, shape)
    numbers = None
    made = (*shape[:axis], *picked, *shape[axis + 1 :])
    if data and index and data.numbers is not None and index.numbers is not None and math.prod(made) <= SMALL:
        numbers = np.take(data.numbers, index.numbers, axis)
    yield _of(made, numbers)


def _gather_nd(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    shape, picked = _shape(taken[0]), _shape(taken[1])
    yield Value(None, math.prod(picked[:-1]) * math.prod(shape[picked[-1] :]))


def _gather_elements(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    yield _of(_shape(taken[1]))


def _reshape(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    shape, value = _shape(taken[0]), taken[0]
    sides = _ints(_at(taken, 1)) if len(taken) > 1 else list(_attribute(node, "shape"))
    if not _attribute(node, "allowzero", 0):
        sides = [shape[i] if side == 0 and i < len(shape) else side for i, side in enumerate(sides)]
    rest = math.prod(side for side in sides if side != -1)
    if sides.count(-1) > 1 or min(sides, default=1) < -1:
        raise _Misfit
    if -1 in sides:
        if not rest or math.prod(shape) % rest:
            raise _Misfit
        sides[sides.index(-1)] = math.prod(shape) // rest
    if math.prod(sides) != math.prod(shape):
        raise _Misfit
    numbers = value.numbers if value else None
    yield _of(tuple(sides), None if numbers is None else numbers.reshape(sides))


def _flatten(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    shape = _shape(taken[0])
    axis = range(len(shape) + 1)[_attribute(node, "axis", 1)]
    yield _of((math.prod(shape[:axis]), math.prod(shape[axis:])))


def _axes(node: Node, taken: list[Value | None], rank: int) -> set[int]:
    axes = _attribute(node, "axes")
    if axes is None:
        axes = _ints(taken[1]) if _at(taken, 1) else None
    return set(range(rank)) if axes is None else {range(rank)[axis] for axis in axes}


def _squeeze(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    shape, value = _shape(taken[0]), taken[0]
    axes = _axes(node, taken, len(shape)) if len(taken) > 1 or "axes" in node.attributes else set(range(len(shape)))
    sides = tuple(side for i, side in enumerate(shape) if i not in axes or side != 1)
    numbers = value.numbers if value else None
    yield _of(sides, None if numbers is None else numbers.reshape(sides))


def _unsqueeze(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    shape, value = _shape(taken[0]), taken[0]
    axes = _attribute(node, "axes") or _ints(_at(taken, 1))
    rank = len(shape) + len(axes)
    places = {range(rank)[axis] for axis in axes}
    sides = iter(shape)
    made = tuple(1 if i in places else next(sides) for i in range(rank))
    numbers = value.numbers if value else None
    yield _of(made, None if numbers is None else numbers.reshape(made))


def _transpose(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    shape = _shape(taken[0])
    order = _attribute(node, "perm", tuple(reversed(range(len(shape)))))
    yield _of(tuple(shape[i] for i in order))


def _slice(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    shape, value = _shape(taken[0]), taken[0]
    if len(taken) > 1:
        starts, ends = _ints(taken[1]), _ints(taken[2])
        axes = _ints(taken[3]) if _at(taken, 3) else range(len(starts))
        steps = _ints(taken[4]) if _at(taken, 4) else [1] * len(starts)
    else:
        starts, ends = _attribute(node, "starts"), _attribute(node, "ends")
        axes, steps = _attribute(node, "axes", range(len(starts))), [1] * len(starts)
    cut = [slice(None)] * len(shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut[axis] = slice(start, None if step < 0 and end < -shape[axis] else end, step)
    numbers = value.numbers[tuple(cut)] if value and value.numbers is not None else None
    yield _of(tuple(len(range(side)[each]) for side, each in zip(shape, cut, strict=True)), numbers)


def _split(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    shape = _shape(taken[0])
    axis = _axis(node, shape)
    parts = _attribute(node, "split") or (_ints(taken[1]) if _at(taken, 1) else None)
    count = len(node.outputs)
    for i in range(count):
        side = parts[i] if parts else min(-(-shape[axis] // count), shape[axis] - i * -(-shape[axis] // count))
        yield _of((*shape[:axis], max(0, side), *shape[axis + 1 :]))


def _spatial(node: Node, taken: list[Value | None], kernel: tuple[int, ...], channels: int) -> Value:
    n, _, *sides = _shape(taken[0])
    rank = len(sides)
    strides, dilations = _attribute(node, "strides", (1,) * rank), _attribute(node, "dilations", (1,) * rank)
    pads = _attribute(node, "pads", (0,) * 2 * rank)
    if _attribute(node, "auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
        return _of((n, channels, *(-(-side // stride) for side, stride in zip(sides, strides, strict=True))))
    up = _attribute(node, "ceil_mode", 0)
    out = []
    for i, side in enumerate(sides):
        room = side + pads[i] + pads[i + rank] - (dilations[i] * (kernel[i] - 1) + 1)
        out.append((-(-room // strides[i]) if up else room // strides[i]) + 1)
    return _of((n, channels, *out))


def _conv(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    channels, _, *kernel = _shape(taken[1])
    yield _spatial(node, taken, tuple(kernel), channels)


def _conv_transpose(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    _, part, *kernel = _shape(taken[1])
    n, _, *sides = _shape(taken[0])
    rank = len(sides)
    strides, dilations = _attribute(node, "strides", (1,) * rank), _attribute(node, "dilations", (1,) * rank)
    more, wanted = _attribute(node, "output_padding", (0,) * rank), _attribute(node, "output_shape")
    widest = [strides[i] * (side - 1) + dilations[i] * (kernel[i] - 1) + 1 + more[i] for i, side in enumerate(sides)]
    pads = _attribute(node, "pads", (0,) * 2 * rank)
    out = wanted or [side - pads[i] - pads[i + rank] for i, side in enumerate(widest)]
    yield _of((n, part * _attribute(node, "group", 1), *out))


def _pool(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    made = _spatial(node, taken, _attribute(node, "kernel_shape"), _shape(taken[0])[1])
    yield from [made] * len(node.outputs)


def _global_pool(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    shape = _shape(taken[0])
    yield _of((*shape[:2], *(1 for _ in shape[2:])))


def _matmul(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    a, b = _shape(taken[0]), _shape(taken[1])
    if len(a) == 1 or len(b) == 1:
        raise _Unknown
    yield _of((*broadcast((a[:-2], b[:-2])), a[-2], b[-1]))


def _gemm(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    a, b = _shape(taken[0]), _shape(taken[1])
    yield _of((a[1 if _attribute(node, "transA", 0) else 0], b[0 if _attribute(node, "transB", 0) else 1]))


def _einsum(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    """At most each of its letters once."""
    text = _attribute(node, "equation").decode().replace(" ", "")
    sides: dict[str, int] = {}
    for term, value in zip(text.partition("->")[0].split(","), taken, strict=True):
        for letter, side in zip(term, _shape(value), strict=True):
            sides[letter] = side
    yield Value(None, math.prod(sides[letter] for letter in text.partition("->")[2] or sides))


def _reduce(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    shape = _shape(taken[0])
    axes = _axes(node, taken, len(shape))
    if node.kind in ("ArgMax", "ArgMin"):
        axes = {_axis(node, shape)}
    kept = _attribute(node, "keepdims", 1)
    sides = tuple(1 if i in axes else side for i, side in enumerate(shape) if kept or i not in axes)
    numbers = taken[0].numbers if taken[0] else None
    total = None
    if node.kind == "ReduceProd" and numbers is not None:
        total = np.asarray(np.prod(numbers, axis=tuple(axes), keepdims=bool(kept)))
    yield _of(sides, total)


def _space(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    n, c, height, width = _shape(taken[0])
    block = _attribute(node, "blocksize")
    if node.kind == "DepthToSpace":
        yield _of((n, c // block**2, height * block, width * block))
    else:
        yield _of((n, c * block**2, height // block, width // block))


def _cast(node: Node, taken: list[Value | None]) -> Iterator[Value]:
    value = taken[0]
    numbers = value.numbers if value else None
    to = _attribute(node, "to", FLOAT)
    if numbers is not None and node.kind == "Cast":
        with np.errstate(all="ignore"):
            kind = {FLOAT: np.float64, INT64: np.int64, INT32: np.int32}.get(to)
            numbers = None if kind is None else numbers.astype(kind)
    yield _of(_shape(value), numbers)


_RULES: Mapping[str, Callable[[Node, list[Value | None]], Iterator[Value]]] = {
    **dict.fromkeys(("Cast", "Identity"), _cast),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _global_pool),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _space),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceProd", "ReduceMax", "ReduceMin", "ReduceL2"), _reduce),
    **dict.fromkeys(("ReduceSumSquare", "ReduceL1", "ArgMax", "ArgMin"), _reduce),
    "Constant": _constant,
    "Shape": _shape_of,
    "Size": _size,
    "ConstantOfShape": _filled,
    "Range": _range,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "Resize": _resize,
    "Upsample": _resize,
    "OneHot": _one_hot,
    "Concat": _concat,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": _gather_elements,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Slice": _slice,
    "Split": _split,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
}
_GROWING = {"ConstantOfShape", "Range", "Expand", "Tile", "Pad", "Resize", "Upsample", "OneHot"}
_FOLDS: Mapping[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": lambda a, b: np.divide(a, b) if a.dtype.kind == "f" else np.trunc(np.divide(a, b)).astype(np.int64),
    "Max": lambda *each: np.max(np.broadcast_arrays(*each), 0),
    "Min": lambda *each: np.min(np.broadcast_arrays(*each), 0),
    "Neg": np.negative,
    "Equal": np.equal,
    "Where": lambda a, b, c: np.where(a, b, c),
    "Abs": np.abs,
}
