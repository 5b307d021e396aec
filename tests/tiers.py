"""The three tiers of the tests, and what conftest.py does to keep them.

make test-fast: neither ``slow`` nor ``process``, for every edit; no test starts a child process.
make test: not ``slow``, for every push.
make test-all: everything, every night.

Of a parametrised test the markers ``covering`` and ``quick`` choose the cases of the quick tiers; the others are slow.
"""

from __future__ import annotations

import itertools
import multiprocessing.process
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

Case = tuple[int, ...]
CHILDREN = [
    (subprocess.Popen, "__init__"),
    (multiprocessing.process.BaseProcess, "start"),
    *((os, name) for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system")),
]


def combinations(case: Case, strength: int) -> set[tuple[tuple[int, int], ...]]:
    """All combinations of ``strength`` of a case's (parameter, value)."""
    return set(itertools.combinations(enumerate(case), min(strength, len(case))))


def covering(cases: Sequence[Case], strength: int) -> list[Case]:
    """Choose few of ``cases`` that hold every combination of ``strength`` parameters' values that any of them holds.

    Greedy, the earliest of the best: the same choice for the same cases. Strength 2 is pairwise.
    """
    missing = set().union(*(combinations(case, strength) for case in cases))
    cover = []
    while missing:
        best = max(cases, key=lambda case: len(combinations(case, strength) & missing))
        missing -= combinations(best, strength)
        cover.append(best)
    return cover


def _quick_names(items: list[pytest.Function]) -> set[str]:
    """Names of those cases of one test function that the quick tiers run."""
    quick = items[0].get_closest_marker("quick")
    if quick is not None:
        names = {f"{items[0].originalname}[{case}]" for case in quick.args}
        missing = names - {item.name for item in items}
        if missing and not any("::" in word for word in items[0].config.args):  # single cases may be asked for
            raise pytest.UsageError(f"{items[0].nodeid}: no case is called {', '.join(sorted(missing))}")
        return names
    covered = items[0].get_closest_marker("covering")
    assert covered is not None
    numbers: dict[str, dict[str, int]] = defaultdict(dict)  # of each parameter's values, in their order
    cases = {}
    for item in items:
        if not item.get_closest_marker("slow"):
            values = [(numbers[name], repr(value)) for name, value in item.callspec.params.items()]
            cases[tuple(known.setdefault(value, len(known)) for known, value in values)] = item.name
    return {cases[case] for case in covering(list(cases), *covered.args)}


def mark_slow_cases(items: Iterable[pytest.Item]) -> None:
    """Mark as slow what ``covering`` and ``quick`` leave out of the quick tiers."""
    functions = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and any(map(item.get_closest_marker, ("covering", "quick"))):
            functions[item.parent, item.originalname].append(item)
    for cases in functions.values():
        names = _quick_names(cases)
        for item in cases:
            if item.name not in names:
                item.add_marker(pytest.mark.slow)


def is_fast(config: pytest.Config) -> bool:
    """Whether ``-m`` leaves out the tests that start processes."""
    return "not process" in config.option.markexpr


@contextmanager
def no_children() -> Iterator[list[str]]:
    """Let no process be started; yields the complaints, for what catches the first."""
    complaints: list[str] = []

    def refuse(name: str) -> Any:
        def start(*_: object, **__: object) -> None:
            test = os.environ.get("PYTEST_CURRENT_TEST", "a test").removesuffix(" (call)")
            complaints.append(f"{test} starts a child process ({name}): mark it `process`, make test-fast runs none")
            pytest.fail(complaints[-1], pytrace=False)

        return start

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CHILDREN:
            patch.setattr(owner, name, refuse(f"{owner.__name__}.{name}"))
        yield complaints
