"""Operators as `export` writes them: the attributes, types and shapes that each may have, and the values it makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from cm_runtime.errors.wording import quantity
from cm_runtime.manifest import Manifest
from cm_runtime.onnx_graph.graph import (
    A_FLOAT,
    A_STRING,
    AN_INT,
    BFLOAT,
    BOOL,
    FLOAT,
    HALF,
    INT64,
    INTS,
    UINT8,
    Node,
)
from cm_runtime.onnx_graph.skip_scale import DOMAIN, NAME

CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators, in graphs for the CUDA provider alone
N = -1  # the batch, as a dimension
FLOATS = (FLOAT, HALF, BFLOAT)

Shape = tuple[int, ...]


class NotOwn(Exception):
    """The graph is none that `export` writes; the message says why."""


class Value(NamedTuple):
    """type: of TensorProto.DataType; numbers: of a small constant."""

    type: int
    shape: Shape
    numbers: tuple[float, ...] | None = None
    is_static: bool = False
    role: str = ""  # of an input: its name


class Rule(NamedTuple):
    """Bounds of one operator: its number of inputs, its attributes' types, and a function for its outputs."""

    apply: Callable[[Node, list[Value], Manifest], list[Value]]
    fewest: int
    most: int
    attributes: Mapping[str, int]  # by AttributeProto.AttributeType
    required: frozenset[str]


def _require(condition: bool) -> None:
    """Raise ValueError for a rule that is broken."""
    if not condition:
        raise ValueError


def broadcast(shapes: Iterable[Shape]) -> Shape:
    """The shape that values of these make together. Raises ValueError."""
    sides: list[int] = []
    for shape in shapes:
        padded = [1] * (len(shape) - len(sides)) + sides
        offset = len(padded) - len(shape)
        for i, side in enumerate(shape, offset):
            if padded[i] == 1:
                padded[i] = side
            elif side != 1 and side != padded[i]:
                raise ValueError
        sides = padded
    return tuple(sides)


def _static(inputs: Iterable[Value]) -> bool:
    return all(value.is_static for value in inputs)


def _arithmetic(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    a, b = inputs
    _require(a.type == b.type and a.type in FLOATS)
    return [Value(a.type, broadcast((a.shape, b.shape)), is_static=_static(inputs))]


def _comparison(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    return [value._replace(type=BOOL) for value in _arithmetic(node, inputs, manifest)]


def _same(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    x = inputs[0]
    _require(x.type in FLOATS)
    return [Value(x.type, x.shape, is_static=x.is_static)]


def _clip(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    x, low, high = inputs
    _require(x.type == low.type == high.type and low.shape == high.shape == () and _static((low, high)))
    return _same(node, inputs, manifest)


def _cast(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    x, to = inputs[0], node.attributes["to"].value
    _require((x.type in (*FLOATS, BOOL) and to in FLOATS) or (x.type == FLOAT and to == UINT8))
    return [Value(to, x.shape, is_static=x.is_static)]


def _gather(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    """A row of a table by label, or the noise of one step."""
    data, index = inputs
    _require(_number(node, "axis") == 0 and index.type == INT64)
    if index.role == "label":
        _require(data.is_static and len(data.shape) > 1 and data.type in FLOATS)
        if data.shape[0] != manifest.num_classes:
            raise NotOwn(f"its graph is not for the {quantity(manifest.num_classes, 'class')} of its manifest")
        return [Value(data.type, (N, *data.shape[1:]))]
    _require(data.role == "noise" and index.shape == () and index.numbers is not None)
    (step,) = index.numbers or ()
    _require(0 <= step < data.shape[0])
    return [Value(data.type, data.shape[1:])]


def _reshape(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    x, shape = inputs
    _require(shape.type == INT64 and len(shape.shape) == 1 and x.type in FLOATS and x.role != "noise")
    sides = [int(side) for side in shape.numbers or ()]
    _require(len(sides) > 0 and sides.count(-1) <= 1 and min(sides) >= -1)
    has_batch = N in x.shape
    whole = math.prod(side for side in x.shape if side != N)
    out = [x.shape[i] if side == 0 else side for i, side in enumerate(sides)]
    rest = math.prod(side for i, side in enumerate(out) if sides[i] != -1 and side != N)
    _require(rest > 0 and whole % rest == 0)
    if has_batch:
        is_kept = sides[0] == 0  # the batch of x itself
        _require(x.shape[0] == N and (is_kept or sides[0] == -1))
        out[0] = N
        if is_kept and -1 in sides:
            out[sides.index(-1)] = whole // rest
        else:
            _require(whole == rest)
    elif -1 in sides:
        out[sides.index(-1)] = whole // rest
    else:
        _require(whole == rest)
    return [Value(x.type, tuple(out), is_static=x.is_static)]


def _transpose(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    x, order = inputs[0], node.attributes["perm"].value
    _require(sorted(order) == list(range(len(x.shape))) and x.type in FLOATS)
    return [Value(x.type, tuple(x.shape[i] for i in order), is_static=x.is_static)]


def _conv(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    x, w, *bias = inputs
    n, c, *size = x.shape
    o, i, *kernel = w.shape
    strides, pads = _numbers(node, "strides", (1, 1)), _numbers(node, "pads", (0,) * 4)
    _require(len(size) == len(kernel) == len(strides) == 2 and len(pads) == 4 and _static((w, *bias)))
    _require(_numbers(node, "kernel_shape", ()) == tuple(kernel) and i == c and c > 0 and x.type in FLOATS)
    _require(all(b.shape == (o,) for b in bias) and {each.type for each in inputs} == {x.type})
    _require(all(1 <= s <= 16 for s in strides) and all(0 <= p < max(kernel) for p in pads))
    out = [(size[d] + pads[d] + pads[d + 2] - kernel[d]) // strides[d] + 1 for d in (0, 1)]
    return [Value(x.type, (n, o, *out), is_static=x.is_static)]


def _nhwc_conv(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    """`_conv` of images and weights whose channels stand last."""
    x, w, *bias = inputs
    (n, height, width, c), (o, kernel_height, kernel_width, i) = x.shape, w.shape
    first = [x._replace(shape=(n, c, height, width)), w._replace(shape=(o, i, kernel_height, kernel_width)), *bias]
    (y,) = _conv(node, first, manifest)
    n, o, height, width = y.shape
    return [y._replace(shape=(n, height, width, o))]


def _group_norm(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    x, *weights = inputs
    _, height, width, c = x.shape
    groups, epsilon = _number(node, "groups"), node.attributes["epsilon"].value
    _require(0 < groups <= c and c % groups == 0 and 0 <= epsilon < 1 and min(height, width) > 0)
    _require(_number(node, "channels_last") == 1 and _number(node, "activation") in (0, 1) and _static(weights))
    _require(x.type in (FLOAT, HALF) and all(each.type == FLOAT and each.shape == (c,) for each in weights))
    return [Value(x.type, x.shape, is_static=x.is_static)]


def _multi_head_attention(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    (_, pixels, c), heads = inputs[0].shape, _number(node, "num_heads")
    _require(pixels > 0 and 0 < heads <= c and c % heads == 0 and inputs[0].type in (FLOAT, HALF))
    _require({(each.type, each.shape) for each in inputs} == {(inputs[0].type, inputs[0].shape)})
    return [Value(inputs[0].type, inputs[0].shape, is_static=_static(inputs))]


def _quick_gelu(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    _require(node.attributes["alpha"].value == 1 and inputs[0].type in (FLOAT, HALF))
    return _same(node, inputs, manifest)


def _matmul(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    a, b = inputs
    (*batch, m, k), (*other, k2, n) = a.shape, b.shape
    _require(batch == other and k == k2 and min(m, k, n) > 0 and a.type == b.type and a.type in FLOATS)
    return [Value(a.type, (*batch, m, n), is_static=_static(inputs))]


def _gemm(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    a, b, c = inputs
    (n, k), (o, k2) = a.shape, b.shape
    _require(_number(node, "transB") == 1 and k == k2 and k > 0 and c.shape == (o,) and _static((b, c)))
    _require({each.type for each in inputs} == {a.type} and a.type in FLOATS)
    return [Value(a.type, (n, o), is_static=a.is_static)]


def _axis(node: Node, shape: Shape) -> int:
    """An axis that is not the batch's."""
    axis: int = node.attributes["axis"].value
    _require(0 <= axis < len(shape) and shape[axis] != N)
    return axis


def _concat(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    first = inputs[0]
    axis = _axis(node, first.shape)
    others = {(each.type, each.shape[:axis], each.shape[axis + 1 :]) for each in inputs}
    _require(len(others) == 1 and first.type in FLOATS and all(each.shape[axis] > 0 for each in inputs))
    _require(not any(each.role == "noise" for each in inputs))
    shape = (*first.shape[:axis], sum(each.shape[axis] for each in inputs), *first.shape[axis + 1 :])
    return [Value(first.type, shape, is_static=_static(inputs))]


def _split(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    (x,), count = inputs, _number(node, "num_outputs")
    axis = _axis(node, x.shape)
    _require(2 <= count <= 8 and x.shape[axis] % count == 0 and x.type in FLOATS)
    part = Value(x.type, (*x.shape[:axis], x.shape[axis] // count, *x.shape[axis + 1 :]), is_static=x.is_static)
    return [part] * count


def _slice(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    x, *bounds = inputs
    _require(x.is_static and x.type in FLOATS and all(each.type == INT64 and each.shape == (1,) for each in bounds))
    start, end, axis = (int((each.numbers or ())[0]) for each in bounds)
    _require(0 <= axis < len(x.shape) and 0 <= start < end <= x.shape[axis])
    return [Value(x.type, (*x.shape[:axis], end - start, *x.shape[axis + 1 :]), is_static=True)]


def _unsqueeze(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    x, axes = inputs
    places = [int(axis) for axis in axes.numbers or ()]
    _require(axes.type == INT64 and x.type in FLOATS and len(axes.shape) == 1)
    _require(0 < len(places) == len(set(places)) <= 4 and min(places) > 0)
    sides = iter(x.shape)
    rank = len(x.shape) + len(places)
    _require(max(places) < rank)
    return [Value(x.type, tuple(1 if i in places else next(sides) for i in range(rank)), is_static=x.is_static)]


def _pad(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    x, pads = inputs
    widths = [int(width) for width in pads.numbers or ()]
    rank = len(x.shape)
    _require(pads.type == INT64 and pads.shape == (2 * rank,) and x.type in FLOATS and rank > 0)
    _require(min(widths) >= 0 and max(widths) <= 16)
    added = [widths[i] + widths[i + rank] for i in range(rank)]
    _require(all(not more or side != N for more, side in zip(added, x.shape, strict=True)))
    shape = tuple(side + more for side, more in zip(x.shape, added, strict=True))
    return [Value(x.type, shape, is_static=x.is_static)]


def _resize(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    x, region, scales = inputs
    how = {name: attribute.value for name, attribute in node.attributes.items()}
    _require(how == {"mode": b"nearest", "coordinate_transformation_mode": b"asymmetric", "nearest_mode": b"floor"})
    _require(not region.type and scales.type == FLOAT and scales.numbers in ((1, 1, 2, 2), (1, 2, 2, 1)))
    _require(scales.shape == (4,) and len(x.shape) == 4 and x.type in FLOATS)
    n, *sides = (side * int(scale) for side, scale in zip(x.shape, scales.numbers or (), strict=True))
    return [Value(x.type, (n, *sides), is_static=x.is_static)]


def _expand(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    """Pixels, of which each becomes 2x2: (N,C,H,1,W,1) -> (N,C,H,2,W,2)."""
    x, shape = inputs
    n, c, height, one, width, other = x.shape
    _require(one == other == 1 and shape.numbers == (1, 1, 1, 2, 1, 2) and shape.shape == (6,))
    _require(shape.type == INT64 and x.type in FLOATS)
    return [Value(x.type, (n, c, height, 2, width, 2), is_static=x.is_static)]


def _pool(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    (x,) = inputs
    n, c, height, width = x.shape
    _require(_numbers(node, "kernel_shape", ()) == _numbers(node, "strides", ()) == (2, 2) and x.type in FLOATS)
    return [Value(x.type, (n, c, height // 2, width // 2), is_static=x.is_static)]


def _depth_to_space(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    (x,), block = inputs, _number(node, "blocksize")
    n, c, height, width = x.shape
    _require(2 <= block <= 64 and c % block**2 == 0 and node.attributes["mode"].value in (b"CRD", b"DCR"))
    _require(x.type in FLOATS)
    return [Value(x.type, (n, c // block**2, height * block, width * block), is_static=x.is_static)]


def _normalisation(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    """Instance or batch normalisation, with weights a channel."""
    x, *weights = inputs
    _require(len(x.shape) >= 3 and x.type == FLOAT and _static(weights))
    _require(all(each.type == FLOAT and each.shape == (x.shape[1],) for each in weights))
    epsilon: float = node.attributes["epsilon"].value
    _require(0 <= epsilon < 1)
    return [Value(x.type, x.shape, is_static=x.is_static)]


def _layer_normalisation(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    """Normalisation of the last axis, by weights along it."""
    x, scale = inputs
    _require(x.type == scale.type == FLOAT and len(x.shape) == 3 and scale.shape == x.shape[2:] and scale.is_static)
    epsilon: float = node.attributes["epsilon"].value
    _require(x.shape[2] > 0 and _number(node, "axis") == -1 and 0 <= epsilon < 1)
    return [Value(x.type, x.shape, is_static=x.is_static)]


def _group_normalisation(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    """Normalisation of groups of channels, with weights a channel, as since opset 21."""
    c, groups = inputs[0].shape[1], _number(node, "num_groups")
    _require(0 < groups <= c and c % groups == 0)
    return _normalisation(node, inputs, manifest)


def _softmax(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    _require(_number(node, "axis") == -1 and inputs[0].shape[-1] != N)
    return _same(node, inputs, manifest)


def _reduce(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    x, axes = inputs
    gone = [int(axis) for axis in axes.numbers or ()]
    _require(axes.type == INT64 and len(axes.shape) == 1 and _number(node, "keepdims") == 0 and x.type in FLOATS)
    _require(0 < len(gone) == len(set(gone)) and min(gone) > 0 and max(gone) < len(x.shape) and x.role != "noise")
    return [Value(x.type, tuple(side for i, side in enumerate(x.shape) if i not in gone), is_static=x.is_static)]


def _constant(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    ((name, attribute),) = node.attributes.items()
    if name == "value_float":
        return [Value(FLOAT, (), (attribute.value,), is_static=True)]
    _require(len(attribute.value) <= 16)
    return [Value(INT64, (len(attribute.value),), attribute.value, is_static=True)]


def _skip_scale(node: Node, inputs: list[Value], manifest: Manifest) -> list[Value]:
    x, F, sigma = inputs
    plugin = [node.attributes[name].value for name in ("plugin_namespace", "plugin_version")]
    numbers = [node.attributes[name].value for name in ("sigma_data", "sigma_boundary")]
    _require(plugin == [b"cm", b"1"] and all(map(math.isfinite, numbers)) and x.role != "noise")
    _require(len(x.shape) == 4 and x.shape == F.shape and x.type == FLOAT and F.type in FLOATS)
    _require(sigma.type == FLOAT and (sigma.shape == (1,) or (sigma.shape == (N,) and x.shape[0] == N)))
    return [Value(FLOAT, x.shape, is_static=_static(inputs))]


def _number(node: Node, name: str) -> int:
    value: int = node.attributes[name].value
    return value


def _numbers(node: Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value: tuple[int, ...] = node.attributes[name].value if name in node.attributes else default
    return value


def _rule(apply: Any, inputs: int, *, most: int = 0, optional: Mapping[str, int] | None = None, **needed: int) -> Rule:
    return Rule(apply, inputs, most or inputs, {**needed, **(optional or {})}, frozenset(needed))


RULES: dict[tuple[str, str], Rule] = {
    **{("", kind): _rule(_arithmetic, 2) for kind in ("Add", "Sub", "Mul", "Div", "Pow")},
    **{("", kind): _rule(_comparison, 2) for kind in ("Greater", "LessOrEqual")},
    **{("", kind): _rule(_same, 1) for kind in ("Sqrt", "Log", "Cos", "Sin", "Sigmoid", "Round", "Abs")},
    ("", "Softmax"): _rule(_softmax, 1, axis=AN_INT),
    ("", "Clip"): _rule(_clip, 3),
    ("", "Cast"): _rule(_cast, 1, to=AN_INT),
    ("", "Gather"): _rule(_gather, 2, axis=AN_INT),
    ("", "Reshape"): _rule(_reshape, 2),
    ("", "Transpose"): _rule(_transpose, 1, perm=INTS),
    ("", "Conv"): _rule(_conv, 2, most=3, kernel_shape=INTS, optional={"strides": INTS, "pads": INTS}),
    ("", "MatMul"): _rule(_matmul, 2),
    ("", "Gemm"): _rule(_gemm, 3, transB=AN_INT),
    ("", "Concat"): _rule(_concat, 2, most=8, axis=AN_INT),
    ("", "Split"): _rule(_split, 1, axis=AN_INT, num_outputs=AN_INT),
    ("", "Slice"): _rule(_slice, 4),
    ("", "Unsqueeze"): _rule(_unsqueeze, 2),
    ("", "Pad"): _rule(_pad, 2),
    ("", "Resize"): _rule(_resize, 3, mode=A_STRING, coordinate_transformation_mode=A_STRING, nearest_mode=A_STRING),
    ("", "Expand"): _rule(_expand, 2),
    ("", "AveragePool"): _rule(_pool, 1, kernel_shape=INTS, strides=INTS),
    ("", "DepthToSpace"): _rule(_depth_to_space, 1, blocksize=AN_INT, mode=A_STRING),
    ("", "InstanceNormalization"): _rule(_normalisation, 3, epsilon=A_FLOAT),
    ("", "LayerNormalization"): _rule(_layer_normalisation, 2, axis=AN_INT, epsilon=A_FLOAT),
    ("", "GroupNormalization"): _rule(_group_normalisation, 3, num_groups=AN_INT, epsilon=A_FLOAT),
    ("", "BatchNormalization"): _rule(_normalisation, 5, epsilon=A_FLOAT),
    ("", "ReduceSum"): _rule(_reduce, 2, keepdims=AN_INT),
    (CONTRIB, "NhwcConv"): _rule(_nhwc_conv, 3, kernel_shape=INTS, optional={"strides": INTS, "pads": INTS}),
    (CONTRIB, "GroupNorm"): _rule(
        _group_norm, 3, groups=AN_INT, epsilon=A_FLOAT, activation=AN_INT, channels_last=AN_INT
    ),
    (CONTRIB, "MultiHeadAttention"): _rule(_multi_head_attention, 3, num_heads=AN_INT),
    (CONTRIB, "QuickGelu"): _rule(_quick_gelu, 1, alpha=A_FLOAT),
    ("", "Constant"): _rule(_constant, 0, optional={"value_float": A_FLOAT, "value_ints": INTS}),
    (DOMAIN, NAME): _rule(
        _skip_scale, 3, sigma_data=A_FLOAT, sigma_boundary=A_FLOAT, plugin_namespace=A_STRING, plugin_version=A_STRING
    ),
}
