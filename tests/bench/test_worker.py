"""bench/worker.py: it runs builds whose options have other names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import cm_runtime as cm
from cm_runtime.bench import worker


def load_by_micro_batch(path: str, micro_batch: int | None = None) -> None: ...
def load_by_batch(path: str, batch: int | None = None) -> None: ...
def load_without(path: str) -> None: ...


@pytest.mark.parametrize(
    ("load", "options"),
    [
        (load_by_micro_batch, {"micro_batch": 7}),
        (load_by_batch, {"batch": 7}),
        (load_without, {}),
        (cm.load, {"micro_batch": 7}),
    ],
)
def test_the_images_at_a_time_reach_load_under_its_own_name(load: Callable[..., Any], options: dict[str, int]) -> None:
    assert worker._micro_batch(load, 7) == options
