"""Sampling that stays on a GPU: the loop of `sampling.run` over an engine that reads and writes memory there.

A batch is one CUDA graph, for each number of images and steps: seed, index, labels and noise levels are in memory, so
that the next batch is the same graph again. It is computed while the one before it leaves for the host.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cm_runtime.choices import GraphKind
from cm_runtime.cuda import Device, DeviceSteps, Leaving, Places
from cm_runtime.errors import EngineError, OutOfMemoryError
from cm_runtime.extras import has, has_driver
from cm_runtime.kernels import launches
from cm_runtime.kernels.launches import LEVEL, REQUEST, SIZES, Images, Placed
from cm_runtime.manifest import Manifest
from cm_runtime.precond import precond
from cm_runtime.projections import Edit, Projection, map_arrays
from cm_runtime.request import Request
from cm_runtime.sampling import NOT_FINITE, Array, Batch, labels_of, not_finite, run

LOG = logging.getLogger("cm_runtime")
MOST_PREPARED = 4  # numbers of images and steps whose memory is kept
APART = 256  # bytes, that arrays begin at multiples of
FLAG = 16  # bytes in front of the images that say whether they are finite; a sampler graph's, a byte an image

# Puts one evaluation in the device's stream: addresses of the graph's inputs and output, by their names.
Evaluate = Callable[[Mapping[str, int]], None]


class Captured(Protocol):
    """A graph, which goes into the stream as a whole."""

    def launch(self) -> None: ...


class Engine(Protocol):
    """What a backend does on a GPU.

    graph: what one evaluation computes, f (denoiser), F (network) or the whole loop (sampler). outputs: those of the
    graph's that are read.
    """

    manifest: Manifest

    @property
    def outputs(self) -> tuple[str, ...]: ...

    @property
    def graph(self) -> GraphKind: ...

    def images(self, count: int) -> Images:
        """A batch as the graph takes it, at least ``count``: its type and layout."""
        ...

    def bind(self, device: Device, count: int) -> Evaluate:
        """Evaluations of a batch of ``count`` in the device's stream. Raises EngineError."""
        ...

    def capture(self, device: Device, body: Callable[[], Any]) -> Captured | None:
        """What ``body`` puts in the stream, or None where such evaluations cannot be captured."""
        ...


def can_stay(device: str) -> bool:
    """Whether sampling on cuda:N can stay there; where not, a line says why. Never on the CPU."""
    if device.partition(":")[0] != "cuda":
        return False
    if device not in ("cuda", "cuda:0"):
        why = "only on the first GPU do they stay there (CUDA_VISIBLE_DEVICES chooses it)"
    elif not has("pycuda"):
        why = "pycuda is missing: pip install 'cm-runtime[pycuda]'"
    else:
        return True
    if not has_driver():
        return False  # the engine says so
    LOG.warning("images go through the host after each step; %s", why)
    return False


class OnDevice:
    """The batches of an engine on a device."""

    def __init__(self, engine: Engine, device: Device) -> None:
        self._engine, self.device = engine, device
        self._prepared: OrderedDict[tuple[Any, ...], Prepared] = OrderedDict()

    def batches(self, chosen: Request, noise: Array | None = None) -> Iterator[Batch]:
        """`sampling.batches`. Where memory does not last, batches halve, and a line says so."""
        waiting: deque[tuple[Prepared, int, NDArray[np.uint64], NDArray[np.int64] | None]] = deque()
        first = 0
        try:
            while first < chosen.count:
                count = min(chosen.micro_batch, chosen.count - first)
                index = np.arange(count, dtype=np.uint64) + np.uint64(chosen.start + first)
                labels = labels_of(chosen, index, self._engine.manifest.num_classes)
                given = None if noise is None else noise[:, first : first + count]
                part = replace(chosen, edit=chosen.edit and chosen.edit.part(first, count))
                try:
                    prepared = self.prepare(part, count, given is not None)
                    while len(waiting) > 1 or (waiting and waiting[0][0].is_full):
                        yield _collected(*waiting.popleft())
                    waiting.append((prepared, prepared.start(part, index, labels, given), index, labels))
                except OutOfMemoryError as error:
                    if count == 1:
                        raise
                    said = str(error)
                else:
                    first += count
                    continue
                while waiting:
                    yield _collected(*waiting.popleft())
                self._prepared.clear()
                LOG.warning("%s; going on with %d images at once in place of %d", said, -(-count // 2), count)
                chosen = replace(chosen, micro_batch=-(-count // 2))
            while waiting:
                yield _collected(*waiting.popleft())
        finally:
            for prepared, slot, _, _ in waiting:  # a caller that stopped early: nothing may be on its way
                with suppress(EngineError):  # of images that nobody asks for any more
                    prepared.wait(slot)

    def prepare(self, chosen: Request, count: int, has_noise: bool = False) -> Prepared:
        """Memory for batches of ``count``, and later their graph. Raises OutOfMemoryError."""
        key = count, len(chosen.sigmas), chosen.clip, chosen.output, has_noise, _kind(chosen.edit)
        if key not in self._prepared:
            if len(self._prepared) == MOST_PREPARED:
                self.device.finish()  # nothing may be using what is freed
                self._prepared.popitem(last=False)
            self._prepared[key] = Prepared(self._engine, self.device, chosen, count, has_noise)
        self._prepared.move_to_end(key)
        return self._prepared[key]


def _kind(edit: Edit | None) -> Any:
    """What of an edit a graph depends on: its projection, with the shapes of what that is given."""
    return edit and (edit.project and map_arrays(edit.project, np.shape),)


def _collected(prepared: Prepared, slot: int, index: NDArray[np.uint64], labels: NDArray[np.int64] | None) -> Batch:
    return Batch(index, labels, prepared.wait(slot, len(index)))


@dataclass(frozen=True)
class Block:
    """Arrays side by side in one allocation, each at a multiple of 256 bytes: name -> offset, size."""

    places: dict[str, tuple[int, int]]
    size: int

    @classmethod
    def of(cls, **sizes: int) -> Block:
        """Of arrays of so many bytes; those of none have no place."""
        places, end = {}, 0
        for name, size in sizes.items():
            if size:
                places[name] = end, size
                end = -(-(end + size) // APART) * APART
        return cls(places, end)

    def at(self, base: int) -> dict[str, int]:
        """Addresses, 0 for a name that has no place."""
        return {name: base + offset for name, (offset, _) in self.places.items()}


class Prepared:
    """Memory, and a graph, for batches of so many images in so many steps."""

    def __init__(self, engine: Engine, device: Device, chosen: Request, count: int, has_noise: bool) -> None:
        self._manifest = manifest = engine.manifest
        self._device, self._steps = device, len(chosen.sigmas)
        self._images = images = engine.images(count)
        self._evaluate = engine.bind(device, images.n)
        self._clip, self._sigmas = chosen.clip, chosen.sigmas
        graph, n, elements = engine.graph, images.n, images.elements
        self._result_type = np.dtype(np.uint8 if chosen.output == "uint8" else np.float32)
        given = _arrays(chosen.edit, images) if chosen.edit else {}
        project = chosen.edit.project if chosen.edit else None
        self._project = _padded_projection(project, n) if project else None
        self._flags = images.n if "finite" in engine.outputs else 0
        self._front = -(-self._flags // APART) * APART or FLAG  # bytes before the images
        self._parameters = Block.of(
            request=REQUEST.itemsize,
            levels=(self._steps + 1) * LEVEL.itemsize,
            told=0 if graph == "sampler" else self._steps * n * 4,
            label=n * 8 if manifest.num_classes else 0,
        )
        self._block = Block.of(
            parameters=self._parameters.size,
            noise=self._steps * elements * 4 if has_noise or graph == "sampler" else 0,
            **{name: array.nbytes for name, array in given.items()},
            x=0 if graph == "sampler" else elements * 4,
            x_in=elements * SIZES[images.type] if graph == "network" else 0,
            F=0 if graph == "sampler" else elements * SIZES[images.F_type],
            result=self._front + elements * self._result_type.itemsize,
        )
        self._memory = device.take(self._block.size)
        self._at = self._block.at(int(self._memory))
        self._at |= self._parameters.at(self._at["parameters"])
        self._has_noise = has_noise
        result = self._block.places["result"][1]
        self._leaving = [Leaving(device, result) for _ in range(2)]
        self._pinned = [device.pinned(self._parameters.size) for _ in range(2)]
        self._given: list[dict[str, Array]] = [{}, {}]  # what is being copied must stay
        self._free = [0, 1]
        self._engine = engine
        self._graph: Captured | None = None
        self._is_warm = False

    @property
    def is_full(self) -> bool:
        """Whether two batches are on their way."""
        return not self._free

    def start(
        self, chosen: Request, index: NDArray[np.uint64], labels: NDArray[np.int64] | None, noise: Array | None
    ) -> int:
        """Puts a batch in the stream; the number to `wait` for."""
        slot = self._free.pop()
        try:
            self._write(self._pinned[slot], chosen, int(index[0]), labels)
            self._device.put(self._at["parameters"], self._pinned[slot])
            self._given[slot] = given = _arrays(chosen.edit, self._images) if chosen.edit else {}
            if noise is not None:
                given["noise"] = np.ascontiguousarray(pad_batch(noise, self._images.n, axis=1))
            for name, array in given.items():
                self._device.put(self._at[name], array)
            self.put()
            self._leaving[slot].start(self._at["result"])
        except BaseException:
            with suppress(EngineError):  # what is in the stream may still use this memory, which may now be freed
                self._device.finish()
            self._free.append(slot)
            raise
        return slot

    def put(self) -> None:
        """Puts everything from noise to images in the stream, by the parameters that are in memory."""
        if not self._is_warm:  # once without a graph: engines do at a first run what cannot be captured
            self._body()
            self._graph = self._engine.capture(self._device, self._body)
            self._is_warm = True
        elif self._graph is not None:
            self._graph.launch()
        else:
            self._body()

    def evaluate(self, k: int = 0) -> None:
        """Puts evaluation ``k`` alone in the stream, of whatever is in memory."""
        at = self._at
        if self._engine.graph == "sampler":
            names = {"noise": at["noise"], "images": at["result"] + self._front, "finite": at["result"]}
        elif self._engine.graph == "network":
            names = {"x_in": at["x_in"], "c_noise": self._told(k), "F": at["F"]}
        else:
            names = {"x": at["x"], "sigma": self._told(k), "denoised": at["F"]}
        self._evaluate({**names, "label": at.get("label", 0)})

    def _told(self, k: int) -> int:
        return self._at["told"] + k * self._images.n * 4

    def wait(self, slot: int, count: int | None = None) -> NDArray[Any]:
        """The first ``count`` images of a batch, (N,H,W,C), the caller's. Raises EngineError for what is not finite."""
        made = self._leaving[slot].wait()
        self._free.append(slot)
        self._given[slot] = {}
        n, c, h, w = self._images[:4]
        if self._flags:
            finite = made[: n if count is None else count] != 0
            if not finite.all():
                raise not_finite(finite)
        elif made[:4].view(np.int32)[0]:
            raise EngineError(NOT_FINITE)
        return np.array(made[self._front :].view(self._result_type).reshape(n, h, w, c)[:count])

    def _write(self, pinned: NDArray[np.uint8], chosen: Request, first: int, labels: NDArray[np.int64] | None) -> None:
        """The parameters of a batch as the kernels and the network read them."""
        m, n = self._manifest, self._images.n
        form = precond(m.precond, m.sigma_data, m.sigma_boundary)
        is_network = self._engine.graph == "network"
        values: dict[str, NDArray[Any]] = {"request": np.array([(chosen.seed, first)], REQUEST)}
        if self._engine.graph == "sampler":
            values["levels"] = np.ones(self._steps + 1, np.dtype((np.float32, 4)))  # the noise itself
        else:
            values["levels"] = launches.levels(chosen.sigmas, form, m.sigma_min, is_f=not is_network)
            s = np.array(chosen.sigmas, np.float32)
            if chosen.edit and chosen.edit.is_noisy:
                values["levels"]["renoise"][0] = 0
            values["told"] = np.repeat(form.c_noise(s) if is_network else s, n)
        if labels is not None:
            values["label"] = pad_batch(labels, n)
        for name, value in values.items():
            offset, size = self._parameters.places[name]
            pinned[offset : offset + size] = np.frombuffer(value.tobytes(), np.uint8)

    def _body(self) -> None:
        """Everything from noise to images, in the stream's order."""
        at = self._at
        self._device.clear(at["result"], self._front)
        if self._engine.graph == "sampler":
            self._draw()
            return
        made = at["result"] + self._front
        is_uint8 = self._result_type == np.uint8
        places = Places(
            request=at["request"],
            levels=at["levels"],
            x=at["x"],
            x_in=at.get("x_in", 0),
            bytes=made if is_uint8 else 0,
            floats=0 if is_uint8 else made,
            not_finite=at["result"],
            noise=at["noise"] if self._has_noise else 0,
            start=at.get("start", 0),
        )
        edit = Placed(self._project, at["known"], at.get("mask", 0)) if self._project else None
        ops = DeviceSteps(self._device, self._images, places, self._steps, self._clip, edit)
        run(_Unrolled(self, at["F"]), ops, self._sigmas, at.get("label", 0))

    def _draw(self) -> None:
        """A sampler graph holds the loop; it takes all of the noise."""
        at, plain = self._at, self._images
        for k in range(0 if self._has_noise else self._steps):
            z = at["noise"] + k * plain.elements * 4
            self._device.launch(launches.first_noise(plain, at["request"], at["levels"], z, draw=k))
        self.evaluate()


class _Unrolled:
    """The denoiser that `sampling.run` sees: evaluation k reads the k-th level from memory."""

    def __init__(self, prepared: Prepared, made: int) -> None:
        self._prepared, self._made = prepared, made
        self._k = 0

    def denoise(self, x: int, sigma: float, label: int) -> int:
        self._prepared.evaluate(self._k)
        self._k += 1
        return self._made


def _arrays(edit: Edit, images: Images) -> dict[str, Array]:
    """What an edit is given, as the kernels read it, for a batch of ``images``."""
    start = pad_batch(edit.start, images.n)
    arrays = {"start": start if images.layout == "nchw" else np.moveaxis(start, 1, -1)}
    if edit.project is not None:
        padded = _padded_projection(edit.project, images.n)
        arrays |= {name: value for name, value in vars(padded).items() if isinstance(value, np.ndarray)}
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _padded_projection(project: Projection, count: int) -> Projection:
    return map_arrays(project, lambda array: array if len(array) == 1 else pad_batch(array, count))


def pad_batch(array: NDArray[Any], count: int, axis: int = 0) -> NDArray[Any]:
    """Repeat the last entry of ``array`` along ``axis`` up to ``count``, where an engine takes no fewer."""
    missing = count - array.shape[axis]
    return np.concatenate([array, np.repeat(array.take([-1], axis), missing, axis)], axis) if missing else array
