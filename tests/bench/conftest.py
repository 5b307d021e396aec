"""The exported files that these tests share; see tests/exports.py."""

import pytest
from exports import Files


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files("boundary", tmp_path_factory)
