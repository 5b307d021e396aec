"""Every rule is tested in a context of its own, which takes with it what the test leaves."""

from collections.abc import Iterator
from typing import Any

import pytest
from driver.api import GLOBAL, RELAXED, call, misuse


@pytest.fixture(scope="session", autouse=True)
def driver() -> None:
    call("cuInit", 0)


@pytest.fixture(autouse=True)
def context(driver: None) -> Iterator[Any]:
    context = call("cuCtxCreate", None, 0, 0)
    yield context
    call("cuThreadExchangeStreamCaptureMode", RELAXED)  # whatever a test that failed has left open
    while int(call("cuCtxGetCurrent")):
        call("cuCtxPopCurrent")
    call("cuCtxDestroy", context)
    call("cuThreadExchangeStreamCaptureMode", GLOBAL)
    assert misuse() == []
