"""Read the list of planted faults and find the line that each of them changes."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LIST = Path(__file__).with_name("faults.toml")
PRODUCT = ("cm_runtime", "export", "kernels")
SOURCES = {".py", ".cu", ".h", ".cpp"}


@dataclass(frozen=True)
class Fault:
    """A mistake on one line. within: a regular expression for the content of the file that is meant, or ""."""

    name: str
    find: str
    replace: str
    tests: tuple[str, ...]
    within: str = ""


def load(path: Path = LIST) -> list[Fault]:
    """The faults of a list, in its order. Raises TypeError for a key that no fault has, or one that is missing."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    return [Fault(**{**table, "tests": tuple(table["tests"])}) for table in content["fault"]]


def tracked(tree: Path) -> list[str]:
    """The paths of a checkout's files, links included."""
    names = subprocess.run(["git", "-C", str(tree), "ls-files", "-z"], capture_output=True, check=True, text=True)
    return [name for name in names.stdout.split("\0") if name and (tree / name).exists()]


def sources(tree: Path) -> dict[str, str]:
    """The product's source files: path -> content."""
    return {
        path.relative_to(tree).as_posix(): path.read_text(encoding="utf-8")
        for folder in PRODUCT
        for path in sorted((tree / folder).rglob("*"))  # which follows no link, and so reads no file twice
        if path.suffix in SOURCES and path.is_file()
    }


def place(fault: Fault, content: Mapping[str, str]) -> str:
    """The path of the one file that ``fault`` changes. Raises LookupError where there is not exactly one place."""
    meant = [path for path, text in content.items() if not fault.within or re.search(fault.within, text)]
    places = [path for path in meant for _ in range(content[path].count(fault.find))]
    if len(places) != 1:
        among = f" in files with {fault.within!r}" if fault.within else ""
        where = f": {', '.join(places)}" if places else ""
        raise LookupError(f"{fault.name}: {fault.find!r} occurs {len(places)} times{among}{where}")
    return places[0]


def errors(faults: Sequence[Fault], content: Mapping[str, str], tests: Sequence[Path]) -> list[str]:
    """Reasons why faults cannot be planted or tested, all of them; tests: the test files."""
    reasons = [
        f"{fault.name}: two faults have this name"
        for i, fault in enumerate(faults)
        if fault.name in {other.name for other in faults[:i]}
    ]
    for fault in faults:
        try:
            place(fault, content)
        except LookupError as error:
            reasons.append(str(error))
        reasons += [
            f"{fault.name}: there is no test file {name}"
            for name in fault.tests
            if not any(path.match(name) for path in tests)
        ]
        if "\n" in fault.find + fault.replace or fault.find == fault.replace:
            reasons.append(f"{fault.name}: it does not change one line")
    return reasons
