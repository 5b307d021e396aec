"""CUDA's driver API by cuda-bindings alone: a call, and a call that has to be refused."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cuda.bindings.driver as cu
import pytest

RELAXED, THREAD_LOCAL, GLOBAL = (
    getattr(cu.CUstreamCaptureMode, f"CU_STREAM_CAPTURE_MODE_{name}") for name in ("RELAXED", "THREAD_LOCAL", "GLOBAL")
)
NON_BLOCKING = 1


class Refusal(Exception):
    """An error that the driver answered, by its name without CUDA_ERROR_."""


def call(name: str, *arguments: Any) -> Any:
    """The result of a function of the driver."""
    error, *results = getattr(cu, name)(*arguments)
    if int(error):
        raise Refusal(error.name.removeprefix("CUDA_ERROR_"))
    return results[0] if len(results) == 1 else tuple(results)


def refuses(error: str) -> Any:
    """Hold that the block's call is answered with this error."""
    return pytest.raises(Refusal, match=f"^{error}$")


def report() -> list[str]:
    """The stand-in's report so far; what it says of misuse is forgotten."""
    function = ctypes.CDLL("libcuda.so.1").cm_driver_report
    function.restype = ctypes.c_char_p
    return function().decode().splitlines()  # type: ignore[no-any-return]


def misuse() -> list[str]:
    """What the stand-in has to say against its caller."""
    return [line for line in report() if line.startswith("misuse")]


def in_thread(body: Callable[[], Any]) -> Any:
    """The result of ``body`` in a thread of its own."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(body())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


@contextmanager
def option(name: str, value: object) -> Iterator[None]:
    """An option of the stand-in that it reads at every call."""
    os.environ[f"CM_DRIVER_{name.upper()}"] = str(value)
    try:
        yield
    finally:
        del os.environ[f"CM_DRIVER_{name.upper()}"]
