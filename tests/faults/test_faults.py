"""Every planted fault of faults.toml still has its one line in the product; run.py plants them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faults import catalogue

TREE = Path(__file__).parents[2]


def test_every_fault_can_be_planted_in_one_place() -> None:
    tests = list((TREE / "tests").rglob("test_*.py"))
    assert catalogue.errors(catalogue.load(), catalogue.sources(TREE), tests) == []


def test_a_line_that_is_gone_or_there_twice_is_an_error() -> None:
    content = {"a.py": "x = 1\nx = 1\n", "b.py": "y = 1\nx = 1\n"}
    fault = catalogue.Fault("a", "x = 1", "x = 2", (), within="^y")
    assert catalogue.place(fault, content) == "b.py"
    for find, within in (("x = 1", ""), ("x = 1", "^x"), ("z = 1", "")):
        with pytest.raises(LookupError, match=r"occurs [023] times"):
            catalogue.place(catalogue.Fault("a", find, "x = 2", (), within), content)


def test_faults_meet_the_tests_of_make_test() -> None:
    """A fault that only the slow tests notice counts as a survivor."""
    (marks,) = re.findall(r"^MARKS \?= (.*)$", (TREE / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert f'TIERS = "{marks}"' in Path(__file__).with_name("run.py").read_text(encoding="utf-8")
