"""The graphs that `export` writes, and no others: each operator with the attributes, types and shapes it has there.

All is known before an engine sees the file: N is the one dimension that is open, and stands first; every index is a
constant or a label; every shape is a constant that fits. So no engine computes an address from a number of the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from cm_runtime.manifest import Manifest
from cm_runtime.onnx_graph import skip_scale
from cm_runtime.onnx_graph.graph import BFLOAT, BOOL, FLOAT, HALF, INT64, UINT8, Graph, Node, Port
from cm_runtime.onnx_graph.rules import CONTRIB, FLOATS, RULES, N, NotOwn, Shape, Value
from cm_runtime.onnx_graph.skip_scale import DOMAIN, NAME

IR_VERSIONS, OPSETS = range(8, 12), (20, 22)
TYPES = {"fp32": FLOAT, "fp16": HALF, "bf16": BFLOAT}
MOST_ELEMENTS = 1 << 28  # of one value, for one image
MOST_ALIVE = 1 << 15  # elements for each pixel of an image that must be in memory together
FEWEST_ALIVE = 1 << 22  # below which that does not count
MOST_MADE = 64  # times the weights: what is computed of weights alone


def check(graph: Graph, manifest: Manifest) -> None:
    """Raise NotOwn where ``graph`` is not what `export` writes for ``manifest``."""
    if graph.ir_version not in IR_VERSIONS or graph.opsets.get("") not in OPSETS:
        raise NotOwn(f"its version of ONNX is {graph.ir_version} with operators of {graph.opsets.get('')}")
    domains = {"", DOMAIN} | ({CONTRIB} if manifest.target == "cuda" else set())
    if not graph.opsets.keys() <= domains or {graph.opsets.get(each, 1) for each in domains - {""}} != {1}:
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
    ports: dict[str, tuple[int, Shape]]
    if manifest.graph == "sampler":
        ports = {"noise": (FLOAT, (manifest.steps, N, *image))}
    elif manifest.graph == "network":
        ports = {"x_in": (TYPES[manifest.precision], (N, *image)), "c_noise": (FLOAT, (N,))}
    else:
        ports = {"x": (FLOAT, (N, *image)), "sigma": (FLOAT, (N,))}
    if manifest.num_classes:
        ports["label"] = INT64, (N,)
    return {name: Value(kind, shape, role=name) for name, (kind, shape) in ports.items()}


def outputs(manifest: Manifest) -> dict[str, Value]:
    """The outputs of a graph; ``finite`` need not be there."""
    channels, height, width = manifest.image_shape
    if manifest.graph == "sampler":
        return {"images": Value(UINT8, (N, height, width, channels)), "finite": Value(BOOL, (N,))}
    name = "F" if manifest.graph == "network" else "denoised"
    return {name: Value(FLOAT, (N, *manifest.image_shape))}


def _interface(ports: Mapping[str, Port], declared: Mapping[str, Value]) -> dict[str, Value]:
    if ports.keys() != declared.keys():
        raise NotOwn("its inputs and outputs are not those of its manifest")
    names = set()
    for name, port in ports.items():
        value, dims = declared[name], port.dims
        if dims is None or len(dims) != len(value.shape) or port.type != value.type:
            raise NotOwn(f"{name!r} is not what its manifest says")
        for side, size in zip(dims, value.shape, strict=True):
            if size == N and isinstance(side, str) and side:
                names.add(side)
            elif side != size or isinstance(side, str):
                raise NotOwn(f"{name!r} is not of the shape that its manifest says")
    if len(names) != 1:
        raise NotOwn("its batch has two names")
    return {name: declared[name] for name in ports}


def _check_outputs(ports: Mapping[str, Port], values: Mapping[str, Value], manifest: Manifest) -> None:
    declared = outputs(manifest)
    if "finite" not in ports:
        declared.pop("finite", None)
    _interface(ports, declared)
    for name, value in declared.items():
        output = values.get(name)
        if output is None or output.role or (output.type, output.shape) != (value.type, value.shape):
            raise NotOwn(f"{name!r} is not made as its manifest says")


def _check_memory(graph: Graph, values: Mapping[str, Value], manifest: Manifest) -> None:
    """Bound the numbers that must be in memory together for one image, in the order of the nodes."""
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
    """The outputs of one node."""
    kind = f"{node.domain}::{node.kind}" if node.domain else node.kind
    rule = RULES.get((node.domain, node.kind))
    if rule is None or (node.domain == DOMAIN and not graph.functions):
        raise NotOwn(f"it has the operator {kind}")
    if not rule.fewest <= len(node.inputs) <= rule.most or not rule.required <= node.attributes.keys():
        raise NotOwn(f"a {kind} has inputs or attributes of another number")
    for name, attribute in node.attributes.items():
        if rule.attributes.get(name) != attribute.type or attribute.reference:
            raise NotOwn(f"a {kind} has the attribute {name!r}")
    arguments = []
    for name in node.inputs:
        if name not in values and not (node.kind == "Resize" and not name):
            raise NotOwn(f"a {kind} takes {name!r}, which nothing before it makes")
        arguments.append(values[name] if name else Value(0, ()))
    try:
        outputs = rule.apply(node, arguments, manifest)
    except (IndexError, ValueError, TypeError) as error:
        raise NotOwn(f"a {kind} takes inputs of other shapes") from error
    if len(outputs) != len(node.outputs):
        raise NotOwn(f"a {kind} makes {len(node.outputs)} values")
    for value in outputs:
        sides = value.shape[1:] if value.shape and value.shape[0] == N else value.shape
        if any(side < 1 for side in sides) or math.prod(sides) > MOST_ELEMENTS:
            raise NotOwn(f"a {kind} makes a value of shape {_text(value.shape)}")
    if all(value.is_static for value in arguments) and any(N in value.shape for value in outputs):
        raise NotOwn(f"a {kind} makes a batch of constants")
    return outputs


def _text(shape: Shape) -> str:
    return f"({', '.join('N' if side == N else str(side) for side in shape)})"
