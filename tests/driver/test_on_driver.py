"""Tests that run in processes of their own, on the stand-in."""

from __future__ import annotations

from pathlib import Path

import pytest
from driver import run_on_driver

pytestmark = pytest.mark.process
pytest.importorskip("cuda.bindings")


def test_the_real_bindings_find_it() -> None:
    outcome = run_on_driver("""
        import cuda.bindings.driver as cu
        print(*map(int, cu.cuInit(0)), cu.cuDriverGetVersion()[1], cu.cuDeviceGetCount()[1])
    """)
    assert outcome.out == "0 13000 1\n"
