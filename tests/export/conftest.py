"""The exported files that these tests share; see tests/exports.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import exports


@pytest.fixture(scope="session", params=exports.KINDS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> exports.Files:
    return exports.Files(request.param, tmp_path_factory)
