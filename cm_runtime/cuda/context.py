"""The primary context of each GPU, which torch, ONNX Runtime and TensorRT share, with our kernels loaded in it."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cm_runtime import kernels
from cm_runtime.cuda.cuda_bindings import CudaBindings
from cm_runtime.cuda.driver import OPT_IN_SHARED, OUT_OF_MEMORY, Driver, DriverError, Gpu
from cm_runtime.cuda.pycuda_driver import PycudaDriver
from cm_runtime.errors import EngineError, OutOfMemoryError
from cm_runtime.errors.reasons import first_line
from cm_runtime.extras import NO_DRIVER, has_driver, require
from cm_runtime.kernels.launches import Launch
from cm_runtime.kernels.limits import Limits, check_launch

BINDING = "CM_RUNTIME_CUDA"  # in the environment, the package that calls the driver
BINDINGS: dict[str, Callable[[], Driver]] = {"cuda-bindings": CudaBindings, "pycuda": PycudaDriver}
STATIC_SHARED = 48 << 10  # bytes of shared memory that a kernel may have without asking
LEAST_CAPABILITY = 8, 0
LEAST_DRIVER = 13000  # as the driver counts versions of CUDA; what the kernels are compiled with
FORKED = (
    "this process was forked from one that had used the GPU, and CUDA does not work here: start it by spawn"
    " (DataLoader: multiprocessing_context='spawn')"
)

_lock = threading.Lock()
_drivers: dict[str, tuple[int, Driver]] = {}  # with the process that opened it
_contexts: dict[tuple[str, int], Context] = {}


class Context:
    """A GPU's primary context, retained until the process ends; made current on a thread by `current`."""

    def __init__(self, driver: Driver, index: int) -> None:
        self.driver, self.index = driver, index
        self._process = os.getpid()
        self._functions: dict[str, Any] = {}
        self._large: set[str] = set()  # kernels that may take more shared memory than `STATIC_SHARED`
        self._module: Any = None
        self._lock = threading.Lock()
        with wrap_errors(f"opening cuda:{index}"):
            if index >= (count := driver.count()):
                raise EngineError(f"there is no cuda:{index}; the driver shows {count} GPU(s)")
            self.gpu = driver.describe(index)
            major, minor = map(int, self.gpu.capability.split("."))
            shared = driver.attribute(index, OPT_IN_SHARED)
            self.limits = Limits.from_device((major, minor), shared, launches_clusters=driver.launches_clusters)
            self._handle = driver.retain(index)
        # Made before all that is in the context, so that it is the last to go when the process ends.
        self.close = weakref.finalize(driver, self._close)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context this thread's for the block. Raises EngineError in a forked child, or at the end."""
        if os.getpid() != self._process:
            raise EngineError(FORKED)
        if not self.close.alive:
            raise EngineError(f"cuda:{self.index} has been given back: this process is ending")
        with wrap_errors(f"entering cuda:{self.index}"):
            state = self.driver.push(self._handle)
        try:
            yield
        finally:
            with wrap_errors(f"leaving cuda:{self.index}"):
                self.driver.pop(state)

    def give_back(self, release: Callable[[Any], None], handle: Any) -> None:
        """Release a handle, from any thread; not in a forked child, whose driver is its parent's."""
        if os.getpid() == self._process:
            with suppress(EngineError, DriverError), self.current():
                release(handle)

    def launch(self, work: Launch, stream: int) -> None:
        """Put one of our kernels in a stream; the context must be this thread's. Raises EngineError."""
        with wrap_errors(f"launching {work.kernel}"):
            check_launch(work, self.limits)
            self.driver.launch(self._function(work.kernel, work.shared > STATIC_SHARED), work, stream)

    def _function(self, name: str, is_large: bool) -> Any:
        """A kernel's handle. is_large: it may take all of the device's shared memory, now and later."""
        with self._lock:  # another thread's launch may be of another size
            if self._module is None:
                self._module = self._load()
            if name not in self._functions:
                self._functions[name] = self.driver.function(self._module, name)
            if is_large and name not in self._large:
                self.driver.allow_shared(self._functions[name], self.limits.shared)
                self._large.add(name)
            return self._functions[name]

    def _load(self) -> Any:
        """Our kernels. Raises EngineError for a GPU or a driver that is too old for them."""
        if tuple(map(int, self.gpu.capability.split("."))) < LEAST_CAPABILITY:
            least = ".".join(map(str, LEAST_CAPABILITY))
            raise EngineError(
                f"{self.gpu.name} has compute capability {self.gpu.capability}; the kernels need {least} (Ampere) or"
                " newer"
            )
        try:
            return self.driver.load(kernels.fatbin())
        except DriverError as error:
            check_version(self.driver)
            raise EngineError(
                f"{self.gpu.name} (compute capability {self.gpu.capability}) refused the kernels: {error}"
            ) from error

    def _close(self) -> None:
        if os.getpid() != self._process:
            return
        with suppress(DriverError):
            if self._module is not None:
                self._functions.clear()
                state = self.driver.push(self._handle)
                self.driver.unload(self._module)
                self.driver.pop(state)
            self.driver.release(self.index, self._handle)


class Owned:
    """A handle that is given back when its owner is gone, in any thread, or when the process ends, the newest first."""

    def __init__(self, context: Context, handle: Any, release: Callable[[Any], None]) -> None:
        self.handle = handle
        self.close = weakref.finalize(self, context.give_back, release, handle)

    def __int__(self) -> int:
        return int(self.handle)


def driver(name: str = "") -> Driver:
    """The driver by the binding ``name``, by default `BINDING`'s, or pycuda where its context is this thread's.

    Raises MissingExtraError, and EngineError where there is no driver or no GPU, or in a forked child.
    """
    if any(process != os.getpid() for process, _ in _drivers.values()):
        raise EngineError(FORKED)
    name = name or os.environ.get(BINDING) or _default()
    if name not in BINDINGS:
        raise EngineError(f"{BINDING} must be {' or '.join(BINDINGS)}, not {name}")
    with _lock:
        if name not in _drivers:
            _drivers[name] = os.getpid(), _open(name)
        return _drivers[name][1]


def _default() -> str:
    pycuda = sys.modules.get("pycuda.driver")
    return "pycuda" if pycuda and pycuda.Context.get_current() else "cuda-bindings"


def _open(name: str) -> Driver:
    for package in ("cuda.bindings", *(["pycuda"] if name == "pycuda" else [])):
        require(package, "sampling on a GPU")
    try:
        return BINDINGS[name]()
    except ImportError as error:
        raise EngineError(f"{name} is installed and does not load: {first_line(error)}") from error
    except (DriverError, RuntimeError) as error:  # RuntimeError where there is no libcuda.so.1
        reason = first_line(error) if has_driver() else NO_DRIVER
        raise EngineError(f"there is no NVIDIA GPU that CUDA can use: {reason}") from error


def open_context(index: int = 0, binding: str = "") -> Context:
    """The context of GPU ``index``, of those that CUDA_VISIBLE_DEVICES shows. Raises as `driver` does."""
    opened = driver(binding)
    with _lock:
        key = opened.name, index
        if key not in _contexts:
            _contexts[key] = Context(opened, index)
        return _contexts[key]


def check_version(driver: Driver) -> None:
    """Raise EngineError for a driver that is too old for the kernels."""
    version = driver.version()
    if version < LEAST_DRIVER:
        raise EngineError(
            f"this NVIDIA driver is of CUDA {version // 1000}.{version % 1000 // 10}; the kernels need one of CUDA"
            f" {LEAST_DRIVER // 1000} (580 or newer)"
        )


def gpu(index: int = 0) -> Gpu:
    """The GPU of that number. Raises as `driver` does."""
    return open_context(index).gpu


@contextmanager
def wrap_errors(action: str) -> Iterator[None]:
    """The driver's errors as one line that says what failed; OutOfMemoryError for want of memory."""
    try:
        yield
    except DriverError as error:
        if error.name == OUT_OF_MEMORY:
            raise OutOfMemoryError(f"CUDA has no memory left while {action}: {error}") from error
        raise EngineError(f"CUDA failed while {action}: {error}") from error
