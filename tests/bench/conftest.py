"""The exported files that these tests share; see tests/exported.py."""

import pytest
from exported import Files


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files("boundary", tmp_path_factory)
