"""An ``.onnx`` read straight from protobuf, into what a check of its graph needs: no package, and no weights in memory.

Stricter than protobuf, so that no engine reads another graph than the one that was checked: fields that ONNX does not
have, fields of another wire type and scalars that stand twice are refused, and so is all that no image model needs
(subgraphs, sparse tensors, training, devices).
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO, NoReturn

from cm_runtime.errors import ArtifactError
from cm_runtime.files import protobuf, streams
from cm_runtime.files.protobuf import MalformedError
from cm_runtime.onnx_graph.graph import (
    A_TENSOR,
    AN_INT,
    DOUBLE,
    FLOAT,
    INT32,
    INT64,
    INTS,
    ITEM_BITS,
    TENSORS,
    Attribute,
    Function,
    Graph,
    Node,
    Port,
    Tensor,
)

MOST_NODES, MOST_TENSORS = 20_000, 50_000
MOST_FIELDS = 2_000_000  # of all messages that are read whole: seconds
MOST_BYTES = 64 << 20  # of one node or function
SMALL = 4096  # bytes: tensors up to it are read whole, and their numbers are known
_SHORT = 128  # bytes of attributes that are remembered
EXTERNAL = {"location", "offset", "length", "checksum"}

_WIRES = {"v": (0,), "V": (0, 2), "s": (2,), "S": (2,), "f": (5,), "F": (5, 2), "D": (1, 2)}


def _fields(text: str, **reasons: str) -> dict[int, tuple[int, str]]:
    """Fields of a message by tag, out of "1v 2s": v varint, f float, s bytes; repeated V, F, S and D, a double.

    Under the negative number of a field stands its name in errors, if it is refused.
    """
    table = {-int(number[1:]): (0, why) for number, why in reasons.items()}
    for each in text.split():
        number, kind = int(each[:-1]), each[-1]
        table |= {number << 3 | wire: (number, kind) for wire in _WIRES[kind]}
    return table


_INSIDE = "a graph inside a node, as Loop and If have"
_MODEL = _fields("1v 2s 3s 4s 5v 6s 7s 8S 14S 25S", _20="training in it")
_GRAPH = _fields("1S 2s 5S 10s 11S 12S 13S 16S", _15="sparse weights")
_NODE = _fields("1S 2S 3s 4s 5S 6s 7s 9S")
_ATTRIBUTE = _fields("1s 2f 3v 4s 5s 7F 8V 9S 10S 13s 20v 21s", _6=_INSIDE, _11=_INSIDE, _22="sparse weights")
_TENSOR = _fields("1V 2v 4F 5V 6S 7V 8s 9s 10D 11V 12s 13S 14v 16S")
_FUNCTION = _fields("1s 4S 5S 6S 7S 8s 9S 10s 11S 12S 14S")
_VALUE, _TYPE, _TENSOR_TYPE, _SHAPE = _fields("1s 2s 3s 4S"), _fields("1s 6s"), _fields("1v 2s"), _fields("1S")
_OPSET, _ENTRY, _DIMENSION = _fields("1s 2v"), _fields("1s 2s"), _fields("1v 2s 3s")
_DATA = {4: FLOAT, 5: INT32, 6: 8, 7: INT64, 9: 0, 10: DOUBLE, 11: 13}  # fields of a tensor that hold its numbers
_ATTRIBUTE_FIELDS = {1: 2, 2: 3, 3: 4, 4: 5, 6: 7, 7: 8, 8: 9, 9: 10}  # by AttributeProto.AttributeType


def read_graph(model: str | os.PathLike[str] | bytes, where: str) -> Graph:
    """Read the graph of an ``.onnx``, a path or its bytes; errors call it ``where``. Large tensors' data is skipped.

    Raises ArtifactError where it is no ONNX file, is damaged, has more nodes, tensors or fields than any model, or has
    parts that no model of images needs.
    """
    try:
        if isinstance(model, bytes):
            return _Reader(io.BytesIO(model), where).model(len(model))
        with streams.open_file(model, ArtifactError) as file:
            return _Reader(file, where).model(os.fstat(file.fileno()).st_size)
    except (MalformedError, IndexError, struct.error) as error:
        raise ArtifactError(f"{where} is not an ONNX file, or is truncated or damaged ({error})") from error


class _Reader:
    """Reads one file; counts what it reads."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self.file, self.where, self.left = file, where, MOST_FIELDS
        self.attributes: dict[bytes, tuple[str, Attribute]] = {}

    def model(self, size: int) -> Graph:
        """The whole file."""
        if self.file.read(8)[4:] == b"ORTM":  # which ONNX Runtime would read as a format of its own
            raise MalformedError("it begins as an ORT file")
        self.file.seek(0)
        version, opsets, parts, numbers = 0, {}, None, set[int]()
        functions: dict[tuple[str, str], Function] = {}
        for field in protobuf.fields(self.file, size):
            self._check(field, _MODEL, numbers)
            if field.number == 7:
                parts = self._graph(field.payload + field.length)
            elif field.number == 8:
                domain, number = self._opset(self._whole(field))
                if domain in opsets:
                    self._refuse("an operator set twice")
                opsets[domain] = number
            elif field.number == 25:
                key, function = self._function(self._whole(field))
                if key in functions or len(functions) >= MOST_NODES:
                    self._refuse("a function twice")
                functions[key] = function
            elif field.number == 1:
                version = self._parse(self._between(field.start, field.payload), _MODEL)[1]
        if parts is None:
            raise MalformedError("it holds no graph")
        return Graph(version, opsets, *parts, functions)

    def _graph(self, end: int) -> tuple[list[Node], dict[str, Tensor], dict[str, Port], dict[str, Port]]:
        nodes: list[Node] = []
        tensors: dict[str, Tensor] = {}
        ports: dict[int, dict[str, Port]] = {11: {}, 12: {}}
        numbers = set[int]()
        for field in protobuf.fields(self.file, end):
            self._check(field, _GRAPH, numbers)
            if field.number == 1:
                if len(nodes) == MOST_NODES:
                    self._refuse(f"over {MOST_NODES} nodes")
                nodes.append(self._node(self._whole(field)))
            elif field.number == 5:
                tensor = self._tensor(self._whole(field)) if field.length <= SMALL else self._large(field)
                if tensor.name in tensors or len(tensors) == MOST_TENSORS:
                    self._refuse(f"a weight twice, or over {MOST_TENSORS}")
                tensors[tensor.name] = tensor
            elif field.number in ports:
                name, port = self._port(self._whole(field))
                if name in ports[field.number]:
                    self._refuse(f"{name!r} twice")
                ports[field.number][name] = port
        return nodes, tensors, ports[11], ports[12]

    def _check(self, field: protobuf.Field, kinds: Mapping[int, tuple[int, str]], numbers: set[int]) -> None:
        """Refuse a field of no known number, and a scalar that stands twice."""
        self._spend(1)
        number = field.number
        kind = (kinds.get(number << 3 | 2) or kinds.get(number << 3) or self._unknown(number << 3, kinds))[1]
        if kind != "S" and number in numbers:
            self._refuse(f"field {number} twice")
        numbers.add(number)

    def _node(self, content: bytes) -> Node:
        fields = self._parse(content, _NODE)
        attributes: dict[str, Attribute] = {}
        for each in fields.get(5, ()):
            name, attribute = self._attribute(each)
            if name in attributes:
                self._refuse(f"an attribute {name!r} twice")
            attributes[name] = attribute
        domain = _text(fields.get(7, b""))
        inputs, outputs = (tuple(map(_text, fields.get(i, ()))) for i in (1, 2))
        return Node("" if domain == "ai.onnx" else domain, _text(fields.get(4, b"")), inputs, outputs, attributes)

    def _attribute(self, content: bytes) -> tuple[str, Attribute]:
        pair = self.attributes.get(content)  # most are as another's
        if pair is None:
            pair = self._new_attribute(content)
            if len(content) < _SHORT:
                self.attributes[content] = pair
        return pair

    def _new_attribute(self, content: bytes) -> tuple[str, Attribute]:
        fields = self._parse(content, _ATTRIBUTE)
        kind = fields.get(20, 0)
        number = _ATTRIBUTE_FIELDS.get(kind)
        if number is None or any(other in fields for other in _ATTRIBUTE_FIELDS.values() if other != number):
            self._refuse("an attribute of no type, or of two")
        value = fields.get(number)
        if kind == AN_INT:
            value = _to_signed(value or 0)
        elif kind == A_TENSOR:
            value = self._tensor(value or b"")
        elif kind == INTS:
            value = tuple(map(_to_signed, value or ()))
        elif kind == TENSORS:
            value = tuple(map(self._tensor, value or ()))
        elif isinstance(value, list):
            value = tuple(value)
        return _text(fields.get(1, b"")), Attribute(kind, value, _text(fields.get(21, b"")))

    def _function(self, content: bytes) -> tuple[tuple[str, str], Function]:
        fields = self._parse(content, _FUNCTION)
        nodes = tuple(map(self._node, fields.get(7, ())))
        opsets = dict(map(self._opset, fields.get(9, ())))
        inputs, outputs, attributes = (tuple(map(_text, fields.get(i, ()))) for i in (4, 5, 6))
        key = _text(fields.get(10, b"")), _text(fields.get(1, b""))
        return key, Function(inputs, outputs, attributes, len(fields.get(11, ())), nodes, opsets)

    def _opset(self, content: bytes) -> tuple[str, int]:
        fields = self._parse(content, _OPSET)
        domain = _text(fields.get(1, b""))
        return "" if domain == "ai.onnx" else domain, _to_signed(fields.get(2, 0))

    def _port(self, content: bytes) -> tuple[str, Port]:
        fields = self._parse(content, _VALUE)
        inside = self._parse(self._parse(fields.get(2, b""), _TYPE).get(1, b""), _TENSOR_TYPE)
        dims: list[int | str | None] | None = None
        if 2 in inside:
            dims = []
            for each in self._parse(inside[2], _SHAPE).get(1, ()):
                side = self._parse(each, _DIMENSION)
                dims.append(_to_signed(side[1]) if 1 in side else _text(side[2]) if 2 in side else None)
        return _text(fields.get(1, b"")), Port(inside.get(1, 0), None if dims is None else tuple(dims))

    def _tensor(self, content: bytes) -> Tensor:
        return self._build_tensor(self._parse(content, _TENSOR), len(content) <= SMALL)

    def _large(self, field: protobuf.Field) -> Tensor:
        """An initializer whose numbers are skipped."""
        lengths: dict[int, Any] = {}
        rest = bytearray()
        for part in protobuf.fields(self.file, field.payload + field.length):
            head = self._between(part.start, part.payload)
            is_delimited, holds_numbers = head[0] & 7 == 2, part.number in _DATA
            if is_delimited and holds_numbers and part.number not in lengths:
                lengths[part.number] = part.length
                continue
            if is_delimited and (holds_numbers or part.length > SMALL // 2):
                self._refuse("a weight in too many pieces")
            rest += head + self.file.read(part.length)
            if len(rest) > SMALL * 16:
                raise MalformedError("a weight runs past its end")
        return self._build_tensor(lengths | self._parse(bytes(rest), _TENSOR), is_small=False)

    def _build_tensor(self, fields: dict[int, Any], is_small: bool) -> Tensor:
        name, kind = _text(fields.get(8, b"")), fields.get(2, 0)
        dims = tuple(map(_to_signed, fields.get(1, ())))
        if kind not in ITEM_BITS or len(dims) > 16 or any(not 0 <= side < 1 << 40 for side in dims):
            self._refuse(f"a tensor {name!r} of no known type or shape")
        places = [number for number in _DATA if number in fields]
        location = fields.get(14, 0)
        if len(places) > 1 or location not in (0, 1) or (13 in fields) != (location == 1) or (places and location):
            self._refuse(f"a tensor {name!r} whose numbers are nowhere, or in two places")
        if location:
            return Tensor(name, kind, dims, None, None, self._place(fields[13], name))
        raw = fields.get(9)
        count = raw if isinstance(raw, int) else len(raw) if raw is not None else None
        if count is not None and count != (math.prod(dims) * ITEM_BITS[kind] + 7) // 8:
            self._refuse(f"a tensor {name!r} of {count} bytes, which are not as many as its shape says")
        numbers = _numbers(kind, math.prod(dims), fields) if is_small else None
        return Tensor(name, kind, dims, numbers, count, None)

    def _place(self, entries: list[bytes], name: str) -> dict[str, str]:
        place: dict[str, str] = {}
        for entry in entries:
            fields = self._parse(entry, _ENTRY)
            key = _text(fields.get(1, b""))
            if key in place or key not in EXTERNAL:
                self._refuse(f"a tensor {name!r} with {key!r} twice, or for no purpose")
            place[key] = _text(fields.get(2, b""))
        return place

    def _whole(self, field: protobuf.Field) -> bytes:
        if field.length > MOST_BYTES:
            self._refuse(f"a part of {field.length} bytes")
        return self.file.read(field.length)

    def _between(self, start: int, stop: int) -> bytes:
        here = self.file.tell()
        self.file.seek(start)
        content = self.file.read(stop - start)
        self.file.seek(here)
        return content

    def _parse(self, content: bytes, kinds: Mapping[int, tuple[int, str]]) -> dict[int, Any]:
        """A message's fields by number; a list where they are repeated."""
        fields: dict[int, Any] = {}
        at, end, count = 0, len(content), 0
        while at < end:
            count += 1
            tag = content[at]
            at += 1
            if tag > 0x7F:
                tag, at = _varint(content, at - 1)
            number, kind = kinds.get(tag) or self._unknown(tag, kinds)
            value: Any
            if tag & 7 == 2:
                length = content[at]
                at += 1
                if length > 0x7F:
                    length, at = _varint(content, at - 1)
                start, at = at, at + length
                if at > end:
                    raise MalformedError(f"a field of {length} bytes runs past its end")
                value = content[start:at]
            elif tag & 7 == 0:
                value = content[at]
                at += 1
                if value > 0x7F:
                    value, at = _varint(content, at - 1)
            else:
                start, at = at, at + (8 if tag & 7 == 1 else 4)
                value = content[start:at]
            if kind == "S" or (kind == "V" and tag & 7 == 0):
                fields.setdefault(number, []).append(value)
            elif kind in "VFD":
                fields.setdefault(number, []).extend(self._unpack(kind, value))
            elif number in fields:
                self._refuse(f"field {number} of a part twice")
            else:
                fields[number] = struct.unpack("<f", value)[0] if kind == "f" else value
        self._spend(count)
        return fields

    def _unknown(self, tag: int, kinds: Mapping[int, tuple[int, str]]) -> tuple[int, str]:
        reason = kinds.get(-(tag >> 3), (0, ""))[1]
        self._refuse(reason or f"a field of number {tag >> 3} and type {tag & 7}")

    def _unpack(self, kind: str, content: bytes) -> list[Any]:
        if kind == "F":
            return list(struct.unpack(f"<{len(content) // 4}f", content))
        if kind == "D":
            return [content]
        values, at = [], 0
        while at < len(content):
            value, at = _varint(content, at)
            values.append(value)
        self._spend(len(values))
        return values

    def _spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            self._refuse(f"over {MOST_FIELDS} fields")

    def _refuse(self, part: str) -> NoReturn:
        raise ArtifactError(f"{self.where}: its graph has {part}, as no model of images has")


def _numbers(kind: int, count: int, fields: Mapping[int, Any]) -> tuple[float, ...] | None:
    """A small tensor's numbers, raw or not; None of other types, or if they are too few."""
    code, number = {FLOAT: ("f", 4), INT64: ("q", 7), INT32: ("i", 5)}.get(kind, ("", 0))
    if not code or count > SMALL:
        return None
    if 9 in fields:
        return struct.unpack(f"<{count}{code}", fields[9])
    values = fields.get(number, ())
    values = tuple(values if kind == FLOAT else map(_to_signed, values))
    return values if len(values) == count else None


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = content[at]
    at += 1
    if value < 0x80:
        return value, at
    value &= 0x7F
    for shift in range(7, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
    raise MalformedError("a number has too many bytes")


def _to_signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _text(content: bytes) -> str:
    """Text that is another for other bytes, whatever they are."""
    return content.decode(errors="surrogateescape")
