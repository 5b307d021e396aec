"""Pickles of tensors, followed opcode by opcode before anything is built: no code, no bombs, no false claims.

torch's restricted unpickler runs no code of a file, yet calls what takes memory (``bytearray``), builds tensors that
claim more than the file holds (views of stride 0) and hashes tuples of any depth. So a pickle is followed on a stack of
descriptions first. What remains are texts, numbers, lists, mappings and dense tensors, no larger than their file.
"""

from __future__ import annotations

import math
import pickle
import pickletools
from dataclasses import dataclass, field
from typing import IO, Any

MOST_BYTES = 1 << 24  # of the instructions; those of a training state of 300 million weights are some MB
MOST_STEPS = 1_000_000
MOST_NODES = 1_000_000  # of what a pickle holds, shared parts counted where they are used, 64 letters as one
MOST_LEVELS = 100
MOST_DIMENSIONS = 64
SHARED = 4  # tensors may claim so many times their file's bytes: tied weights are stored once

# Bytes of an element, by the storage's class.
STORAGES = {
    "torch ByteStorage": 1,
    "torch CharStorage": 1,
    "torch BoolStorage": 1,
    "torch HalfStorage": 2,
    "torch BFloat16Storage": 2,
    "torch ShortStorage": 2,
    "torch FloatStorage": 4,
    "torch IntStorage": 4,
    "torch DoubleStorage": 8,
    "torch LongStorage": 8,
    "torch ComplexFloatStorage": 8,
    "torch ComplexDoubleStorage": 16,
}
TENSOR = ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2")
PARAMETER = "torch._utils _rebuild_parameter"
ORDERED = "collections OrderedDict"
SIZE = "torch Size"
FUNCTIONS = {*TENSOR, PARAMETER, ORDERED, SIZE}
# Sparse, quantised, nested and other tensors.
OTHER_TENSORS = ("torch._utils _rebuild_", "torch._tensor _rebuild_", "torch.serialization _get_layout")

NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
TEXTS = {"BINUNICODE", "SHORT_BINSTRING"}
CONTAINERS = {"EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_TUPLE": "tuple"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUTS, GETS = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}


class RefusedError(Exception):
    """The pickle holds what no checkpoint does; a sentence without the file's name."""


@dataclass
class Allowance:
    """Bytes that a file's storages and tensors may claim, over all its pickles. size: of the file."""

    size: int
    stored: int = 0
    claimed: int = 0
    storages: dict[Any, int] = field(default_factory=dict)

    def store(self, key: Any, count: int) -> None:
        """Count a storage of ``count`` bytes, once a key. Raises RefusedError."""
        self.stored += max(count - self.storages.get(key, 0), 0)
        self.storages[key] = max(count, self.storages.get(key, 0))
        self._check()

    def claim(self, count: int) -> None:
        """Count a tensor of ``count`` bytes. Raises RefusedError."""
        self.claimed += count
        self._check()

    def _check(self) -> None:
        if self.stored > self.size or self.claimed > SHARED * self.size:
            raise RefusedError(f"its tensors claim more than the {self.size} bytes of the file")


@dataclass(slots=True)
class _Node:
    """One value: its kind, itself (of containers the parts, of mappings the keys), its levels, and all its nodes."""

    kind: str
    value: Any = None
    levels: int = 0
    nodes: int = 1

    def add(self, *parts: _Node) -> None:
        """Put ``parts`` into a container. Raises RefusedError."""
        for part in parts:
            self.levels = max(self.levels, part.levels + 1)
            self.nodes += part.nodes
        if self.levels > MOST_LEVELS:
            raise RefusedError(f"it nests over {MOST_LEVELS} levels")
        if self.nodes > MOST_NODES:
            raise RefusedError(f"it holds over {MOST_NODES} values")


CONSTANTS = {"NONE": _Node("none"), "NEWTRUE": _Node("bool"), "NEWFALSE": _Node("bool")}
SMALL = [_Node("number", value) for value in range(256)]


def check_pickle(stream: IO[bytes], allowance: Allowance) -> None:
    """Follow the pickle that ``stream`` stands at, to its end, and build nothing.

    Args:
        stream: The instructions, in memory.
        allowance: What the file's tensors may still claim.

    Raises:
        pickle.UnpicklingError: It could run code.
        RefusedError: It holds something else than texts, numbers, lists, mappings and dense tensors, in a tree of
            moderate size, or its tensors claim more than their storage, or all of them more than the file.
        Exception: Of any other kind: it is damaged.
    """
    machine = _Machine(allowance)
    for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if step > MOST_STEPS:
            raise RefusedError(f"it has over {MOST_STEPS} instructions")
        machine.follow(opcode.name, argument)


class _Machine:
    """The stack of `torch._weights_only_unpickler`, of descriptions instead of values."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._stack: list[_Node] = []
        self._marked: list[list[_Node]] = []
        self._memo: dict[int, _Node] = {}

    def follow(self, name: str, argument: Any) -> None:
        """Take one step. Raises as `check_pickle`."""
        stack = self._stack
        if name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in NUMBERS:
            stack.append(self._number(argument))
        elif name in TEXTS:
            stack.append(self._text(argument))
        elif name in CONTAINERS:
            stack.append(_Node(CONTAINERS[name], []))
        elif name in TUPLES:
            stack[-TUPLES[name] :] = [self._tuple(stack[-TUPLES[name] :])]
        elif name == "TUPLE":
            parts = self._pop_mark()
            self._stack.append(self._tuple(parts))
        elif name == "MARK":
            self._marked.append(stack)
            self._stack = []
        elif name in PUTS:
            self._memo[argument] = stack[-1]
        elif name in GETS:
            node = self._memo[argument]
            if node.kind in ("list", "dict", "ordered"):
                raise RefusedError("it uses one list or mapping in two places, or inside itself")
            stack.append(node)
        elif name in ("APPEND", "APPENDS"):
            parts = self._pop_mark() if name == "APPENDS" else [stack.pop()]
            self._append(self._stack[-1], parts)
        elif name in ("SETITEM", "SETITEMS"):
            parts = self._pop_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            self._set_items(self._stack[-1], parts[::2], parts[1::2])
        elif name == "GLOBAL":
            stack.append(self._global(argument))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack[-1] = self._call(stack[-1], self._parts(arguments, "tuple"))
        elif name == "BUILD":
            state = stack.pop()
            if stack[-1].kind != "ordered" or state.kind not in ("dict", "ordered") or state.value != ["_metadata"]:
                raise RefusedError("it sets attributes of what it holds")
            stack[-1].add(state)
        elif name not in ("PROTO", "STOP"):
            raise pickle.UnpicklingError(name)  # torch writes no other, and follows none

    def _pop_mark(self) -> list[_Node]:
        parts, self._stack = self._stack, self._marked.pop()
        return parts

    def _number(self, value: float) -> _Node:
        if isinstance(value, int):
            if 0 <= value < len(SMALL):
                return SMALL[value]
            if value.bit_length() > 80:  # a legacy file's magic number
                raise RefusedError(f"it holds a whole number of {value.bit_length()} bits")
        return _Node("number", value)

    def _text(self, value: str) -> _Node:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RefusedError("it holds a text that is no Unicode") from error
        return _Node("text", value, nodes=1 + len(value) // 64)

    def _tuple(self, parts: list[_Node]) -> _Node:
        node = _Node("tuple", parts)
        node.add(*parts)
        return node

    def _parts(self, node: _Node, kind: str) -> list[_Node]:
        if node.kind != kind:
            raise RefusedError(f"it has a {node.kind} where a {kind} belongs")
        parts: list[_Node] = node.value
        return parts

    def _append(self, target: _Node, parts: list[_Node]) -> None:
        self._parts(target, "list").extend(parts)
        target.add(*parts)

    def _set_items(self, target: _Node, keys: list[_Node], values: list[_Node]) -> None:
        if target.kind not in ("dict", "ordered") or len(keys) != len(values):
            raise RefusedError("it sets items of what is no mapping")
        if odd := next((key.kind for key in keys if key.kind not in ("text", "number")), None):
            raise RefusedError(f"it has a {odd} for the name of an item")
        target.value.extend(key.value for key in keys)
        target.add(*keys, *values)

    def _global(self, name: str) -> _Node:
        if name in STORAGES or name in FUNCTIONS:
            return _Node("class", name)
        if name.startswith(OTHER_TENSORS):
            raise RefusedError(f"{self._item()} is not a dense tensor of numbers ({name.replace(' ', '.')})")
        raise pickle.UnpicklingError(name)

    def _item(self) -> str:
        """The text that stands last on the stack: as a rule the name of what comes next."""
        for stack in (self._stack, *reversed(self._marked)):
            for node in reversed(stack):
                if node.kind == "text":
                    return str(node.value)
        return "its content"

    def _storage(self, identity: _Node) -> _Node:
        """A storage by ("storage", class, key, place, count), in legacy files with what it is a view of."""
        parts = self._parts(identity, "tuple")
        if len(parts) not in (5, 6) or parts[0].value != "storage" or parts[1].value not in STORAGES:
            raise RefusedError("it has a storage that is none of torch's")
        size = STORAGES[parts[1].value] * self._count(parts[4])
        if parts[2].kind not in ("text", "number"):
            raise RefusedError("it has a storage without a name")
        self._allowance.store(parts[2].value, size)
        return _Node("storage", (STORAGES[parts[1].value], size))

    def _count(self, node: _Node) -> int:
        if node.kind != "number" or not isinstance(node.value, int) or node.value < 0:
            raise RefusedError("it has a size that is no whole number")
        return node.value

    def _call(self, function: _Node, arguments: list[_Node]) -> _Node:
        if function.value in TENSOR:
            storage, _, shape = arguments[:3]
            if storage.kind != "storage" or len(shape.value) > MOST_DIMENSIONS:
                raise RefusedError(f"{self._item()} is not a dense tensor of numbers")
            element, size = storage.value
            claim = element * math.prod(map(self._count, self._parts(shape, "tuple")))
            if claim > size:
                raise RefusedError(f"{self._item()} claims {claim} bytes of the {size} that are stored")
            self._allowance.claim(claim)
            return _Node("tensor", claim)
        if function.value == PARAMETER:
            if arguments[0].kind != "tensor":
                raise RefusedError("it has a parameter that is no tensor")
            return arguments[0]
        if function.value == SIZE:
            return arguments[0]
        if function.value == ORDERED:
            node = _Node("ordered", [])
            for pair in self._parts(arguments[0], "list") if arguments else ():
                parts = self._parts(pair, pair.kind if pair.kind in ("list", "tuple") else "tuple")
                self._set_items(node, parts[:1], parts[1:])
            return node
        raise RefusedError(f"it calls a {function.kind}")
