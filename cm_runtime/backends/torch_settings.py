"""torch's process-wide settings while an engine computes: float32 products, and cuDNN's search for fast kernels."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

Products = Literal["ieee", "tf32"]


class _State(NamedTuple):
    """cuDNN's old flag for TF32, the old name for matrix products, the new names of all places, cuDNN's search."""

    allows: bool
    precision: str
    products: tuple[str, ...]
    benchmark: bool


_WANTED = {
    "ieee": _State(False, "highest", ("ieee",) * 5, True),
    "tf32": _State(True, "high", ("tf32", "tf32", "tf32", "ieee", "ieee"), True),
}


class _Settings:
    """The first to enter saves the process's settings, the last puts them back; one that wants others waits until then.

    All names of them are set, the old ones too, so that whoever asks by one of those, in another thread, is answered.
    """

    def __init__(self) -> None:
        self._changed, self._inside = threading.Condition(), 0
        self._saved: _State
        self._products: Products

    def enter(self, products: Products) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._inside or self._products == products)
            self._inside += 1
            if self._inside == 1:
                self._products, self._saved = products, _read()
                _write(_WANTED[products])

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            if not self._inside:
                _write(self._saved)
                self._changed.notify_all()


def _places() -> tuple[Any, ...]:
    b = torch.backends
    return b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul, b.mkldnn.conv, b.mkldnn.matmul  # type: ignore[attr-defined]


def _read() -> _State:
    products = tuple(str(place.fp32_precision) for place in _places())
    allows = products[:2] == ("tf32", "tf32")  # cuDNN's old flag, not to be asked where the two differ
    return _State(allows, torch.get_float32_matmul_precision(), products, torch.backends.cudnn.benchmark)


def _write(state: _State) -> None:
    torch.backends.cudnn.allow_tf32 = state.allows
    torch.set_float32_matmul_precision(state.precision)
    for place, value in zip(_places(), state.products, strict=True):
        place.fp32_precision = value
    torch.backends.cudnn.benchmark = state.benchmark


_SETTINGS = _Settings()


@contextmanager
def products(kind: Products) -> Iterator[None]:
    """Fix the products of float32 while it lasts: ieee, or tf32, whose factors have 10 bits.

    cuDNN takes TF32 by default. Only what is in float32 is affected, in every thread of the process. cuDNN measures its
    kernels for each new shape.
    """
    _SETTINGS.enter(kind)
    try:
        yield
    finally:
        _SETTINGS.leave()
