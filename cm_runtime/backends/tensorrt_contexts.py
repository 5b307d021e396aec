"""The execution contexts of a TensorRT engine, one for each batch size, and what they share.

All run one after the other in one stream, so that one block of memory serves them. It is as large as the largest batch
needs; a context that was made before a larger one keeps its own, whose address may be in a captured graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cm_runtime.backends.base import Interface
from cm_runtime.backends.tensorrt_cache import load_cache, save_cache
from cm_runtime.cuda.device import Device
from cm_runtime.cuda.layout import ALIGNMENT
from cm_runtime.errors import EngineError


class Scratch:
    """Memory for what an engine computes on its way."""

    def __init__(self, device: Device, size: int) -> None:
        self.size = size
        self._memory = device.take(size)

    def __int__(self) -> int:
        return int(self._memory)


@dataclass(frozen=True, eq=False)
class BoundContext:
    """A context at one batch size, with the memory that it computes in; an `Evaluate`.

    names: of the engine's inputs and outputs.
    """

    context: Any
    scratch: Scratch
    names: tuple[str, ...]
    logger: Any
    stream: int

    def __call__(self, addresses: Mapping[str, int]) -> None:
        """Put a run in the stream. Raises EngineError, OutOfMemoryError."""
        context, require = self.context, self.logger.require
        for name in self.names:
            require(context.set_tensor_address(name, addresses[name]), f"the address of {name}")
        require(context.execute_async_v3(self.stream), "to run")


class Contexts:
    """Makes the execution contexts of ``engine``.

    tensors: its inputs and outputs at a batch size. cache: name of the file that has the kernels which TensorRT for RTX
    compiled; "" of an engine that compiles none.
    """

    def __init__(
        self, trt: Any, engine: Any, logger: Any, device: Device, tensors: Callable[[int], Interface], cache: str
    ) -> None:
        self._engine, self._logger, self._device, self._tensors = engine, logger, device, tensors
        self._bound: weakref.WeakSet[BoundContext] = weakref.WeakSet()
        self._config = config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._kernels = Kernels(trt, config, cache) if cache else None

    def bind(self, profile: int, count: int) -> BoundContext:
        """Make a context for batches of ``count``, by the profile of that number. Raises EngineError."""
        with self._device.use(f"making a context for a batch of {count}"):
            context = self._create(profile, count)
            scratch = self._share(context.update_device_memory_size_for_shapes())
            context.set_device_memory(int(scratch), scratch.size)
            self._device.follow()  # what all that has put in the legacy stream
        run = self._tensors(count)
        bound = BoundContext(context, scratch, (*run.inputs, *run.outputs), self._logger, self._device.stream)
        self._bound.add(bound)
        if self._kernels:
            self._kernels.is_saved = False
        return bound

    def _create(self, profile: int, count: int) -> Any:
        """A context with its profile and shapes."""
        require, run = self._logger.require, self._tensors(count)
        context = self._engine.create_execution_context(self._config)
        require(context is not None, f"an execution context for a batch of {count}")
        require(context.set_optimization_profile_async(profile, self._device.stream), f"profile {profile}")
        for name, (_, shape) in run.inputs.items():
            require(context.set_input_shape(name, shape), f"the shape {shape} of {name}")
        for name, (_, shape) in run.outputs.items():
            if (actual := tuple(context.get_tensor_shape(name))) != shape:
                raise EngineError(f"the engine makes {name} {actual}, not {shape}")
        return context

    @property
    def are_capturable(self) -> bool:
        """True if their runs may be captured as a graph. TensorRT for RTX says so; of TensorRT's own all may."""
        stream = self._device.stream
        return self._kernels is None or all(bound.context.is_stream_capturable(stream) for bound in self._bound)

    def save(self) -> None:
        """Keep the kernels that were compiled since the last time."""
        if self._kernels:
            self._kernels.save()

    def _share(self, size: int) -> Scratch:
        """The memory of the contexts so far if it is large enough, or a larger block, for those that come too."""
        size = max(size, ALIGNMENT)  # a context without any cannot run
        largest = max((bound.scratch for bound in self._bound), key=lambda scratch: scratch.size, default=None)
        return largest if largest and largest.size >= size else Scratch(self._device, size)


class Kernels:
    """The kernels that TensorRT for RTX compiles for the shapes it meets, kept for the next process.

    It compiles them before a shape's first run, and not in the background: a graph would keep the slow ones for ever.
    """

    def __init__(self, trt: Any, config: Any, name: str) -> None:
        self._name, self.is_saved = name, True
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._cache = cache = config.create_runtime_cache()
        if content := load_cache(name):
            cache.deserialize(content)  # False, and nothing done, where it is another version's or GPU's
        config.set_runtime_cache(cache)

    def save(self) -> None:
        """Write all kernels, if there may be new ones."""
        if not self.is_saved:
            save_cache(self._name, bytes(self._cache.serialize()))
            self.is_saved = True
