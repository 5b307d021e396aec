"""The tiers themselves: which cases of a product are quick, and that make test-fast starts no process."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import tiers

pytest_plugins = ["pytester"]
FACTORS = [(3,), (2, 2), (3, 2, 3), (4, 3, 2, 2), (5, 1, 4)]


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("sizes", FACTORS, ids=str)
def test_a_covering_holds_every_combination_of_the_cases(sizes: tuple[int, ...], strength: int) -> None:
    """By its definition, of whole products and of products with holes."""
    whole = list(itertools.product(*map(range, sizes)))
    for cases in (whole, [case for case in whole if sum(case) % 3 or not any(case)]):
        cover = tiers.covering(cases, strength)
        assert set(cover) <= set(cases) and len(cover) == len(set(cover))
        for axes in itertools.combinations(range(len(sizes)), min(strength, len(sizes))):
            assert {tuple(c[a] for a in axes) for c in cover} == {tuple(c[a] for a in axes) for c in cases}
        assert tiers.covering(cases, strength) == cover
    assert len(tiers.covering(whole, 1)) == max(sizes)


def test_pairs_are_fewer_than_the_product() -> None:
    assert len(tiers.covering(list(itertools.product(range(4), range(4), range(3), range(3))), 2)) <= 22  # of 144


CASES = """
import pytest

@pytest.mark.covering(2)
@pytest.mark.parametrize(("a", "d"), [(1, [1]), (2, [2])])
@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("c", [1, 2])
def test_product(a, b, c, d): pass

@pytest.mark.quick("y")
@pytest.mark.parametrize("a", ["x", "y", "z"])
def test_list(a): pass
"""


@pytest.mark.process
def test_cases_that_are_not_quick_are_slow(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers =\n covering\n quick\n slow\n")
    pytester.makeconftest(f"import sys; sys.path.insert(0, {str(Path(tiers.__file__).parent)!r})\n" + HOOK)
    pytester.makepyfile(CASES)
    pytester.inline_run("-m", "not slow", "-p", "no:xdist").assertoutcome(passed=4 + 1)
    pytester.inline_run("-m", "slow", "-p", "no:xdist").assertoutcome(passed=4 + 2)
    pytester.makepyfile(CASES.replace('quick("y")', 'quick("yes")'))
    assert pytester.inline_run("-p", "no:xdist").ret == pytest.ExitCode.USAGE_ERROR


HOOK = """
import pytest, tiers

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    tiers.mark_slow_cases(items)
"""
STARTS: dict[str, Callable[[], object]] = {
    "Popen": lambda: subprocess.run([sys.executable, "-c", "pass"]),
    "BaseProcess": lambda: multiprocessing.get_context("spawn").Process(target=print).start(),
    "fork": lambda: os.fork(),
    "system": lambda: os.system("true"),
}


@pytest.mark.parametrize("name", STARTS)
def test_no_process_is_started_in_the_fast_tier(name: str) -> None:
    fails = pytest.raises(pytest.fail.Exception, match="mark it `process`")
    with tiers.no_children() as complaints, fails, suppress(Exception):  # no handler of the product's catches it
        STARTS[name]()
    (complaint,) = complaints
    assert f"test_no_process_is_started_in_the_fast_tier[{name}]" in complaint and name in complaint
