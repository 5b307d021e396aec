"""torch's process-wide settings while an engine computes: float32 products, and cuDNN's search for fast kernels."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch

from cm_runtime.errors import EngineError

Products = Literal["ieee", "tf32"]


class _State(NamedTuple):
    """cuDNN's old flag for TF32, the old name for matrix products, the new names of all places, cuDNN's search."""

    allows: bool
    precision: str
    products: tuple[str, ...]
    benchmark: bool


# Of all, of all of a library, of an operation: "none" is that of the place it belongs to.
_PLACES = (
    *(("generic", "all"), ("cuda", "all"), ("mkldnn", "all")),
    *(("cuda", "conv"), ("cuda", "rnn"), ("cuda", "matmul"), ("mkldnn", "conv"), ("mkldnn", "matmul")),
)
_OWNERS = ("none",) * 3
_WANTED = {
    "ieee": _State(False, "highest", (*_OWNERS, *("ieee",) * 5), True),
    "tf32": _State(True, "high", (*_OWNERS, "tf32", "tf32", "tf32", "ieee", "ieee"), True),
}


class _Change(NamedTuple):
    products: Products
    saved: _State
    inside: int  # entries by then


class _Settings:
    """The first to enter saves the process's settings, the last puts them back; one that wants others waits until then.

    A thread that is alone inside may change them for a while. All names of them are set, the old ones too, so that
    whoever asks by one of those, in another thread, is answered.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._threads: list[int] = []  # inside, each as often as it entered
        self._changes: list[_Change] = []

    def enter(self, products: Products) -> None:
        """Raises EngineError where this thread would wait for itself."""
        thread = threading.get_ident()
        with self._changed:
            if thread not in self._threads:
                self._changed.wait_for(lambda: [each.products for each in self._changes] in ([], [products]))
            if not self._changes or self._changes[-1].products != products:
                if any(each != thread for each in self._threads):
                    raise EngineError(f"torch cannot compute in {products} inside of what several threads do otherwise")
                saved = _read()
                _write(_WANTED[products])
                self._changes.append(_Change(products, saved, len(self._threads)))
            self._threads.append(thread)

    def leave(self) -> None:
        with self._changed:
            self._threads.remove(threading.get_ident())
            if len(self._threads) == self._changes[-1].inside:
                _write(self._changes.pop().saved)
                self._changed.notify_all()


def _read() -> _State:
    """The settings of a process, all of whose places are none afterwards.

    Each is read behind the one it belongs to, as its own; and the old names are refused where new ones contradict them.
    """
    products = []
    for place in _PLACES:
        products.append(torch._C._get_fp32_precision_getter(*place))
        torch._C._set_fp32_precision_setter(*place, "none")
    allows = products[3:5] == ["tf32", "tf32"]  # cuDNN's old flag, not to be asked where the two differ
    return _State(allows, torch.get_float32_matmul_precision(), tuple(products), torch.backends.cudnn.benchmark)


def _write(state: _State) -> None:
    torch.backends.cudnn.allow_tf32 = state.allows
    torch.set_float32_matmul_precision(state.precision)
    for place, value in zip(_PLACES, state.products, strict=True):
        torch._C._set_fp32_precision_setter(*place, value)
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
