"""f on torch: checkpoints run as they are, the reference that other engines are held to; or compiled."""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cm_runtime.backends.base import ON_CPU, Backend, EngineOptions
from cm_runtime.choices import GraphKind
from cm_runtime.cuda.device import Device
from cm_runtime.cuda.engine import Captured, Evaluate
from cm_runtime.cuda.graph import COLLECTOR
from cm_runtime.cuda.sampler import OnDevice, open_device
from cm_runtime.errors import EngineError, OutOfMemoryError
from cm_runtime.errors.reasons import compiler_reason, first_line
from cm_runtime.extras import NO_DRIVER, has_driver
from cm_runtime.kernels.launches import Images
from cm_runtime.manifest import OUTPUTS, Manifest
from cm_runtime.networks.consistency import ConsistencyModel
from cm_runtime.request import Request
from cm_runtime.sampling import Array, Batch
from cm_runtime.subprocesses import engine_threads

MOST_BATCH_SIZES = 256  # that are compiled, each apart; torch by itself gives up after 8


class TorchBackend(Backend):
    """A torch module as a backend; the module is put in evaluation mode for each evaluation.

    Args:
        model: f, moved to the device.
        manifest: of its checkpoint.
        options: bf16 and fp16 are torch.autocast's, with skip-scaling and statistics in float32; auto is fp32.
            torch.compile compiles once for each batch size, at its first use; never in parts.

    Raises:
        EngineError: There is no such device.
    """

    name = "torch"
    graph: GraphKind = "network"  # on a GPU, where the rest of f is in our kernels

    def __init__(
        self,
        model: ConsistencyModel,
        manifest: Manifest,
        options: EngineOptions = ON_CPU,
    ) -> None:
        device = find_device(options.device)
        self._model = model.to(device)
        self._f: Callable[..., torch.Tensor] = self._model
        self.manifest = manifest
        self.device = str(device)
        self.precision = "fp32" if options.precision == "auto" else options.precision
        self.version = f"torch {torch.__version__}"
        self.outputs = OUTPUTS[manifest.graph]
        self._type = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        self._is_compiled = options.backend == "torch.compile"
        self._process = os.getpid()
        self.on_device = self._open_device(device)
        if self._type is not None:
            out = self._model.F.out
            out[-1] = out[-1] if isinstance(out[-1], _InFloat32) else _InFloat32(out[-1])
        if self._is_compiled:
            self.name = "torch.compile"
            limits: Any = importlib.import_module("torch._dynamo").config
            limits.recompile_limit = max(limits.recompile_limit, MOST_BATCH_SIZES)
            mode = "max-autotune" if device.type == "cuda" else "default"
            self._f = torch.compile(self._model, fullgraph=True, dynamic=False, mode=mode)

    def evaluate(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """One evaluation of the module on checked inputs; see `Backend`."""
        if self._process != os.getpid() and torch.get_num_threads() > 1:
            raise EngineError(
                "torch was at work before this process was forked, and would hang: start it by spawn, or take 1 thread"
            )
        was_training = self._model.training
        self._model.eval()
        kind = torch.device(self.device).type
        try:
            with torch.inference_mode(), ieee(), torch.autocast(kind, self._type, enabled=self._type is not None):
                x0 = self._f(*(self._tensor(each) for each in feed.values()))
                return np.asarray(x0.float().cpu().numpy(), np.float32)
        except Exception as error:  # a compiler's errors are of many kinds
            if not self._is_compiled and not isinstance(error, RuntimeError):
                raise
            raise EngineError(f"{self.name}: {compiler_reason(error)}") from error
        finally:
            self._model.train(was_training)

    # On the GPU, as cuda.engine.Engine has it

    @staticmethod
    def _open_device(kind: torch.device) -> OnDevice | None:
        """Sampling that stays on the GPU, behind what torch's current stream has written, weights perhaps."""
        device = open_device(str(kind))
        if device is None:
            return None
        return OnDevice(
            device, lambda: device.follow(torch.cuda.current_stream(kind).cuda_stream), torch.cuda.empty_cache
        )

    def batches(self, request: Request, noise: Array | None = None) -> Iterator[Batch] | None:
        """`sampling.batches`, of which nothing but images leaves the GPU; None where it cannot stay there."""
        return self.on_device.batches(self, request, noise) if self.on_device else None

    def images(self, count: int) -> Images:
        """float32, of which autocast makes what it needs."""
        return Images(count, *self.manifest.image_shape)

    def bind(self, device: Device, count: int) -> Evaluate:
        """F, compiled where this backend compiles f; the module is left in evaluation mode."""
        self._model.eval()
        shape, kind = (count, *self.manifest.image_shape), torch.device(self.device)
        F, has_labels = self._compile(self._model.F), self.manifest.num_classes > 0
        half, engine = self._type, self.name  # and not the backend, which owns what is bound

        def evaluate(addresses: Mapping[str, int]) -> None:
            x_in, output = (tensor_at(addresses[name], shape, torch.float32, kind) for name in ("x_in", "F"))
            inputs = [x_in, tensor_at(addresses["c_noise"], (count,), torch.float32, kind)]
            if has_labels:
                inputs.append(tensor_at(addresses["label"], (count,), torch.int64, kind))
            try:
                with (
                    torch.inference_mode(),
                    on_stream(device.stream, kind),
                    ieee(),
                    torch.autocast(kind.type, half, enabled=half is not None),
                ):
                    output.copy_(F(*inputs))
            except torch.OutOfMemoryError as error:
                raise OutOfMemoryError(f"torch: {first_line(error)}") from error
            except RuntimeError as error:
                raise EngineError(f"{engine}: {first_line(error)}") from error

        return evaluate

    def capture(self, device: Device, body: Callable[[], Any]) -> Captured:
        """The whole loop in one graph, by torch, whose allocator has to know of it."""
        return TorchGraph(device.stream, torch.device(self.device), body)

    def _compile(self, module: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        if not self._is_compiled:
            return module
        # Graphs are ours: those that max-autotune itself captures cannot be inside of another.
        return torch.compile(module, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self.device)


class _Ieee:
    """Torch's settings for float32 products, the process's: the first to enter saves them, the last puts them back.

    All names of them are set, the old ones too, so that whoever asks by one of those, in another thread, is answered.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._saved: tuple[bool, str, list[str]]

    @staticmethod
    def _places() -> tuple[Any, ...]:
        b = torch.backends
        return b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul, b.mkldnn.conv, b.mkldnn.matmul  # type: ignore[attr-defined]

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            products = [str(place.fp32_precision) for place in self._places()]
            allows = products[:2] == ["tf32", "tf32"]  # cuDNN's old flag, not to be asked where the two differ
            self._saved = allows, torch.get_float32_matmul_precision(), products
            self._set(False, "highest", ["ieee"] * len(products))

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._set(*self._saved)

    def _set(self, allows: bool, precision: str, products: list[str]) -> None:
        torch.backends.cudnn.allow_tf32 = allows
        torch.set_float32_matmul_precision(precision)
        for place, value in zip(self._places(), products, strict=True):
            place.fp32_precision = value


_IEEE = _Ieee()


@contextmanager
def ieee() -> Iterator[None]:
    """While it lasts, float32 products are of float32: neither TF32, cuDNN's default, nor bfloat16, where one may ask.

    Only what is in float32 is affected, in every thread of the process.
    """
    _IEEE.enter()
    try:
        yield
    finally:
        _IEEE.leave()


class TorchGraph:
    """A torch.cuda.CUDAGraph of what ``body`` puts in a stream, ours and torch's alike."""

    def __init__(self, stream: int, device: torch.device, body: Callable[[], Any]) -> None:
        self._stream, self._device = stream, device
        self._graph = torch.cuda.CUDAGraph()
        # Not by torch.cuda.graph, which waits for the whole GPU first, and so ends the captures of other threads.
        with COLLECTOR.pause(), on_stream(stream, device):
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                body()
            except BaseException:
                with suppress(RuntimeError):  # an invalid capture; the stream is usable again
                    self._graph.capture_end()
                raise
            self._graph.capture_end()

    def launch(self) -> None:
        """Puts the whole graph in the stream."""
        with on_stream(self._stream, self._device):
            self._graph.replay()


def on_stream(stream: int, device: torch.device) -> AbstractContextManager[Any]:
    """While it lasts, torch's work goes to a CUDA stream that is not torch's."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(_external(stream, device))


def _external(stream: int, device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.ExternalStream(stream, device)  # type: ignore[no-untyped-call]


class _At:
    """An address as the __cuda_array_interface__ (version 3) has it."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": shape, "typestr": dtype, "version": 3}


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of memory that is not torch's, which must outlive it."""
    if device.type == "cuda":
        return torch.as_tensor(_At(address, shape, {torch.float32: "<f4", torch.int64: "<i8"}[dtype]), device=device)
    memory = (ctypes.c_byte * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).reshape(shape)


class _InFloat32(nn.Module):
    """The last convolution, whose rounding would be the image's, outside of autocast."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        with torch.autocast(h.device.type, enabled=False):
            out: torch.Tensor = self.layer(h.float())
            return out


def set_threads(threads: int) -> None:
    """Let torch's CPU operators take ``threads`` threads; for 0, no more than this process may use processors."""
    count = engine_threads(threads)
    if threads or 0 < count < torch.get_num_threads():
        torch.set_num_threads(count)


def find_device(name: str) -> torch.device:
    """auto: the first GPU where torch has one, else the CPU. Raises EngineError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        if name.startswith("cuda") and not has_driver():
            raise EngineError(f"torch cannot use device {name}: {NO_DRIVER}") from error
        raise EngineError(f"torch cannot use device {name}: {first_line(error)}") from error
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"device must be auto, cpu or cuda:N, not {name}")
    return device
