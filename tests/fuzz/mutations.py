"""Files as an attacker or a bad disk would change them, each a function of a number alone."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from random import Random
from typing import Any

LENGTHS = (0, 1, 2, 3, 7, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = (
    "",
    "\0",
    "\ud800",
    "\n\x1b[2J",
    "../../etc/passwd",
    "/dev/zero",
    "*/_ORT_MEM_ADDR_/*",
    "n" * 300,
    "x" * 70_000,
    "é" * 200,
    "NaN",
    "1" * 5000,
)
NUMBERS = (0, -1, 1, 3, 255, 2**31, 2**63, 2**64, -(2**63), 10**30, 1e-320, 1e300, 1e308, -1e308, 0.5, 10**400)


def mutate(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """One to four changes of ``data``; ``others`` are files of its kind that parts are taken from."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        ways = [_flip, _overwrite, _number, _cut, _insert, _repeat, _remove, _text]
        if data[:2] == b"PK":
            ways += [_member] * 6
        if data[:1] in (b"{", b"["):
            ways += [_tree] * 12
        data = random.choice(ways)(data, random)
        if others and random.random() < 0.05:
            data = _splice(data, random.choice(others), random)
    return data


def tree(value: Any, random: Random) -> Any:
    """Plain containers with one of their values replaced, removed, doubled or nested."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(sorted(value, key=str))
        changed = dict(value)
        act = random.random()
        if act < 0.1:
            del changed[key]
        elif act < 0.15:
            changed[random.choice(TEXTS)] = changed[key]
        else:
            changed[key] = tree(changed[key], random)
        return changed
    if isinstance(value, list | tuple) and value and random.random() < 0.8:
        index = random.randrange(len(value))
        changed = list(value)
        act = random.random()
        if act < 0.1:
            del changed[index]
        elif act < 0.2:
            changed += [changed[index]] * random.choice((1, 7, 1000))
        else:
            changed[index] = tree(changed[index], random)
        return changed
    return leaf(random)


def leaf(random: Random) -> Any:
    """A value that few expect."""
    nested: Any = 1
    for _ in range(900):
        nested = [nested]
    return random.choice(
        (
            random.choice(NUMBERS),
            random.choice(TEXTS),
            float("nan"),
            float("inf"),
            None,
            True,
            [],
            {},
            [[]],
            {"": {}},
            nested,
            [random.choice(NUMBERS)] * 3,
        )
    )


def _tree(data: bytes, random: Random) -> bytes:
    try:
        return json.dumps(tree(json.loads(data), random)).encode()
    except (ValueError, RecursionError, UnicodeEncodeError):
        return _flip(data, random)


def _member(data: bytes, random: Random) -> bytes:
    """A zip whose checksums are right, and one of whose members is not."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
            kind = archive.infolist()[0].compress_type
    except Exception:  # what was changed before
        return _flip(data, random)
    name = random.choice(sorted(members))
    members[name] = mutate(members[name], random, ())
    if random.random() < 0.05:
        del members[name]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for each, content in members.items():
            archive.writestr(each, content)
    return file.getvalue()


def _place(data: bytes, random: Random) -> int:
    """Heads are where the numbers are that others rest on."""
    return random.randrange(min(len(data), 256) if random.random() < 0.4 else len(data)) if data else 0


def _flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 16))):
        if changed:
            changed[_place(data, random)] ^= 1 << random.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, random: Random) -> bytes:
    at, count = _place(data, random), random.choice((1, 2, 4, 16, 64))
    fill = random.choice((b"\0" * count, b"\xff" * count, random.randbytes(count)))
    return data[:at] + fill + data[at + count :]


def _number(data: bytes, random: Random) -> bytes:
    at, width = _place(data, random), random.choice((1, 2, 4, 8))
    value = random.choice(LENGTHS) % 256**width
    return data[:at] + value.to_bytes(width, random.choice(("little", "big"))) + data[at + width :]


def _cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _insert(data: bytes, random: Random) -> bytes:
    at = _place(data, random)
    return data[:at] + random.randbytes(random.choice((1, 2, 8, 100))) + data[at:]


def _repeat(data: bytes, random: Random) -> bytes:
    at, count = _place(data, random), random.choice((1, 8, 64, 1024))
    return data[:at] + data[at : at + count] * random.choice((2, 3, 50)) + data[at + count :]


def _remove(data: bytes, random: Random) -> bytes:
    at = _place(data, random)
    return data[:at] + data[at + random.choice((1, 2, 8, 100)) :]


def _text(data: bytes, random: Random) -> bytes:
    """A word or a number of text becomes another."""
    at = _place(data, random)
    end = at
    while end < len(data) and chr(data[end]).isalnum() and end - at < 64:
        end += 1
    value = random.choice((*TEXTS, *map(str, NUMBERS)))
    return data[:at] + value.encode(errors="surrogatepass") + data[end:]


def _splice(data: bytes, other: bytes, random: Random) -> bytes:
    at, start = _place(data, random), _place(other, random)
    count = random.choice((4, 64, 1024))
    return data[:at] + other[start : start + count] + data[at + count :]
