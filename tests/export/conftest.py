"""The exported files that these tests share; see tests/exported.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import exported


@pytest.fixture(scope="session")
def boundary(tmp_path_factory: pytest.TempPathFactory) -> exported.Files:
    return exported.Files("boundary", tmp_path_factory)


@pytest.fixture(scope="session")
def edm(tmp_path_factory: pytest.TempPathFactory) -> exported.Files:
    return exported.Files("edm", tmp_path_factory)


@pytest.fixture(scope="session", params=exported.KINDS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> exported.Files:
    return exported.Files(request.param, tmp_path_factory)
