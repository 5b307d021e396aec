"""TOML that somebody else wrote: of bounded size, its numbers of 64 bits and its keys of few parts.

`tomllib` takes memory in the square of a dotted key's parts, and Python's whole numbers have no largest, while TOML's
are of 64 bits. Both are refused here, with the key's name.
"""

from __future__ import annotations

import os
import re
import tomllib
from typing import Any

from cm_runtime.errors import ConfigError
from cm_runtime.files import streams

MOST_BYTES = 1 << 18
MOST_PARTS = 16  # of a dotted key
_MOST_DIGITS = 4300  # that Python turns into a number

# Strings and comments, closed or not: every match goes on from where the one before ended, in linear time. A string of
# three quotes may end in five.
_QUOTED = re.compile(
    r'"""(?:\\?+.|\\)*?(?:"""(?!")|\Z)'
    + r"|'''.*?(?:'''(?!')|\Z)"  # over lines
    + r'|"(?:\\[^\n]|[^"\\\n])*+"?'
    + r"|'[^'\n]*+'?|#[^\n]*+",
    re.DOTALL,
)
_LONG_KEY = re.compile(rf"(?:\.[^.\n=,\[\]{{}}]*+){{{MOST_PARTS}}}")
_LONG_NUMBER = re.compile(rf"[\d_]{{{_MOST_DIGITS + 1},}}+")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError naming the file, and the key where it is one that is at fault."""
    return parse(streams.read_text(path, ConfigError, MOST_BYTES), path)


def parse(text: str, where: str | os.PathLike[str]) -> dict[str, Any]:
    """The same of ``text``, which comes from ``where``."""
    if wrong := _out_of_bounds(text):
        raise ConfigError(f"{where}: {wrong}")
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError; a date may raise another
        raise ConfigError(f"{where} is not valid TOML: {error}") from error
    if key := _beyond_64_bits(tree):
        raise ConfigError(f"{where}: {key}: must be a whole number of at most 64 bits")
    return tree


def parse_value(text: str, where: str) -> Any:
    """The value that ``text`` is in TOML, or ``text`` itself where it is none. Raises ConfigError as `parse` does."""
    has_keys = "{" in text or "\n" in text
    if wrong := _out_of_bounds(f"value = {text}" if has_keys else re.sub(r"[^\w]", " ", text)):
        raise ConfigError(f"{where}: {wrong}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    if key := _beyond_64_bits({"value": value}):
        raise ConfigError(f"{where}{key.removeprefix('value')}: must be a whole number of at most 64 bits")
    return value


def _out_of_bounds(text: str) -> str:
    """The place and the fault of the first key or number that is too long to be parsed, or nothing."""
    bare = _QUOTED.sub(lambda quoted: "_" + "\n" * quoted[0].count("\n"), text)
    if long := _LONG_KEY.search(bare):
        key = re.split(r"[\n=,\[\]{}]", bare[: long.start()])[-1].strip()[:40]
        return f"line {_line(bare, long)}: {key}...: must be a key of at most {MOST_PARTS} parts"
    if long := _LONG_NUMBER.search(bare):
        before = bare[bare.rfind("\n", 0, long.start()) + 1 : long.start()]
        key = ": ".join(re.findall(r"([^\s=,\[\]{}]+)\s*=", before)[-1:])
        return f"line {_line(bare, long)}: {key or 'a value'}: must be a number of fewer digits than {len(long[0])}"
    return ""


def _line(text: str, place: re.Match[str]) -> int:
    return text.count("\n", 0, place.start()) + 1


def _beyond_64_bits(tree: dict[str, Any]) -> str:
    """The first key whose value is a whole number that TOML does not have, or nothing."""
    nodes: list[tuple[str, Any]] = list(tree.items())
    for key, value in nodes:  # which grows meanwhile
        if isinstance(value, dict):
            nodes += [(f"{key}.{name}", below) for name, below in value.items()]
        elif isinstance(value, list):
            nodes += [(f"{key}.{number}", below) for number, below in enumerate(value)]
        elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            return key
    return ""
