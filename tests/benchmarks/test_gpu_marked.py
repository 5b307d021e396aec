"""Tests that wait for a GPU call our ops as they are: each call in them is bound to the op's schema on the CPU."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from gpu import plan

import cm_runtime.cuda.torch_ops  # noqa: F401  # which registers the ops

TESTS = Path(__file__).parents[1]


def marked(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """The test functions of a file that are marked gpu."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any("mark.gpu" in ast.unparse(each) for each in node.decorator_list):
            yield node


def op_calls(function: ast.FunctionDef) -> Iterator[tuple[str, ast.Call]]:
    """(op, call) of each call of one of ours."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            prefix, _, name = ast.unparse(node.func).rpartition(".")
            if prefix in ("ops", "torch.ops.cm"):
                yield name, node


def lengths(function: ast.FunctionDef) -> dict[str, int]:
    """The length of each name that is assigned a tuple or a list in ``function``."""
    return {
        target.id: len(node.value.elts)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple | ast.List)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def complaint(name: str, call: ast.Call, known: dict[str, int]) -> str | None:
    """Why an op would refuse a call, by its schema."""
    if not hasattr(torch.ops.cm, name):
        return f"there is no op {name}"
    arguments = getattr(torch.ops.cm, name).default._schema.arguments
    stars = [each.value for each in call.args if isinstance(each, ast.Starred)]
    count = len(call.args) - len(stars)
    for star in stars:
        if not isinstance(star, ast.Name) or star.id not in known:
            return f"{ast.unparse(call)}: how many arguments are *{ast.unparse(star)}?"
        count += known[star.id]
    given = {argument.name for argument in arguments[:count]} | {word.arg for word in call.keywords}
    if count > len(arguments) or given - {argument.name for argument in arguments}:
        return f"{ast.unparse(call)}: {name} takes {len(arguments)} arguments"
    missing = [each.name for each in arguments if each.name not in given and not each.has_default_value()]
    return f"{ast.unparse(call)}: without {', '.join(missing)}" if missing else None


def complaints(source: str) -> list[str]:
    return [
        line
        for function in marked(ast.parse(source))
        for name, call in op_calls(function)
        if (line := complaint(name, call, lengths(function)))
    ]


def test_every_call_of_an_op_in_a_test_for_gpus_fits_its_schema() -> None:
    files = plan.gpu_tests()
    assert {"kernels/test_torch_ops.py", "bench/test_peaks.py"} <= set(files)
    assert [line for file in files for line in complaints((TESTS / file).read_text())] == []
    calls = [call for file in files for f in marked(ast.parse((TESTS / file).read_text())) for call in op_calls(f)]
    assert len(calls) >= 5


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("ops.finish(x, F, 1.0, 2.0, True)", "finish takes 4 arguments"),
        ("ops.finish(x, F, 1.0)", "without c_out"),
        ("torch.ops.cm.finish(x, F, *numbers)", "without c_out"),
        ("ops.finish(x, F, 1.0, c_out=2.0, clip=True)", "finish takes 4 arguments"),
        ("ops.finish(*images())", "how many arguments are *images()"),
        ("ops.finished(x)", "there is no op finished"),
    ],
)
def test_a_call_that_does_not_fit_is_noticed(call: str, reason: str) -> None:
    body = "@pytest.mark.gpu\ndef test_a():\n    numbers = (1.0,)\n    made = "
    (line,) = complaints(f"{body}{call}\n")
    assert reason in line
    assert complaints(f"{body}ops.finish(x, F, *numbers, 2.0)\n") == []
    assert complaints(f"def test_a():\n    {call}\n") == [], "tests of the CPU are run"
