"""Shapes that foreign operators make, and the integers that shapes are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cm_runtime.onnx_graph.graph import FLOAT, INT32, INT64, Node, Tensor
from cm_runtime.onnx_graph.rules import Shape, broadcast

SMALL = 4096  # integers whose values are followed


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


def _shape(value: Value | None) -> Shape:
    if value is None or value.shape is None:
        raise Unknown
    return value.shape


def _ints(value: Value | None) -> list[int]:
    return [int(number) for number in _numbers(value).reshape(-1)]


def _numbers(value: Value | None) -> NDArray[Any]:
    if value is None or value.numbers is None:
        raise Unknown
    return value.numbers


def _attribute(node: Node, name: str, default: Any = None) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _at(inputs: list[Value | None], i: int) -> Value | None:
    return inputs[i] if i < len(inputs) else None


def arithmetic(node: Node, inputs: list[Value], most: int) -> Value:
    """An element-wise operator's output; its size is estimated by ``most`` where a shape is not known."""
    if any(value.shape is None for value in inputs):
        return Value(None, most)
    shape = broadcast(value.shape for value in inputs if value.shape is not None)
    numbers = None
    fold = _FOLDS.get(node.kind)
    if fold and all(value.numbers is not None for value in inputs) and math.prod(shape) <= SMALL:
        with np.errstate(all="ignore"):
            numbers = np.asarray(fold(*(value.numbers for value in inputs)))
    return of_shape(shape, numbers)


def _axis(node: Node, shape: Shape, default: int = 0) -> int:
    axis: int = _attribute(node, "axis", default)
    return range(len(shape))[axis]


def _constant(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    ((name, attribute),) = node.attributes.items()
    if name == "value" and isinstance(attribute.value, Tensor):
        yield of_tensor(attribute.value)
    elif name in ("value_int", "value_ints"):
        numbers = np.array(attribute.value, np.int64)
        yield of_shape(numbers.shape, numbers)
    else:
        is_list = isinstance(attribute.value, tuple)
        yield of_shape((len(attribute.value),) if is_list else ())


def _shape_of(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    shape = _shape(inputs[0])[_attribute(node, "start", 0) : _attribute(node, "end", None)]
    yield of_shape((len(shape),), np.array(shape, np.int64))


def _size(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    yield of_shape((), np.array(math.prod(_shape(inputs[0])), np.int64))


def _constant_of_shape(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    sides = tuple(_ints(inputs[0]))
    fill = _attribute(node, "value")
    numbers = None
    if fill is not None and fill.type == INT64 and fill.numbers and 0 <= math.prod(sides) <= SMALL:
        numbers = np.full(sides, int(fill.numbers[0]), np.int64)
    yield of_shape(sides, numbers)


def _range(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    numbers: list[Any] = [_numbers(value).item() for value in inputs]
    start, limit, step = numbers
    count = max(0, math.ceil((limit - start) / step))
    yield of_shape((count,), np.arange(start, limit, step) if count <= SMALL else None)


def _expand(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    shape = broadcast((_shape(inputs[0]), tuple(_ints(inputs[1]))))
    numbers = inputs[0].numbers if inputs[0] else None
    is_small = numbers is not None and math.prod(shape) <= SMALL
    yield of_shape(shape, np.broadcast_to(numbers, shape) if is_small and numbers is not None else None)


def _tile(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    yield of_shape(tuple(side * times for side, times in zip(_shape(inputs[0]), _ints(inputs[1]), strict=True)))


def _pad(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    shape = _shape(inputs[0])
    pads = list(_attribute(node, "pads", ())) or _ints(_at(inputs, 1))
    axes = _ints(inputs[3]) if _at(inputs, 3) else range(len(shape))
    sides = list(shape)
    for i, axis in enumerate(axes):
        sides[axis] += pads[i] + pads[i + len(pads) // 2]
    yield of_shape(tuple(sides))


def _resize(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    shape = _shape(inputs[0])
    sizes = _at(inputs, 3)
    if sizes is not None and sizes.shape != (0,):
        sides = _ints(sizes)
        axes = _attribute(node, "axes", range(len(shape) - len(sides), len(shape)))
        yield of_shape(tuple(sides[list(axes).index(i)] if i in axes else side for i, side in enumerate(shape)))
        return
    scales = _attribute(node, "scales")  # of Upsample, once
    if scales is None:
        scales = _numbers(_at(inputs, 1 if len(inputs) == 2 else 2)).reshape(-1).tolist()
    axes = list(_attribute(node, "axes", range(len(shape))))
    factors = dict(zip(axes, scales, strict=True))
    yield of_shape(tuple(int(side * factors.get(i, 1)) for i, side in enumerate(shape)))


def _one_hot(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    (depth,) = _ints(inputs[1])
    yield Value(None, depth * math.prod(_shape(inputs[0])))


def _concat(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    values = [value for value in inputs if value]
    size = sum(value.size for value in values)
    if any(value.shape is None for value in values):
        yield Value(None, size)
        return
    shape = _shape(values[0])
    axis = _axis(node, shape)
    numbers = None
    if size <= SMALL and all(value.numbers is not None for value in values):
        numbers = np.concatenate([value.numbers for value in values if value.numbers is not None], axis)
    yield of_shape((*shape[:axis], sum(_shape(value)[axis] for value in values), *shape[axis + 1 :]), numbers)


def _gather(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    data, index = inputs[0], inputs[1]
    shape, index_shape = _shape(data), _shape(index)
    axis = _axis(node, shape)
    numbers = None
    shape_out = (*shape[:axis], *index_shape, *shape[axis + 1 :])
    if data and index and data.numbers is not None and index.numbers is not None and math.prod(shape_out) <= SMALL:
        numbers = np.take(data.numbers, index.numbers, axis)
    yield of_shape(shape_out, numbers)


def _gather_nd(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    shape, index_shape = _shape(inputs[0]), _shape(inputs[1])
    yield Value(None, math.prod(index_shape[:-1]) * math.prod(shape[index_shape[-1] :]))


def _gather_elements(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    yield of_shape(_shape(inputs[1]))


def _reshape(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    shape, value = _shape(inputs[0]), inputs[0]
    sides = _ints(_at(inputs, 1)) if len(inputs) > 1 else list(_attribute(node, "shape"))
    if not _attribute(node, "allowzero", 0):
        sides = [shape[i] if side == 0 and i < len(shape) else side for i, side in enumerate(sides)]
    rest = math.prod(side for side in sides if side != -1)
    if sides.count(-1) > 1 or min(sides, default=1) < -1:
        raise Misfit
    if -1 in sides:
        if not rest or math.prod(shape) % rest:
            raise Misfit
        sides[sides.index(-1)] = math.prod(shape) // rest
    if math.prod(sides) != math.prod(shape):
        raise Misfit
    numbers = value.numbers if value else None
    yield of_shape(tuple(sides), None if numbers is None else numbers.reshape(sides))


def _flatten(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    shape = _shape(inputs[0])
    axis = range(len(shape) + 1)[_attribute(node, "axis", 1)]
    yield of_shape((math.prod(shape[:axis]), math.prod(shape[axis:])))


def _axes(node: Node, inputs: list[Value | None], rank: int) -> set[int]:
    axes = _attribute(node, "axes")
    if axes is None:
        axes = _ints(inputs[1]) if _at(inputs, 1) else None
    return set(range(rank)) if axes is None else {range(rank)[axis] for axis in axes}


def _squeeze(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    shape, value = _shape(inputs[0]), inputs[0]
    axes = _axes(node, inputs, len(shape)) if len(inputs) > 1 or "axes" in node.attributes else set(range(len(shape)))
    sides = tuple(side for i, side in enumerate(shape) if i not in axes or side != 1)
    numbers = value.numbers if value else None
    yield of_shape(sides, None if numbers is None else numbers.reshape(sides))


def _unsqueeze(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    shape, value = _shape(inputs[0]), inputs[0]
    axes = _attribute(node, "axes") or _ints(_at(inputs, 1))
    rank = len(shape) + len(axes)
    places = {range(rank)[axis] for axis in axes}
    sides = iter(shape)
    shape_out = tuple(1 if i in places else next(sides) for i in range(rank))
    numbers = value.numbers if value else None
    yield of_shape(shape_out, None if numbers is None else numbers.reshape(shape_out))


def _transpose(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    shape = _shape(inputs[0])
    order = _attribute(node, "perm", tuple(reversed(range(len(shape)))))
    yield of_shape(tuple(shape[i] for i in order))


def _slice(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    shape, value = _shape(inputs[0]), inputs[0]
    if len(inputs) > 1:
        starts, ends = _ints(inputs[1]), _ints(inputs[2])
        axes = _ints(inputs[3]) if _at(inputs, 3) else range(len(starts))
        steps = _ints(inputs[4]) if _at(inputs, 4) else [1] * len(starts)
    else:
        starts, ends = _attribute(node, "starts"), _attribute(node, "ends")
        axes, steps = _attribute(node, "axes", range(len(starts))), [1] * len(starts)
    cut = [slice(None)] * len(shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut[axis] = slice(start, None if step < 0 and end < -shape[axis] else end, step)
    numbers = value.numbers[tuple(cut)] if value and value.numbers is not None else None
    yield of_shape(tuple(len(range(side)[each]) for side, each in zip(shape, cut, strict=True)), numbers)


def _split(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    shape = _shape(inputs[0])
    axis = _axis(node, shape)
    parts = _attribute(node, "split") or (_ints(inputs[1]) if _at(inputs, 1) else None)
    count = len(node.outputs)
    for i in range(count):
        side = parts[i] if parts else min(-(-shape[axis] // count), shape[axis] - i * -(-shape[axis] // count))
        yield of_shape((*shape[:axis], max(0, side), *shape[axis + 1 :]))


def _spatial(node: Node, inputs: list[Value | None], kernel: tuple[int, ...], channels: int) -> Value:
    n, _, *sides = _shape(inputs[0])
    rank = len(sides)
    strides, dilations = _attribute(node, "strides", (1,) * rank), _attribute(node, "dilations", (1,) * rank)
    pads = _attribute(node, "pads", (0,) * 2 * rank)
    if _attribute(node, "auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
        return of_shape((n, channels, *(-(-side // stride) for side, stride in zip(sides, strides, strict=True))))
    up = _attribute(node, "ceil_mode", 0)
    out = []
    for i, side in enumerate(sides):
        room = side + pads[i] + pads[i + rank] - (dilations[i] * (kernel[i] - 1) + 1)
        out.append((-(-room // strides[i]) if up else room // strides[i]) + 1)
    return of_shape((n, channels, *out))


def _conv(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    channels, _, *kernel = _shape(inputs[1])
    yield _spatial(node, inputs, tuple(kernel), channels)


def _conv_transpose(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    _, part, *kernel = _shape(inputs[1])
    n, _, *sides = _shape(inputs[0])
    rank = len(sides)
    strides, dilations = _attribute(node, "strides", (1,) * rank), _attribute(node, "dilations", (1,) * rank)
    more, sides_out = _attribute(node, "output_padding", (0,) * rank), _attribute(node, "output_shape")
    widest = [strides[i] * (side - 1) + dilations[i] * (kernel[i] - 1) + 1 + more[i] for i, side in enumerate(sides)]
    pads = _attribute(node, "pads", (0,) * 2 * rank)
    out = sides_out or [side - pads[i] - pads[i + rank] for i, side in enumerate(widest)]
    yield of_shape((n, part * _attribute(node, "group", 1), *out))


def _pool(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    shape_out = _spatial(node, inputs, _attribute(node, "kernel_shape"), _shape(inputs[0])[1])
    yield from [shape_out] * len(node.outputs)


def _global_pool(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    shape = _shape(inputs[0])
    yield of_shape((*shape[:2], *(1 for _ in shape[2:])))


def _matmul(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    a, b = _shape(inputs[0]), _shape(inputs[1])
    if len(a) == 1 or len(b) == 1:
        raise Unknown
    yield of_shape((*broadcast((a[:-2], b[:-2])), a[-2], b[-1]))


def _gemm(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    a, b = _shape(inputs[0]), _shape(inputs[1])
    yield of_shape((a[1 if _attribute(node, "transA", 0) else 0], b[0 if _attribute(node, "transB", 0) else 1]))


def _einsum(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    """At most each of its letters once."""
    text = _attribute(node, "equation").decode().replace(" ", "")
    sides: dict[str, int] = {}
    for term, value in zip(text.partition("->")[0].split(","), inputs, strict=True):
        for letter, side in zip(term, _shape(value), strict=True):
            sides[letter] = side
    yield Value(None, math.prod(sides[letter] for letter in text.partition("->")[2] or sides))


def _reduce(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    shape = _shape(inputs[0])
    axes = _axes(node, inputs, len(shape))
    if node.kind in ("ArgMax", "ArgMin"):
        axes = {_axis(node, shape)}
    keeps_dims = _attribute(node, "keepdims", 1)
    sides = tuple(1 if i in axes else side for i, side in enumerate(shape) if keeps_dims or i not in axes)
    numbers = inputs[0].numbers if inputs[0] else None
    total = None
    if node.kind == "ReduceProd" and numbers is not None:
        total = np.asarray(np.prod(numbers, axis=tuple(axes), keepdims=bool(keeps_dims)))
    yield of_shape(sides, total)


def _space(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    n, c, height, width = _shape(inputs[0])
    block = _attribute(node, "blocksize")
    if node.kind == "DepthToSpace":
        yield of_shape((n, c // block**2, height * block, width * block))
    else:
        yield of_shape((n, c * block**2, height // block, width // block))


def _cast(node: Node, inputs: list[Value | None]) -> Iterator[Value]:
    value = inputs[0]
    numbers = value.numbers if value else None
    to = _attribute(node, "to", FLOAT)
    if numbers is not None and node.kind == "Cast":
        with np.errstate(all="ignore"):
            kind = {FLOAT: np.float64, INT64: np.int64, INT32: np.int32}.get(to)
            numbers = None if kind is None else numbers.astype(kind)
    yield of_shape(_shape(value), numbers)


RULES: Mapping[str, Callable[[Node, list[Value | None]], Iterator[Value]]] = {
    **dict.fromkeys(("Cast", "Identity"), _cast),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _global_pool),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _space),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceProd", "ReduceMax", "ReduceMin", "ReduceL2"), _reduce),
    **dict.fromkeys(("ReduceSumSquare", "ReduceL1", "ArgMax", "ArgMin"), _reduce),
    "Constant": _constant,
    "Shape": _shape_of,
    "Size": _size,
    "ConstantOfShape": _constant_of_shape,
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
GROWING = {"ConstantOfShape", "Range", "Expand", "Tile", "Pad", "Resize", "Upsample", "OneHot"}
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
