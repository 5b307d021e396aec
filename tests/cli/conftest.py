"""The exported files that these tests share; see tests/exports.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import exports


@pytest.fixture(scope="session")
def grey(tmp_path_factory: pytest.TempPathFactory) -> exports.Files:
    """One channel, no classes."""
    return exports.Files("edm", tmp_path_factory)
