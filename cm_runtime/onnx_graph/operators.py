"""The graphs that `export` writes, and no others: each operator with the attributes, types and shapes it has there.

All is known before an engine sees the file: N is the one dimension that is open, and stands first; every index is a
constant or a label; every shape is a constant that fits. So no engine computes an address from a number of the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from cm_runtime.errors.wording import quantity
from cm_runtime.manifest import Manifest
from cm_runtime.onnx_graph import skip_scale
from cm_runtime.onnx_graph.message import (
    BFLOAT,
    BOOL,
    FLOAT,
    HALF,
    INT64,
    UINT8,
    Graph,
    Node,
    Port,
)
from cm_runtime.onnx_graph.skip_scale import DOMAIN, NAME

N = -1  # the batch, as a dimension
IR_VERSIONS, OPSETS = range(8, 12), (20, 22)
FLOATS = (FLOAT, HALF, BFLOAT)
TYPES = {"fp32": FLOAT, "fp16": HALF, "bf16": BFLOAT}
MOST_ELEMENTS = 1 << 28  # of one value, for one image
MOST_ALIVE = 1 << 15  # elements for each pixel of an image that must be in memory together
FEWEST_ALIVE = 1 << 22  # below which that does not count
MOST_MADE = 64  # times the weights: what is computed of weights alone

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
    """What one operator may be: its number of inputs, its attributes' types, and what it makes."""

    apply: Callable[[Node, list[Value], Manifest], list[Value]]
    fewest: int
    most: int
    attributes: Mapping[str, int]  # by AttributeProto.AttributeType
    required: frozenset[str]


def check(graph: Graph, manifest: Manifest) -> None:
    """Check that ``graph`` is what `export` writes for ``manifest``.

    Args:
        graph: The graph.
        manifest: What its file says of itself.

    Raises:
        NotOwn: It is not.
    """
    if graph.ir_version not in IR_VERSIONS or graph.opsets.get("") not in OPSETS:
        raise NotOwn(f"its version of ONNX is {graph.ir_version} with operators of {graph.opsets.get('')}")
    if not graph.opsets.keys() <= {"", DOMAIN} or graph.opsets.get(DOMAIN, 1) != 1:
        raise NotOwn("it has operators of another domain")
    if graph.functions and graph.functions != {(DOMAIN, NAME): skip_scale.function(graph.opsets[""])}:
        raise NotOwn("it has a local function that is not cm::SkipScale")
    values = _constants(graph)
    weights = sum(math.prod(value.shape) for value in values.values())
    for name, value in _interface(graph.inputs, inputs(manifest)).items():
        if name in values:
            raise NotOwn(f"{name!r} is an input and a weight")
        values[name] = value
    budget = MOST_MADE * weights + (1 << 20)
    for node in graph.nodes:
        for name, value in zip(node.outputs, _apply(node, values, manifest, graph), strict=True):
            if not name or name in values:
                raise NotOwn(f"{name!r} is made twice")
            if N not in value.shape:
                budget -= math.prod(value.shape)
            values[name] = value
    if budget < 0:
        raise NotOwn("it computes too much of its weights alone")
    _check_outputs(graph.outputs, values, manifest)
    _check_memory(graph, values, manifest)


def inputs(manifest: Manifest) -> dict[str, Value]:
    """The inputs of a graph."""
    image = manifest.image_shape
    found: dict[str, tuple[int, Shape]]
    if manifest.graph == "sampler":
        found = {"noise": (FLOAT, (manifest.steps, N, *image))}
    elif manifest.graph == "network":
        found = {"x_in": (TYPES[manifest.precision], (N, *image)), "c_noise": (FLOAT, (N,))}
    else:
        found = {"x": (FLOAT, (N, *image)), "sigma": (FLOAT, (N,))}
    if manifest.num_classes:
        found["label"] = INT64, (N,)
    return {name: Value(kind, shape, role=name) for name, (kind, shape) in found.items()}


def outputs(manifest: Manifest) -> dict[str, Value]:
    """The outputs of a graph; ``finite`` need not be there."""
    channels, height, width = manifest.image_shape
    if manifest.graph == "sampler":
        return {"images": Value(UINT8, (N, height, width, channels)), "finite": Value(BOOL, (N,))}
    name = "F" if manifest.graph == "network" else "denoised"
    return {name: Value(FLOAT, (N, *manifest.image_shape))}


def _interface(ports: Mapping[str, Port], wanted: Mapping[str, Value]) -> dict[str, Value]:
    if ports.keys() != wanted.keys():
        raise NotOwn("its inputs and outputs are not those of its manifest")
    names = set()
    for name, port in ports.items():
        value, dims = wanted[name], port.dims
        if dims is None or len(dims) != len(value.shape) or port.type != value.type:
            raise NotOwn(f"{name!r} is not what its manifest says")
        for side, expected in zip(dims, value.shape, strict=True):
            if expected == N and isinstance(side, str) and side:
                names.add(side)
            elif side != expected or isinstance(side, str):
                raise NotOwn(f"{name!r} is not of the shape that its manifest says")
    if len(names) != 1:
        raise NotOwn("its batch has two names")
    return {name: wanted[name] for name in ports}


def _check_outputs(ports: Mapping[str, Port], values: Mapping[str, Value], manifest: Manifest) -> None:
    wanted = outputs(manifest)
    if "finite" not in ports:
        wanted.pop("finite", None)
    _interface(ports, wanted)
    for name, value in wanted.items():
        made = values.get(name)
        if made is None or made.role or (made.type, made.shape) != (value.type, value.shape):
            raise NotOwn(f"{name!r} is not made as its manifest says")


def _check_memory(graph: Graph, values: Mapping[str, Value], manifest: Manifest) -> None:
    """What must be in memory together for one image, in the order of the nodes."""
    _, height, width = manifest.image_shape
    alive = graph.most_alive({name: _elements(value.shape) for name, value in values.items()})
    if alive > max(FEWEST_ALIVE, MOST_ALIVE * height * width):
        raise NotOwn(f"it takes memory for {alive} numbers an image")


def _elements(shape: Shape) -> int:
    """For each image; 0 of what is of weights alone."""
    return -math.prod(shape) if N in shape else 0


def _constants(graph: Graph) -> dict[str, Value]:
    values = {}
    for name, tensor in graph.tensors.items():
        if tensor.type not in (*FLOATS, INT64) or (tensor.bytes is None and tensor.external is None):
            raise NotOwn(f"its weight {name!r} is not stored as such")
        if not name or any(side < 1 for side in tensor.dims) or (tensor.type == INT64 and tensor.numbers is None):
            raise NotOwn(f"its weight {name!r} is not of a shape as such")
        numbers = None if tensor.numbers is None else tuple(tensor.numbers)
        values[name] = Value(tensor.type, tensor.dims, numbers, is_static=True)
    return values


def _apply(node: Node, values: Mapping[str, Value], manifest: Manifest, graph: Graph) -> list[Value]:
    """What one node makes."""
    called = f"{node.domain}::{node.kind}" if node.domain else node.kind
    rule = _RULES.get((node.domain, node.kind))
    if rule is None or (node.domain == DOMAIN and not graph.functions):
        raise NotOwn(f"it has the operator {called}")
    if not rule.fewest <= len(node.inputs) <= rule.most or not rule.required <= node.attributes.keys():
        raise NotOwn(f"a {called} has inputs or attributes of another number")
    for name, attribute in node.attributes.items():
        if rule.attributes.get(name) != attribute.type or attribute.reference:
            raise NotOwn(f"a {called} has the attribute {name!r}")
    taken = []
    for name in node.inputs:
        if name not in values and not (node.kind == "Resize" and not name):
            raise NotOwn(f"a {called} takes {name!r}, which nothing before it makes")
        taken.append(values[name] if name else Value(0, ()))
    try:
        made = rule.apply(node, taken, manifest)
    except (IndexError, ValueError, TypeError) as error:
        raise NotOwn(f"a {called} takes inputs of other shapes") from error
    if len(made) != len(node.outputs):
        raise NotOwn(f"a {called} makes {len(node.outputs)} values")
    for value in made:
        sides = value.shape[1:] if value.shape and value.shape[0] == N else value.shape
        if any(side < 1 for side in sides) or math.prod(sides) > MOST_ELEMENTS:
            raise NotOwn(f"a {called} makes a value of shape {_shown(value.shape)}")
    if all(value.is_static for value in taken) and any(N in value.shape for value in made):
        raise NotOwn(f"a {called} makes a batch of constants")
    return made


def _shown(shape: Shape) -> str:
    return f"({', '.join('N' if side == N else str(side) for side in shape)})"


def _require(is_so: bool) -> None:
    """A rule that is not kept."""
    if not is_so:
        raise ValueError


# Rules


def broadcast(shapes: Iterable[Shape]) -> Shape:
    """The shape that values of these make together. Raises ValueError."""
    found: list[int] = []
    for shape in shapes:
        padded = [1] * (len(shape) - len(found)) + found
        offset = len(padded) - len(shape)
        for i, side in enumerate(shape, offset):
            if padded[i] == 1:
                padded[i] = side
            elif side != 1 and side != padded[i]:
                raise ValueError
        found = padded
    return tuple(found)


def _static(taken: Iterable[Value]) -> bool:
    return all(value.is_static for value in taken)


def _arithmetic(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    a, b = taken
    _require(a.type == b.type and a.type in FLOATS)
    return [Value(a.type, broadcast((a.shape, b.shape)), is_static=_static(taken))]


def _comparison(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    return [made._replace(type=BOOL) for made in _arithmetic(node, taken, manifest)]


def _same(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    x = taken[0]
    _require(x.type in FLOATS)
    return [Value(x.type, x.shape, is_static=x.is_static)]


def _clip(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    x, low, high = taken
    _require(x.type == low.type == high.type and low.shape == high.shape == () and _static((low, high)))
    return _same(node, taken, manifest)


def _cast(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    x, to = taken[0], node.attributes["to"].value
    _require((x.type in (*FLOATS, BOOL) and to in FLOATS) or (x.type == FLOAT and to == UINT8))
    return [Value(to, x.shape, is_static=x.is_static)]


def _gather(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    """A row of a table by label, or the noise of one step."""
    data, index = taken
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


def _reshape(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    x, shape = taken
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


def _transpose(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    x, order = taken[0], node.attributes["perm"].value
    _require(sorted(order) == list(range(len(x.shape))) and x.type in FLOATS)
    return [Value(x.type, tuple(x.shape[i] for i in order), is_static=x.is_static)]


def _conv(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    x, w, *bias = taken
    n, c, *size = x.shape
    o, i, *kernel = w.shape
    strides, pads = _numbers(node, "strides", (1, 1)), _numbers(node, "pads", (0,) * 4)
    _require(len(size) == len(kernel) == len(strides) == 2 and len(pads) == 4 and _static((w, *bias)))
    _require(_numbers(node, "kernel_shape", ()) == tuple(kernel) and i == c and c > 0 and x.type in FLOATS)
    _require(all(b.shape == (o,) for b in bias) and {each.type for each in taken} == {x.type})
    _require(all(1 <= s <= 16 for s in strides) and all(0 <= p < max(kernel) for p in pads))
    out = [(size[d] + pads[d] + pads[d + 2] - kernel[d]) // strides[d] + 1 for d in (0, 1)]
    return [Value(x.type, (n, o, *out), is_static=x.is_static)]


def _matmul(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    a, b = taken
    (*batch, m, k), (*other, k2, n) = a.shape, b.shape
    _require(batch == other and k == k2 and min(m, k, n) > 0 and a.type == b.type and a.type in FLOATS)
    return [Value(a.type, (*batch, m, n), is_static=_static(taken))]


def _gemm(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    a, b, c = taken
    (n, k), (o, k2) = a.shape, b.shape
    _require(_number(node, "transB") == 1 and k == k2 and k > 0 and c.shape == (o,) and _static((b, c)))
    _require({each.type for each in taken} == {a.type} and a.type in FLOATS)
    return [Value(a.type, (n, o), is_static=a.is_static)]


def _axis(node: Node, shape: Shape) -> int:
    """An axis that is not the batch's."""
    axis: int = node.attributes["axis"].value
    _require(0 <= axis < len(shape) and shape[axis] != N)
    return axis


def _concat(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    first = taken[0]
    axis = _axis(node, first.shape)
    others = {(each.type, each.shape[:axis], each.shape[axis + 1 :]) for each in taken}
    _require(len(others) == 1 and first.type in FLOATS and all(each.shape[axis] > 0 for each in taken))
    _require(not any(each.role == "noise" for each in taken))
    shape = (*first.shape[:axis], sum(each.shape[axis] for each in taken), *first.shape[axis + 1 :])
    return [Value(first.type, shape, is_static=_static(taken))]


def _split(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    (x,), count = taken, _number(node, "num_outputs")
    axis = _axis(node, x.shape)
    _require(2 <= count <= 8 and x.shape[axis] % count == 0 and x.type in FLOATS)
    part = Value(x.type, (*x.shape[:axis], x.shape[axis] // count, *x.shape[axis + 1 :]), is_static=x.is_static)
    return [part] * count


def _slice(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    x, *bounds = taken
    _require(x.is_static and x.type in FLOATS and all(each.type == INT64 and each.shape == (1,) for each in bounds))
    start, end, axis = (int((each.numbers or ())[0]) for each in bounds)
    _require(0 <= axis < len(x.shape) and 0 <= start < end <= x.shape[axis])
    return [Value(x.type, (*x.shape[:axis], end - start, *x.shape[axis + 1 :]), is_static=True)]


def _unsqueeze(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    x, axes = taken
    places = [int(axis) for axis in axes.numbers or ()]
    _require(axes.type == INT64 and x.type in FLOATS and len(axes.shape) == 1)
    _require(0 < len(places) == len(set(places)) <= 4 and min(places) > 0)
    sides = iter(x.shape)
    rank = len(x.shape) + len(places)
    _require(max(places) < rank)
    return [Value(x.type, tuple(1 if i in places else next(sides) for i in range(rank)), is_static=x.is_static)]


def _pad(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    x, pads = taken
    widths = [int(width) for width in pads.numbers or ()]
    rank = len(x.shape)
    _require(pads.type == INT64 and pads.shape == (2 * rank,) and x.type in FLOATS and rank > 0)
    _require(min(widths) >= 0 and max(widths) <= 16)
    added = [widths[i] + widths[i + rank] for i in range(rank)]
    _require(all(not more or side != N for more, side in zip(added, x.shape, strict=True)))
    shape = tuple(side + more for side, more in zip(x.shape, added, strict=True))
    return [Value(x.type, shape, is_static=x.is_static)]


def _resize(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    x, region, scales = taken
    how = {name: attribute.value for name, attribute in node.attributes.items()}
    _require(how == {"mode": b"nearest", "coordinate_transformation_mode": b"asymmetric", "nearest_mode": b"floor"})
    _require(not region.type and scales.type == FLOAT and scales.numbers == (1, 1, 2, 2) and x.type in FLOATS)
    n, c, height, width = x.shape
    _require(scales.shape == (4,))
    return [Value(x.type, (n, c, 2 * height, 2 * width), is_static=x.is_static)]


def _pool(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    (x,) = taken
    n, c, height, width = x.shape
    _require(_numbers(node, "kernel_shape", ()) == _numbers(node, "strides", ()) == (2, 2) and x.type in FLOATS)
    return [Value(x.type, (n, c, height // 2, width // 2), is_static=x.is_static)]


def _depth_to_space(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    (x,), block = taken, _number(node, "blocksize")
    n, c, height, width = x.shape
    _require(2 <= block <= 64 and c % block**2 == 0 and node.attributes["mode"].value in (b"CRD", b"DCR"))
    _require(x.type in FLOATS)
    return [Value(x.type, (n, c // block**2, height * block, width * block), is_static=x.is_static)]


def _normalisation(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    """Of instances or batches: weights a channel."""
    x, *weights = taken
    _require(len(x.shape) >= 3 and x.type == FLOAT and _static(weights))
    _require(all(each.type == FLOAT and each.shape == (x.shape[1],) for each in weights))
    epsilon: float = node.attributes["epsilon"].value
    _require(0 <= epsilon < 1)
    return [Value(x.type, x.shape, is_static=x.is_static)]


def _softmax(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    _require(_number(node, "axis") == -1 and taken[0].shape[-1] != N)
    return _same(node, taken, manifest)


def _reduce(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    x, axes = taken
    gone = [int(axis) for axis in axes.numbers or ()]
    _require(axes.type == INT64 and len(axes.shape) == 1 and _number(node, "keepdims") == 0 and x.type in FLOATS)
    _require(0 < len(gone) == len(set(gone)) and min(gone) > 0 and max(gone) < len(x.shape) and x.role != "noise")
    return [Value(x.type, tuple(side for i, side in enumerate(x.shape) if i not in gone), is_static=x.is_static)]


def _constant(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    ((name, attribute),) = node.attributes.items()
    if name == "value_float":
        return [Value(FLOAT, (), (attribute.value,), is_static=True)]
    _require(len(attribute.value) <= 16)
    return [Value(INT64, (len(attribute.value),), attribute.value, is_static=True)]


def _skip_scale(node: Node, taken: list[Value], manifest: Manifest) -> list[Value]:
    x, F, sigma = taken
    plugin = [node.attributes[name].value for name in ("plugin_namespace", "plugin_version")]
    numbers = [node.attributes[name].value for name in ("sigma_data", "sigma_boundary")]
    _require(plugin == [b"cm", b"1"] and all(map(math.isfinite, numbers)) and x.role != "noise")
    _require(len(x.shape) == 4 and x.shape == F.shape and x.type == FLOAT and F.type in FLOATS)
    _require(sigma.type == FLOAT and (sigma.shape == (1,) or (sigma.shape == (N,) and x.shape[0] == N)))
    return [Value(FLOAT, x.shape, is_static=_static(taken))]


def _number(node: Node, name: str) -> int:
    value: int = node.attributes[name].value
    return value


def _numbers(node: Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value: tuple[int, ...] = node.attributes[name].value if name in node.attributes else default
    return value


_F, _I, _S, _IS = 1, 2, 3, 7  # AttributeProto.AttributeType: a float, an integer, a string, integers


def _rule(apply: Any, inputs: int, *, most: int = 0, optional: Mapping[str, int] | None = None, **needed: int) -> Rule:
    return Rule(apply, inputs, most or inputs, {**needed, **(optional or {})}, frozenset(needed))


_RULES: dict[tuple[str, str], Rule] = {
    **{("", kind): _rule(_arithmetic, 2) for kind in ("Add", "Sub", "Mul", "Div", "Pow")},
    **{("", kind): _rule(_comparison, 2) for kind in ("Greater", "LessOrEqual")},
    **{("", kind): _rule(_same, 1) for kind in ("Sqrt", "Log", "Cos", "Sin", "Sigmoid", "Round", "Abs")},
    ("", "Softmax"): _rule(_softmax, 1, axis=_I),
    ("", "Clip"): _rule(_clip, 3),
    ("", "Cast"): _rule(_cast, 1, to=_I),
    ("", "Gather"): _rule(_gather, 2, axis=_I),
    ("", "Reshape"): _rule(_reshape, 2),
    ("", "Transpose"): _rule(_transpose, 1, perm=_IS),
    ("", "Conv"): _rule(_conv, 2, most=3, kernel_shape=_IS, optional={"strides": _IS, "pads": _IS}),
    ("", "MatMul"): _rule(_matmul, 2),
    ("", "Gemm"): _rule(_gemm, 3, transB=_I),
    ("", "Concat"): _rule(_concat, 2, most=8, axis=_I),
    ("", "Split"): _rule(_split, 1, axis=_I, num_outputs=_I),
    ("", "Slice"): _rule(_slice, 4),
    ("", "Unsqueeze"): _rule(_unsqueeze, 2),
    ("", "Pad"): _rule(_pad, 2),
    ("", "Resize"): _rule(_resize, 3, mode=_S, coordinate_transformation_mode=_S, nearest_mode=_S),
    ("", "AveragePool"): _rule(_pool, 1, kernel_shape=_IS, strides=_IS),
    ("", "DepthToSpace"): _rule(_depth_to_space, 1, blocksize=_I, mode=_S),
    ("", "InstanceNormalization"): _rule(_normalisation, 3, epsilon=_F),
    ("", "BatchNormalization"): _rule(_normalisation, 5, epsilon=_F),
    ("", "ReduceSum"): _rule(_reduce, 2, keepdims=_I),
    ("", "Constant"): _rule(_constant, 0, optional={"value_float": _F, "value_ints": _IS}),
    (DOMAIN, NAME): _rule(_skip_scale, 3, sigma_data=_F, sigma_boundary=_F, plugin_namespace=_S, plugin_version=_S),
}
