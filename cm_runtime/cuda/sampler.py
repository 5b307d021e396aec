"""Sampling that stays on a GPU: the loop of `sampling.run` over an engine that reads and writes memory there.

A batch is one CUDA graph, for each number of images and steps: seed, index, labels and noise levels are in memory, so
that the next batch is the same graph again. It is computed while the one before it leaves for the host.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.cuda.captured_batch import CapturedBatch
from cm_runtime.cuda.device import Device, Leaving
from cm_runtime.cuda.engine import Engine
from cm_runtime.cuda.layout import Layout
from cm_runtime.cuda.request_writer import RequestWriter
from cm_runtime.errors import EngineError, OutOfMemoryError
from cm_runtime.extras import has, has_driver
from cm_runtime.projections import Edit, map_arrays
from cm_runtime.request import Request
from cm_runtime.sampling import NOT_FINITE, Array, Batch, labels_of, not_finite

LOG = logging.getLogger("cm_runtime")
MOST_PREPARED = 4  # numbers of images and steps whose memory is kept
SLOTS = 2  # batches on their way: one is computed while one leaves


def can_stay(device: str) -> bool:
    """True if sampling on cuda:N can stay there; where not, a line says why. Never on the CPU."""
    if device.partition(":")[0] != "cuda":
        return False
    if device not in ("cuda", "cuda:0"):
        reason = "only on the first GPU do they stay there (CUDA_VISIBLE_DEVICES chooses it)"
    elif not has("pycuda"):
        reason = "pycuda is missing: pip install 'cm-runtime[pycuda]'"
    else:
        return True
    if not has_driver():
        return False  # the engine says so
    LOG.warning("images go through the host after each step; %s", reason)
    return False


class OnDevice:
    """The batches of an engine on a device."""

    def __init__(self, engine: Engine, device: Device) -> None:
        self._engine, self.device = engine, device
        self._prepared: OrderedDict[tuple[Any, ...], PreparedBatch] = OrderedDict()

    def batches(self, request: Request, noise: Array | None = None) -> Iterator[Batch]:
        """`sampling.batches`. Where memory does not last, batches halve, and a line says so."""
        pending: deque[Pending] = deque()
        first = 0
        try:
            while first < request.count:
                count = min(request.micro_batch, request.count - first)
                index = np.arange(count, dtype=np.uint64) + np.uint64(request.start + first)
                labels = labels_of(request, index, self._engine.manifest.num_classes)
                z = None if noise is None else noise[:, first : first + count]
                part = replace(request, edit=request.edit and request.edit.part(first, count))
                try:
                    prepared = self.prepare(part, count, z is not None)
                    while len(pending) >= SLOTS or (pending and pending[0].prepared.is_full):
                        yield pending.popleft().wait()
                    pending.append(prepared.start(part, index, labels, z))
                except OutOfMemoryError as error:
                    if count == 1:
                        raise
                    reason = str(error)
                else:
                    first += count
                    continue
                while pending:
                    yield pending.popleft().wait()
                self._prepared.clear()
                LOG.warning("%s; going on with %d images at once in place of %d", reason, -(-count // 2), count)
                request = replace(request, micro_batch=-(-count // 2))
            while pending:
                yield pending.popleft().wait()
        finally:
            for batch in pending:  # a caller that stopped early: nothing may be on its way
                with suppress(EngineError):  # of images that nobody asks for any more
                    batch.wait()

    def prepare(self, request: Request, count: int, has_noise: bool = False) -> PreparedBatch:
        """Return memory for batches of ``count``, and later their graph. Raises OutOfMemoryError."""
        key = count, len(request.sigmas), request.clip, request.output, has_noise, _kind(request.edit)
        if key not in self._prepared:
            if len(self._prepared) == MOST_PREPARED:
                self.device.finish()  # nothing may be using what is freed
                self._prepared.popitem(last=False)
            layout = Layout.plan(self._engine, request, count, has_noise)
            self._prepared[key] = PreparedBatch(self._engine, self.device, layout, request)
        self._prepared.move_to_end(key)
        return self._prepared[key]


def _kind(edit: Edit | None) -> Any:
    """The part of an edit that a graph depends on: its projection, with the shapes of its arrays."""
    return edit and (edit.project and map_arrays(edit.project, np.shape),)


class PreparedBatch:
    """A captured batch, and the ways in and out for two batches at a time."""

    def __init__(self, engine: Engine, device: Device, layout: Layout, request: Request) -> None:
        self._device, self._layout = device, layout
        self.batch = CapturedBatch(engine, device, layout, request)
        addresses, size = self.batch.addresses, layout.block.places["result"][1]
        self._result = addresses["result"]
        self._slots = [(RequestWriter(engine, device, layout, addresses), Leaving(device, size)) for _ in range(SLOTS)]

    @property
    def is_full(self) -> bool:
        """True if two batches are on their way."""
        return not self._slots

    def start(
        self, request: Request, index: NDArray[np.uint64], labels: NDArray[np.int64] | None, noise: Array | None
    ) -> Pending:
        """Put a batch in the stream."""
        writer, leaving = self._slots.pop()
        try:
            writer.write(request, int(index[0]), labels, noise)
            self.batch.put()
            leaving.start(self._result)
        except BaseException:
            with suppress(EngineError):  # what is in the stream may still use this memory, which may now be freed
                self._device.finish()
            self._slots.append((writer, leaving))
            raise
        return Pending(self, writer, leaving, index, labels)

    def collect(self, writer: RequestWriter, leaving: Leaving, count: int) -> NDArray[Any]:
        """The first ``count`` images of a batch, (N,H,W,C), the caller's. Raises EngineError for what is not finite."""
        content = leaving.wait()
        self._slots.append((writer, leaving))
        writer.release()
        layout = self._layout
        n, c, h, w = layout.images[:4]
        if layout.flags:
            finite = content[:count] != 0
            if not finite.all():
                raise not_finite(finite)
        elif content[:4].view(np.int32)[0]:
            raise EngineError(NOT_FINITE)
        return np.array(content[layout.front :].view(layout.result_type).reshape(n, h, w, c)[:count])


@dataclass(frozen=True)
class Pending:
    """A batch that is in the stream."""

    prepared: PreparedBatch
    writer: RequestWriter
    leaving: Leaving
    index: NDArray[np.uint64]
    labels: NDArray[np.int64] | None

    def wait(self) -> Batch:
        """The batch when it is there. Raises EngineError."""
        return Batch(self.index, self.labels, self.prepared.collect(self.writer, self.leaving, len(self.index)))
