"""Shapes that foreign operators make, and the integers that shapes are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from cm_runtime.onnx_graph.graph import FLOAT, INT32, INT64, Node, Tensor
from cm_runtime.onnx_graph.rules import broadcast
from cm_runtime.onnx_graph.values import Call, Misfit, Unknown, Value, of_shape, of_tensor

SMALL = 4096  # integers whose values are followed


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


def _constant(call: Call) -> Iterator[Value]:
    ((name, attribute),) = call.node.attributes.items()
    if name == "value" and isinstance(attribute.value, Tensor):
        yield of_tensor(attribute.value)
    elif name in ("value_int", "value_ints"):
        numbers = np.array(attribute.value, np.int64)
        yield of_shape(numbers.shape, numbers)
    else:
        is_list = isinstance(attribute.value, tuple)
        yield of_shape((len(attribute.value),) if is_list else ())


def _shape_of(call: Call) -> Iterator[Value]:
    shape = call.shape()[call.attribute("start", 0) : call.attribute("end", None)]
    yield of_shape((len(shape),), np.array(shape, np.int64))


def _size(call: Call) -> Iterator[Value]:
    yield of_shape((), np.array(math.prod(call.shape()), np.int64))


def _constant_of_shape(call: Call) -> Iterator[Value]:
    sides = tuple(call.ints(0))
    fill = call.attribute("value")
    numbers = None
    if fill is not None and fill.type == INT64 and fill.numbers and 0 <= math.prod(sides) <= SMALL:
        numbers = np.full(sides, int(fill.numbers[0]), np.int64)
    yield of_shape(sides, numbers)


def _range(call: Call) -> Iterator[Value]:
    numbers: list[Any] = [call.numbers(i).item() for i in range(len(call.inputs))]
    start, limit, step = numbers
    count = max(0, math.ceil((limit - start) / step))
    yield of_shape((count,), np.arange(start, limit, step) if count <= SMALL else None)


def _expand(call: Call) -> Iterator[Value]:
    shape = broadcast((call.shape(), tuple(call.ints(1))))
    numbers = call.inputs[0].numbers if call.inputs[0] else None
    is_small = numbers is not None and math.prod(shape) <= SMALL
    yield of_shape(shape, np.broadcast_to(numbers, shape) if is_small and numbers is not None else None)


def _tile(call: Call) -> Iterator[Value]:
    yield of_shape(tuple(side * times for side, times in zip(call.shape(), call.ints(1), strict=True)))


def _pad(call: Call) -> Iterator[Value]:
    shape = call.shape()
    pads = list(call.attribute("pads", ())) or call.ints(1)
    axes = call.ints(3) if call.input(3) else range(len(shape))
    sides = list(shape)
    for i, axis in enumerate(axes):
        sides[axis] += pads[i] + pads[i + len(pads) // 2]
    yield of_shape(tuple(sides))


def _resize(call: Call) -> Iterator[Value]:
    shape = call.shape()
    sizes = call.input(3)
    if sizes is not None and sizes.shape != (0,):
        sides = call.ints(3)
        axes = call.attribute("axes", range(len(shape) - len(sides), len(shape)))
        yield of_shape(tuple(sides[list(axes).index(i)] if i in axes else side for i, side in enumerate(shape)))
        return
    scales = call.attribute("scales")  # of Upsample, once
    if scales is None:
        scales = call.numbers(1 if len(call.inputs) == 2 else 2).reshape(-1).tolist()
    axes = list(call.attribute("axes", range(len(shape))))
    factors = dict(zip(axes, scales, strict=True))
    yield of_shape(tuple(int(side * factors.get(i, 1)) for i, side in enumerate(shape)))


def _one_hot(call: Call) -> Iterator[Value]:
    (depth,) = call.ints(1)
    yield Value(None, depth * math.prod(call.shape()))


def _concat(call: Call) -> Iterator[Value]:
    values = [value for value in call.inputs if value]
    size = sum(value.size for value in values)
    shapes = [value.shape for value in values if value.shape is not None]
    if len(shapes) < len(values):
        yield Value(None, size)
        return
    shape = shapes[0]
    axis = call.axis(shape)
    numbers = None
    if size <= SMALL and all(value.numbers is not None for value in values):
        numbers = np.concatenate([value.numbers for value in values if value.numbers is not None], axis)
    yield of_shape((*shape[:axis], sum(each[axis] for each in shapes), *shape[axis + 1 :]), numbers)


def _gather(call: Call) -> Iterator[Value]:
    data, index = call.inputs[0], call.inputs[1]
    shape, index_shape = call.shape(), call.shape(1)
    axis = call.axis(shape)
    numbers = None
    shape_out = (*shape[:axis], *index_shape, *shape[axis + 1 :])
    if data and index and data.numbers is not None and index.numbers is not None and math.prod(shape_out) <= SMALL:
        numbers = np.take(data.numbers, index.numbers, axis)
    yield of_shape(shape_out, numbers)


def _gather_nd(call: Call) -> Iterator[Value]:
    shape, index_shape = call.shape(), call.shape(1)
    yield Value(None, math.prod(index_shape[:-1]) * math.prod(shape[index_shape[-1] :]))


def _gather_elements(call: Call) -> Iterator[Value]:
    yield of_shape(call.shape(1))


def _reshape(call: Call) -> Iterator[Value]:
    shape = call.shape()
    sides = call.ints(1) if len(call.inputs) > 1 else list(call.attribute("shape"))
    if not call.attribute("allowzero", 0):
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
    yield call.reshaped(sides)


def _flatten(call: Call) -> Iterator[Value]:
    shape = call.shape()
    axis = range(len(shape) + 1)[call.attribute("axis", 1)]
    yield of_shape((math.prod(shape[:axis]), math.prod(shape[axis:])))


def _squeeze(call: Call) -> Iterator[Value]:
    shape = call.shape()
    axes = call.axes(len(shape))
    yield call.reshaped(tuple(side for i, side in enumerate(shape) if i not in axes or side != 1))


def _unsqueeze(call: Call) -> Iterator[Value]:
    shape = call.shape()
    axes = call.attribute("axes") or call.ints(1)
    rank = len(shape) + len(axes)
    places = {range(rank)[axis] for axis in axes}
    sides = iter(shape)
    yield call.reshaped(tuple(1 if i in places else next(sides) for i in range(rank)))


def _transpose(call: Call) -> Iterator[Value]:
    shape = call.shape()
    order = call.attribute("perm", tuple(reversed(range(len(shape)))))
    yield of_shape(tuple(shape[i] for i in order))


def _slice(call: Call) -> Iterator[Value]:
    shape, value = call.shape(), call.inputs[0]
    if len(call.inputs) > 1:
        starts, ends = call.ints(1), call.ints(2)
        axes = call.ints(3) if call.input(3) else range(len(starts))
        steps = call.ints(4) if call.input(4) else [1] * len(starts)
    else:
        starts, ends = call.attribute("starts"), call.attribute("ends")
        axes, steps = call.attribute("axes", range(len(starts))), [1] * len(starts)
    cut = [slice(None)] * len(shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut[axis] = slice(start, None if step < 0 and end < -shape[axis] else end, step)
    numbers = value.numbers[tuple(cut)] if value and value.numbers is not None else None
    yield of_shape(tuple(len(range(side)[each]) for side, each in zip(shape, cut, strict=True)), numbers)


def _split(call: Call) -> Iterator[Value]:
    shape = call.shape()
    axis = call.axis(shape)
    parts = call.attribute("split") or (call.ints(1) if call.input(1) else None)
    count = len(call.node.outputs)
    for i in range(count):
        side = parts[i] if parts else min(-(-shape[axis] // count), shape[axis] - i * -(-shape[axis] // count))
        yield of_shape((*shape[:axis], max(0, side), *shape[axis + 1 :]))


def _spatial(call: Call, kernel: tuple[int, ...], channels: int) -> Value:
    n, _, *sides = call.shape()
    rank = len(sides)
    strides, dilations = call.attribute("strides", (1,) * rank), call.attribute("dilations", (1,) * rank)
    pads = call.attribute("pads", (0,) * 2 * rank)
    if call.attribute("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
        return of_shape((n, channels, *(-(-side // stride) for side, stride in zip(sides, strides, strict=True))))
    up = call.attribute("ceil_mode", 0)
    out = []
    for i, side in enumerate(sides):
        room = side + pads[i] + pads[i + rank] - (dilations[i] * (kernel[i] - 1) + 1)
        out.append((-(-room // strides[i]) if up else room // strides[i]) + 1)
    return of_shape((n, channels, *out))


def _conv(call: Call) -> Iterator[Value]:
    channels, _, *kernel = call.shape(1)
    yield _spatial(call, tuple(kernel), channels)


def _conv_transpose(call: Call) -> Iterator[Value]:
    _, part, *kernel = call.shape(1)
    n, _, *sides = call.shape()
    rank = len(sides)
    strides, dilations = call.attribute("strides", (1,) * rank), call.attribute("dilations", (1,) * rank)
    more, sides_out = call.attribute("output_padding", (0,) * rank), call.attribute("output_shape")
    widest = [strides[i] * (side - 1) + dilations[i] * (kernel[i] - 1) + 1 + more[i] for i, side in enumerate(sides)]
    pads = call.attribute("pads", (0,) * 2 * rank)
    out = sides_out or [side - pads[i] - pads[i + rank] for i, side in enumerate(widest)]
    yield of_shape((n, part * call.attribute("group", 1), *out))


def _pool(call: Call) -> Iterator[Value]:
    shape_out = _spatial(call, call.attribute("kernel_shape"), call.shape()[1])
    yield from [shape_out] * len(call.node.outputs)


def _global_pool(call: Call) -> Iterator[Value]:
    shape = call.shape()
    yield of_shape((*shape[:2], *(1 for _ in shape[2:])))


def _matmul(call: Call) -> Iterator[Value]:
    a, b = call.shape(), call.shape(1)
    if len(a) == 1 or len(b) == 1:
        raise Unknown
    yield of_shape((*broadcast((a[:-2], b[:-2])), a[-2], b[-1]))


def _gemm(call: Call) -> Iterator[Value]:
    a, b = call.shape(), call.shape(1)
    yield of_shape((a[1 if call.attribute("transA", 0) else 0], b[0 if call.attribute("transB", 0) else 1]))


def _einsum(call: Call) -> Iterator[Value]:
    """At most each of its letters once."""
    text = call.attribute("equation").decode().replace(" ", "")
    sides: dict[str, int] = {}
    for i, term in zip(range(len(call.inputs)), text.partition("->")[0].split(","), strict=True):
        sides |= dict(zip(term, call.shape(i), strict=True))
    yield Value(None, math.prod(sides[letter] for letter in text.partition("->")[2] or sides))


def _reduce(call: Call) -> Iterator[Value]:
    shape = call.shape()
    axes = call.axes(len(shape))
    if call.node.kind in ("ArgMax", "ArgMin"):
        axes = {call.axis(shape)}
    keeps_dims = call.attribute("keepdims", 1)
    sides = tuple(1 if i in axes else side for i, side in enumerate(shape) if keeps_dims or i not in axes)
    numbers = call.inputs[0].numbers if call.inputs[0] else None
    total = None
    if call.node.kind == "ReduceProd" and numbers is not None:
        total = np.asarray(np.prod(numbers, axis=tuple(axes), keepdims=bool(keeps_dims)))
    yield of_shape(sides, total)


def _space(call: Call) -> Iterator[Value]:
    n, c, height, width = call.shape()
    block = call.attribute("blocksize")
    if call.node.kind == "DepthToSpace":
        yield of_shape((n, c // block**2, height * block, width * block))
    else:
        yield of_shape((n, c * block**2, height // block, width // block))


def _cast(call: Call) -> Iterator[Value]:
    value = call.inputs[0]
    numbers = value.numbers if value else None
    to = call.attribute("to", FLOAT)
    if numbers is not None and call.node.kind == "Cast":
        with np.errstate(all="ignore"):
            kind = {FLOAT: np.float64, INT64: np.int64, INT32: np.int32}.get(to)
            numbers = None if kind is None else numbers.astype(kind)
    yield of_shape(call.shape(), numbers)


RULES: Mapping[str, Callable[[Call], Iterator[Value]]] = {
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
