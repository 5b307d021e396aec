"""f on torch: checkpoints run as they are, the reference that other engines are held to; or compiled."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cm_runtime.backends.base import ON_CPU, Backend, EngineOptions
from cm_runtime.backends.torch_settings import Products, products
from cm_runtime.backends.torch_stream import TORCH_TYPES, TorchGraph, array_at, on_stream
from cm_runtime.backends.torch_unet import InferenceModel, InferenceUNet
from cm_runtime.choices import GraphKind
from cm_runtime.cuda.device import Device
from cm_runtime.cuda.engine import Captured, Evaluate
from cm_runtime.cuda.sampler import OnDevice, open_device
from cm_runtime.errors import EngineError, OutOfMemoryError
from cm_runtime.errors.reasons import compiler_reason, first_line
from cm_runtime.extras import NO_DRIVER, has_driver
from cm_runtime.kernels.launches import Images, Type
from cm_runtime.manifest import OUTPUTS, Manifest
from cm_runtime.networks.consistency import ConsistencyModel
from cm_runtime.request import Request
from cm_runtime.sampling import Array, Batch
from cm_runtime.subprocesses import engine_threads

LOG = logging.getLogger("cm_runtime")
TYPES: dict[str, Type] = {"fp16": "fp16", "bf16": "bf16"}  # of the weights by precision; others have float32
MOST_BATCH_SIZES = 256  # that are compiled, each apart; torch by itself gives up after 8


class TorchBackend(Backend):
    """f on torch: in fp32 on a CPU the module itself, in evaluation mode for each evaluation, else `InferenceModel`.

    The latter holds one copy of the weights, in its type and on the device.

    Args:
        model: f. It stays where it is, and as it is.
        manifest: of its checkpoint.
        options: fp16 and bf16 have statistics, the last convolution and skip-scaling in float32; tf32 is of GPUs alone;
            auto is fp32. torch.compile compiles once for each batch size, at its first use; never in parts.

    Raises:
        EngineError: There is no such device, or it has no such precision.
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
        self.manifest = manifest
        self.device = str(device)
        self.precision = "fp32" if options.precision == "auto" else options.precision
        self.version = f"torch {torch.__version__}"
        self.outputs = OUTPUTS[manifest.graph]
        if self.precision == "tf32" and device.type == "cpu":
            raise EngineError("tf32 is a precision of GPUs; on the CPU take fp32")
        self._type = TORCH_TYPES[TYPES.get(self.precision, "fp32")]
        self._products: Products = "tf32" if self.precision == "tf32" else "ieee"
        self._is_compiled = options.backend == "torch.compile"
        self._process = os.getpid()
        self.on_device = self._open_device(device)
        self._f = self._build(model, device)
        self._run: Callable[..., torch.Tensor] = self._f
        if self._is_compiled:
            self.name = "torch.compile"
            limits: Any = importlib.import_module("torch._dynamo").config
            limits.recompile_limit = max(limits.recompile_limit, MOST_BATCH_SIZES)
            mode = "max-autotune" if device.type == "cuda" else "default"
            self._run = torch.compile(self._f, fullgraph=True, dynamic=False, mode=mode)

    def _build(self, model: ConsistencyModel, device: torch.device) -> ConsistencyModel | InferenceModel:
        """f as it is evaluated. On a GPU it is in one type and layout; ``model`` stays where it is."""
        if device.type == "cpu" and self._type is torch.float32:
            return model
        return InferenceModel(model, self._type).to(device)

    def evaluate(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """One evaluation of f on checked inputs; see `Backend`."""
        if self._process != os.getpid() and torch.get_num_threads() > 1:
            raise EngineError(
                "torch was at work before this process was forked, and would hang: start it by spawn, or take 1 thread"
            )
        was_training = self._f.training
        self._f.eval()
        try:
            with torch.inference_mode(), products(self._products):
                x0 = self._run(*(self._tensor(each) for each in feed.values()))
                return np.asarray(x0.cpu().numpy(), np.float32)
        except Exception as error:  # a compiler's errors are of many kinds
            if not self._is_compiled and not isinstance(error, RuntimeError):
                raise
            raise EngineError(f"{self.name}: {compiler_reason(error)}") from error
        finally:
            self._f.train(was_training)

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
        """NHWC in the weights' type; F is float32."""
        return Images(count, *self.manifest.image_shape, TYPES.get(self.precision, "fp32"), "nhwc", "fp32")

    def bind(self, device: Device, count: int) -> Evaluate:
        """F, compiled where this backend compiles f."""
        images, kind, engine, computed_in = self.images(count), torch.device(self.device), self.name, self._products
        names = ("x_in", "c_noise", "label") if self.manifest.num_classes else ("x_in", "c_noise")
        network = self._network()
        tensors: dict[tuple[str, int], torch.Tensor] = {}  # made once: CUDA is asked about each

        def at(name: str, address: int) -> torch.Tensor:
            if (name, address) not in tensors:
                tensors[name, address] = array_at(name, address, images, kind)
            return tensors[name, address]

        def evaluate(addresses: Mapping[str, int]) -> None:
            try:
                with torch.inference_mode(), on_stream(device.stream, kind), products(computed_in):
                    F = network(*(at(name, addresses[name]) for name in names))
                    at("F", addresses["F"]).copy_(F)
            except torch.OutOfMemoryError as error:
                raise OutOfMemoryError(f"torch: {first_line(error)}") from error
            except RuntimeError as error:
                raise EngineError(f"{engine}: {first_line(error)}") from error

        return evaluate

    def capture(self, device: Device, body: Callable[[], Any]) -> Captured | None:
        """The whole loop in one graph, in a pool of torch's allocator; a line says where there is none."""
        with suppress(OutOfMemoryError):
            return self._capture(device, body)
        device.finish()
        torch.cuda.empty_cache()  # of what the run before it took, which no capture can free
        return self._capture(device, body)

    def _capture(self, device: Device, body: Callable[[], Any]) -> Captured | None:
        try:
            return TorchGraph(device, torch.device(self.device), body)
        except OutOfMemoryError:
            raise
        except (EngineError, RuntimeError) as error:
            LOG.warning("%s evaluates without a CUDA graph: %s", self.name, first_line(error))
            return None

    def _network(self) -> Callable[..., torch.Tensor]:
        network = self._f.F if isinstance(self._f, InferenceModel) else InferenceUNet(self._f.F, self._type)
        if not self._is_compiled:
            return network
        # Graphs are ours: those that max-autotune itself captures cannot be inside of another.
        return torch.compile(network, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self.device)


class TorchReference(TorchBackend):
    """The published module itself, on any device, whose images go through the host: for training's previews."""

    def _build(self, model: ConsistencyModel, device: torch.device) -> ConsistencyModel | InferenceModel:
        return model.to(device)

    @staticmethod
    def _open_device(kind: torch.device) -> None:
        """None: whoever trains may have no more of the GPU than torch."""


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
