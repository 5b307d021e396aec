"""Sampling that stays on a GPU: the loop of `sampling.run` over an engine that reads and writes memory there.

A batch is one CUDA graph, for each number of images and steps: seed, index, labels and noise levels are in memory, so
that the next batch is the same graph again. It is computed while the one before it leaves for the host.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.cuda.arrays import DeviceImages, DeviceNoise
from cm_runtime.cuda.captured_batch import CapturedBatch
from cm_runtime.cuda.device import Device, Leaving
from cm_runtime.cuda.engine import Engine
from cm_runtime.cuda.layout import Layout
from cm_runtime.cuda.request_writer import Noise, RequestWriter
from cm_runtime.errors import EngineError, OutOfMemoryError
from cm_runtime.extras import has, has_driver
from cm_runtime.projections import Edit, map_arrays
from cm_runtime.request import Request
from cm_runtime.sampling import NOT_FINITE, Batch, labels_of, not_finite

LOG = logging.getLogger("cm_runtime")
MOST_PREPARED = 4  # numbers of images and steps whose memory is kept
CUDA = re.compile(r"cuda(:\d+)?")
SLOTS = 2  # batches on their way: one is computed while one leaves


def can_stay(device: str) -> bool:
    """True if sampling on cuda:N can stay there; where a package is missing, a line says so. Never on the CPU."""
    if not CUDA.fullmatch(device) or not has_driver():  # the engine says what is wrong
        return False
    if not has("cuda.bindings"):
        LOG.warning(
            "images go through the host after each step; cuda.bindings is missing: pip install 'cm-runtime[gpu]'"
        )
        return False
    return True


def open_device(device: str) -> Device | None:
    """The GPU of cuda:N, where `can_stay`; else None. Raises EngineError where it is not there."""
    return Device(device_index(device)) if can_stay(device) else None


def device_index(device: str) -> int:
    """N of cuda:N, 0 of cuda. Raises EngineError for what is neither."""
    if not CUDA.fullmatch(device):
        raise EngineError(f"device must be auto or cuda:N here, not {device}")
    return int(device.partition(":")[2] or 0)


class OnDevice:
    """The batches of an engine on a device, from any thread, several requests at once.

    follow: puts the device's stream behind what the caller has queued elsewhere and an evaluation reads. trim: gives
    back what the engine's package keeps of freed memory. The engine may own this, so it is an argument, and no part.
    """

    def __init__(
        self, device: Device, follow: Callable[[], None] = lambda: None, trim: Callable[[], None] = lambda: None
    ) -> None:
        self.device, self._follow, self._trim = device, follow, trim
        self._prepared: OrderedDict[tuple[Any, ...], PreparedBatch] = OrderedDict()
        self._most = sys.maxsize  # images at once that memory lasts for, as far as is known

    def noise(self, source: Any) -> DeviceNoise:
        """A caller's array in this GPU's memory, read there. Raises RequestError."""
        return DeviceNoise.of(source, self.device)

    def draw(self, engine: Engine, request: Request, noise: Noise = None) -> DeviceImages:
        """Draw a request's uint8 images, which stay in the GPU's memory, each batch in its place."""
        c, h, w = engine.manifest.image_shape
        images = DeviceImages.take(self.device, (request.count, h, w, c))
        for _ in self.batches(engine, request, noise, images):
            pass
        return images

    def batches(
        self, engine: Engine, request: Request, noise: Noise = None, images: DeviceImages | None = None
    ) -> Iterator[Batch]:
        """`sampling.batches`. Where memory does not last, batches halve, and a line says so.

        images: the request's, which stay there in place of going to the host.
        """
        pending: deque[Pending] = deque()
        first = 0
        try:
            while first < request.count:
                count = min(request.micro_batch, self._most, request.count - first)
                if len(pending) == SLOTS:
                    yield pending.popleft().wait()
                try:
                    pending.append(self._start(engine, request, range(first, first + count), noise, images))
                except OutOfMemoryError as error:
                    if count == 1:
                        raise
                    reason = str(error)
                else:
                    first += count
                    continue
                while pending:
                    yield pending.popleft().wait()
                self._halve(count, reason)
            while pending:
                yield pending.popleft().wait()
        finally:
            for batch in pending:  # a caller that stopped early: nothing may be on its way
                with suppress(EngineError):  # of images that nobody asks for any more
                    batch.wait()

    def _start(
        self, engine: Engine, request: Request, numbers: range, noise: Noise, images: DeviceImages | None
    ) -> Pending:
        """Put images of a request in the stream; a variable of `batches` would keep what failed."""
        first, count = numbers.start, len(numbers)
        index = np.arange(count, dtype=np.uint64) + np.uint64(request.start + first)
        labels = labels_of(request, index, engine.manifest.num_classes)
        if isinstance(noise, DeviceNoise):
            noise = noise.part(first, count)
        elif noise is not None:
            noise = noise[:, first : first + count]
        target = images and images.part(first, count)
        part = replace(request, edit=request.edit and request.edit.part(first, count))
        with self.device.use("sampling"):
            self._follow()
            prepared = self.prepare(engine, part, count, noise is not None)
            return prepared.start(engine, part, index, labels, noise, target)

    def prepare(self, engine: Engine, request: Request, count: int, has_noise: bool = False) -> PreparedBatch:
        """Return memory for batches of ``count``, and later their graph. Raises OutOfMemoryError."""
        key = count, len(request.sigmas), request.clip, request.output, has_noise, _kind(request.edit)
        with self.device.use("preparing a batch"):
            if key not in self._prepared:
                if len(self._prepared) == MOST_PREPARED:
                    self._prepared.popitem(last=False)
                layout = Layout.plan(engine, request, count, has_noise)
                self._prepared[key] = PreparedBatch(engine, self.device, layout, request)
                self.device.follow()  # what the engine has put in the legacy stream to begin with
            self._prepared.move_to_end(key)
            return self._prepared[key]

    def _halve(self, count: int, reason: str) -> None:
        """Free what there is, so that half of ``count`` finds room."""
        with self.device.use("freeing memory"):
            self._prepared.clear()
            self._trim()
            self._most = -(-count // 2)
        LOG.warning("%s; going on with %d images at once in place of %d", reason, self._most, count)


def _kind(edit: Edit | None) -> Any:
    """The part of an edit that a graph depends on: its projection, with the shapes of its arrays."""
    return edit and (edit.project and map_arrays(edit.project, np.shape),)


class PreparedBatch:
    """A captured batch, and the ways in and out for each batch that is on its way."""

    def __init__(self, engine: Engine, device: Device, layout: Layout, request: Request) -> None:
        self._device, self._layout = device, layout
        self._manifest, self._graph = engine.manifest, engine.graph
        self.batch = CapturedBatch(engine, device, layout, request)
        self._slots = [self._new_slot() for _ in range(SLOTS)]

    def _new_slot(self) -> tuple[RequestWriter, Leaving]:
        addresses, size = self.batch.addresses, self._layout.block.places["result"][1]
        writer = RequestWriter(self._manifest, self._graph, self._device, self._layout, addresses)
        return writer, Leaving(self._device, size)

    def start(
        self,
        engine: Engine,
        request: Request,
        index: NDArray[np.uint64],
        labels: NDArray[np.int64] | None,
        noise: Noise,
        target: DeviceImages | None,
    ) -> Pending:
        """Put a batch in the stream, whose use is the caller's. target: place of its images where they stay here."""
        writer, leaving = self._slots.pop() if self._slots else self._new_slot()  # another request may have them all
        try:
            writer.write(request, int(index[0]), labels, noise)
            self.batch.put(engine)
            result, size = self.batch.addresses["result"], self._layout.block.places["result"][1]
            if target is not None:
                size = self._layout.front  # what says whether they are finite
                self._device.move(target.address, result + size, target.nbytes)
            leaving.start(result, size)
        except BaseException:
            with suppress(EngineError):  # what is in the streams may still use this memory, which may now be freed
                self._device.finish()
                leaving.finish()
            raise
        return Pending(self, writer, leaving, index, labels, target)

    def collect(self, pending: Pending) -> Any:
        """The images of a batch, (N,H,W,C), the caller's. Raises EngineError for what is not finite."""
        writer, leaving, count = pending.writer, pending.leaving, len(pending.index)
        content = leaving.wait()
        try:
            layout = self._layout
            n, c, h, w = layout.images[:4]
            if layout.flags:
                finite = content[:count] != 0
                if not finite.all():
                    raise not_finite(finite)
            elif content[:4].view(np.int32)[0]:
                raise EngineError(NOT_FINITE)
            if pending.target is not None:
                return pending.target
            return np.array(content[layout.front :].view(layout.result_type).reshape(n, h, w, c)[:count])
        finally:
            writer.release()
            if len(self._slots) < SLOTS:
                self._slots.append((writer, leaving))


@dataclass(frozen=True)
class Pending:
    """A batch that is in the stream."""

    prepared: PreparedBatch
    writer: RequestWriter
    leaving: Leaving
    index: NDArray[np.uint64]
    labels: NDArray[np.int64] | None
    target: DeviceImages | None

    def wait(self) -> Batch:
        """The batch when it is there. Raises EngineError."""
        return Batch(self.index, self.labels, self.prepared.collect(self))
