"""Cases of sampling on a GPU that test_on_driver.py runs on the stand-in for CUDA's driver, with the real bindings.

It has two devices. What is left at exit, or misused, fails the whole file.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from driver_engine import DriverEngine, HostEngine

import cm_runtime as cm
from cm_runtime.cuda import context
from cm_runtime.cuda.device import Device
from cm_runtime.cuda.driver import Gpu
from cm_runtime.errors import EngineError, OutOfMemoryError, RequestError
from cm_runtime.request import Draw, sampling_request

cu = pytest.importorskip("cuda.bindings.driver")
STANDIN = ctypes.CDLL("libcuda.so.1")
STANDIN.cm_driver_report.restype = ctypes.c_char_p
STANDIN.cm_driver_calls.restype = ctypes.c_long
BINDING = os.environ.get(context.BINDING, "cuda-bindings")
WANTED = cm.sample(HostEngine(), 10, micro_batch=3)
KIBI = 1 << 10
gc.freeze()  # what is loaded by now need not be looked at by each collection


def left() -> list[str]:
    """What lives in the driver once garbage is collected."""
    gc.collect()
    return list_left()


def list_left() -> list[str]:
    """What lives in the driver, contexts and modules apart."""
    lines = STANDIN.cm_driver_report().decode().splitlines()
    assert not [line for line in lines if line.startswith(("misuse", "unsupported"))], lines
    return [line for line in lines if "module" not in line and "context" not in line]


def current() -> int:
    """The context of this thread."""
    return int(cu.cuCtxGetCurrent()[1])


def in_thread(body: Callable[[], Any]) -> Any:
    """The body's result in a fresh thread, which is to have no context before and after."""
    results: list[Any] = []

    def run() -> None:
        assert not current()
        try:
            results.append(body())
        except BaseException as error:
            results.append(error)
        assert not current()
        results.append("end")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results[-1:] == ["end"]
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


@contextmanager
def failing(order: str) -> Iterator[None]:
    """Let calls fail, as in cuMemAlloc_v2:3:2, the third with error 2."""
    os.environ["CM_DRIVER_FAIL"] = order
    try:
        yield
    finally:
        del os.environ["CM_DRIVER_FAIL"]


@pytest.fixture
def engine() -> Iterator[DriverEngine]:
    engine = DriverEngine()
    yield engine
    del engine.on_device, engine.hooks  # pytest holds the engine
    assert not current()


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = left()
    yield
    assert left() == before


def draw(engine: Any) -> Any:
    return cm.sample(engine, 10, micro_batch=3)


# Threads


def test_the_binding_is_the_one_that_is_asked_for(engine: DriverEngine) -> None:
    opened = engine.on_device.device.context
    assert opened.driver.name == BINDING
    assert opened.gpu == Gpu("Stand-in of sm_90", "9.0")


def test_a_gpu_that_a_thread_opened_serves_others() -> None:
    """As of a torch model that is drawn ahead: its thread ends, and its context with it."""
    engines = [in_thread(lambda: DriverEngine(1))]
    for _ in range(2):
        assert np.array_equal(draw(engines[0]), WANTED)
        assert np.array_equal(in_thread(lambda: draw(engines[0])), WANTED)
    in_thread(engines.clear)


def test_every_entry_serves_any_thread(engine: DriverEngine) -> None:
    device = engine.on_device.device
    numbers = np.arange(7, dtype=np.float32)
    address = in_thread(lambda: device.send("x", numbers))
    assert np.array_equal(in_thread(lambda: device.fetch("x", (7,), numbers.dtype)), numbers)
    in_thread(lambda: device.clear(address, 4 * 7))
    assert not in_thread(lambda: device.fetch("x", (7,), numbers.dtype)).any()
    taken = [in_thread(lambda: device.take(100)), in_thread(lambda: device.pin(100))]
    address = in_thread(lambda: device.address("x", 1000))  # which moves it
    in_thread(device.follow)
    graph = [in_thread(lambda: device.capture(lambda: device.clear(address, 4)))]
    in_thread(graph[0].launch)
    in_thread(device.finish)
    in_thread(taken.clear)
    in_thread(graph.clear)
    assert np.array_equal(in_thread(lambda: draw(engine)), WANTED)


def test_streams_end_in_any_thread(engine: DriverEngine) -> None:
    request = sampling_request(engine.manifest, Draw(count=10, micro_batch=3))
    parts = engine.batches(request)
    first = in_thread(lambda: next(parts)).images
    in_thread(parts.close)
    assert np.array_equal(first, WANTED[:3])
    stream = iter(cm.stream(engine, 10, micro_batch=3))
    assert np.array_equal(next(stream).images, WANTED[:3])
    in_thread(stream.close)


def test_several_at_once(engine: DriverEngine) -> None:
    """Requests of one model in four threads, and three streams that a caller takes in turns."""
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(draw(engine))) for _ in range(4)]
    for thread in threads:
        thread.start()
    streams = [iter(cm.stream(engine, 10, micro_batch=3)) for _ in range(3)]
    for parts in itertools.zip_longest(*streams):
        assert all(np.array_equal(part.images, parts[0].images) for part in parts)
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(np.array_equal(each, WANTED) for each in found)


def test_the_callers_context_comes_back(engine: DriverEngine) -> None:
    _, theirs = cu.cuCtxCreate(None, 0, 0)
    relaxed = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    _, mode = cu.cuThreadExchangeStreamCaptureMode(relaxed)
    draw(engine)
    assert current() == int(theirs)
    assert cu.cuThreadExchangeStreamCaptureMode(mode)[1] == relaxed  # the thread's capture mode is the caller's too
    cu.cuCtxDestroy(theirs)


def test_devices_are_chosen_by_number() -> None:
    engine, contexts = DriverEngine(1), set()
    engine.hooks.evaluate = lambda: contexts.add(int(cu.cuCtxGetDevice()[1]))
    assert np.array_equal(draw(engine), WANTED)
    assert contexts == {1}
    with pytest.raises(EngineError, match=r"^there is no cuda:7; the driver shows 2 GPU\(s\)$"):
        Device(7)


# Streams and captures


def test_the_legacy_stream_works_beside_a_capture(engine: DriverEngine) -> None:
    """Torch's default stream, in which a training loop works while images are drawn ahead."""
    device, results = engine.on_device.device, []
    memory = device.take(16)

    def work() -> None:
        with device.context.current():
            results.append(int(cu.cuMemsetD32Async(int(memory), 0, 4, 0)[0]))
            results.append(int(cu.cuStreamSynchronize(0)[0]))

    engine.hooks.capture = lambda: in_thread(work)
    assert np.array_equal(draw(engine), WANTED)
    assert results and not any(results)


def test_a_capture_of_another_thread_bears_us(engine: DriverEngine) -> None:
    """Torch captures its training step in the mode in which others may not allocate, unless they say otherwise."""
    device = engine.on_device.device
    with device.context.current():
        _, stream = cu.cuStreamCreate(1)
        cu.cuStreamBeginCapture(stream, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
        assert np.array_equal(in_thread(lambda: draw(engine)), WANTED)
        error, graph = cu.cuStreamEndCapture(stream)
        assert not error
        cu.cuGraphDestroy(graph)
        cu.cuStreamDestroy(stream)


def test_nothing_is_collected_in_a_capture(engine: DriverEngine) -> None:
    """Memory of a cycle would be freed at any allocation, which CUDA forbids there."""
    device = engine.on_device.device
    device.capture(lambda: None)
    gc.disable()
    cycle: list[Any] = [device.take(16)]
    cycle.append(cycle)
    del cycle
    graphs = [device.capture(lambda: gc.collect() if gc.isenabled() else None)]
    assert not gc.isenabled()
    gc.enable()
    graphs += [device.capture(lambda: graphs.append(gc.isenabled()))]
    assert graphs[1:2] == [False] and gc.isenabled()
    graphs.clear()


def test_a_thread_captures_what_it_has_run(engine: DriverEngine) -> None:
    """cuDNN's search for kernels is a thread's, waits for the stream, and so ends a capture."""
    thread, stream = threading.local(), engine.on_device.device.stream

    def search() -> None:
        if not hasattr(thread, "is_warm"):
            cu.cuStreamSynchronize(stream)
            thread.is_warm = True

    engine.hooks.evaluate = search
    for graphs in ([], ["1"], ["1"]):
        assert np.array_equal(in_thread(lambda: cm.sample(engine, 3)), WANTED[:3])
        assert [line.split()[1] for line in left() if "executable" in line] == graphs


def test_a_capture_whose_body_raises_leaves_no_graph(engine: DriverEngine) -> None:
    device = engine.on_device.device
    before = left()

    def body() -> None:
        device.clear(device.address("x", 16), 16)
        raise KeyboardInterrupt

    device.address("x", 16)
    with pytest.raises(KeyboardInterrupt):
        device.capture(body)
    device.capture(lambda: device.clear(device.address("x", 16), 16)).launch()
    device.finish()
    assert [line for line in left() if "graph" in line] == [line for line in before if "graph" in line]


def test_a_capture_that_cannot_be_is_one_line(engine: DriverEngine) -> None:
    """As where an engine waits for the stream; the stream is of use afterwards."""
    engine.hooks.capture = lambda: cu.cuStreamSynchronize(engine.on_device.device.stream) and None
    reason = r"^CUDA failed while capturing a graph: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED in cuStreamEndCapture$"
    with pytest.raises(EngineError, match=reason):
        draw(engine)
    engine.hooks.capture = lambda: None
    assert np.array_equal(draw(engine), WANTED)


def test_what_another_stream_wrote_comes_first(engine: DriverEngine) -> None:
    """Weights that torch copies in its own stream: without `follow` the stand-in reads them too early."""
    device = engine.on_device.device
    memory, pinned = device.take(16), device.pin(16)
    device.address("x", 16)
    pinned[:] = 7
    with device.context.current():
        cu.cuMemcpyHtoDAsync(int(memory), pinned.ctypes.data, 16, 0)
    device.follow()
    device.move(device.address("x", 16), int(memory), 16)
    assert (device.fetch("x", (16,), np.dtype(np.uint8)) == 7).all()


def test_sampling_comes_behind_what_other_streams_wrote(engine: DriverEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's, for each batch; and, of a new batch size, what the engine has put in the legacy stream."""
    log: list[str] = []
    monkeypatch.setattr(Device, "follow", lambda *_: log.append("legacy"))
    engine.hooks.follow, engine.hooks.evaluate = (lambda: log.append("caller")), (lambda: log.append("evaluate"))
    cm.sample(engine, 6, 1, micro_batch=3)
    assert log == ["caller", "legacy", "evaluate", "caller", "evaluate"]


def test_captured_graphs_are_reused_and_bounded(engine: DriverEngine) -> None:
    for size in (1, 2, 3, 4, 5, 1, 2):
        cm.sample(engine, 3 * size, micro_batch=size)
    assert engine.bound == [1, 2, 3, 4, 5, 1, 2]  # the four of late are kept
    cm.sample(engine, 50, micro_batch=5)
    assert engine.bound[7:] == []
    assert [line for line in left() if "executable" in line] == ["left 4 executable graphs"]


# Memory and failures


@contextmanager
def room(device: Device, size: int) -> Iterator[None]:
    """While it lasts, the GPU has ``size`` bytes left, but for what is too small to hold."""
    with device.context.current():
        _, free, _ = cu.cuMemGetInfo()
    ballast = device.take(free - size)
    yield
    ballast.close()


def memory_of(engine: DriverEngine, size: int) -> int:
    """Bytes that a batch of that size takes."""
    with engine.on_device.device.context.current():
        _, before, _ = cu.cuMemGetInfo()
        cm.sample(engine, size, micro_batch=size)
        _, after, _ = cu.cuMemGetInfo()
    engine.on_device._prepared.clear()
    return int(before) - int(after)


@pytest.mark.parametrize("when", ["memory", "evaluation"])
def test_halving_frees_what_failed(engine: DriverEngine, caplog: pytest.LogCaptureFixture, when: str) -> None:
    """With room for 64 images, or a little less; and half of them only where nothing of the 64 is held."""
    device, wanted = engine.on_device.device, cm.sample(HostEngine(), 100, micro_batch=64)
    whole = memory_of(engine, 64)
    engine.bound.clear()
    trims: list[int] = []
    engine.hooks.trim = lambda: trims.append(len(engine.on_device._prepared))

    def refuse() -> None:
        if engine.bound == [64]:
            raise OutOfMemoryError("torch: CUDA out of memory")

    engine.hooks.evaluate = refuse if when == "evaluation" else engine.hooks.evaluate
    with room(device, whole - (16 * KIBI if when == "memory" else 0)), caplog.at_level(logging.WARNING, "cm_runtime"):
        assert np.abs(cm.sample(engine, 100, micro_batch=64).astype(int) - wanted).max() <= 1
        cm.sample(engine, 100, micro_batch=64)
    (record,) = caplog.records  # the next request begins with what fits
    assert record.getMessage().endswith("going on with 32 images at once in place of 64")
    assert engine.bound[:2] == [64, 32] and trims == [0]


def test_no_memory_for_one_image_is_one_line(engine: DriverEngine) -> None:
    reason = r"^CUDA has no memory left while taking .*CUDA_ERROR_OUT_OF_MEMORY"
    with room(engine.on_device.device, 4 * KIBI), pytest.raises(OutOfMemoryError, match=reason):
        draw(engine)
    engine.on_device._most = 4
    assert draw(engine).shape == WANTED.shape


def test_a_model_that_is_dropped_gives_its_memory_back() -> None:
    """At once: there is no cycle that waits for the collector."""
    before = left()
    gc.disable()
    try:
        engine = DriverEngine()
        draw(engine)
        model = weakref.ref(engine)
        del engine
        assert model() is None
        assert list_left() == before
    finally:
        gc.enable()


CALLS = [
    *("cuMemAlloc_v2", "cuMemHostAlloc", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemcpyDtoDAsync_v2"),
    *("cuMemsetD32Async", "cuStreamCreate", "cuStreamWaitEvent", "cuEventCreate", "cuEventRecord"),
    *("cuEventSynchronize", "cuLaunchKernel", "cuStreamBeginCapture_v2", "cuGraphInstantiateWithFlags"),
    *("cuGraphLaunch", "cuModuleGetFunction"),
]
if BINDING != "pycuda":  # which loses count of its contexts there
    CALLS.append("cuCtxPushCurrent_v2")


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_is_one_line_and_leaks_nothing(call: str) -> None:
    """Each call of its kind in a request, one after the other; the next request is served."""
    DriverEngine()
    before, failures = left(), 0
    for number in itertools.count(1):
        count = STANDIN.cm_driver_calls(call.encode())
        engines = []
        with failing(f"{call}:{number}:1"):
            try:
                engines.append(DriverEngine())
                draw(engines[0])
            except EngineError as error:
                assert "CUDA_ERROR_INVALID_VALUE" in str(error) and "\n" not in str(error)
                failures += 1
            done = STANDIN.cm_driver_calls(call.encode()) < number
        if engines and number in (1, 2):
            assert np.array_equal(draw(engines[0]), WANTED)
        engines.clear()
        assert left() == before, number
        if done:
            break
    assert failures or call == "cuModuleGetFunction", count  # functions are looked up once a process


def test_errors_have_names(engine: DriverEngine) -> None:
    with failing("cuLaunchKernel:1+:701"), pytest.raises(EngineError) as caught:
        draw(engine)
    line = "CUDA failed while launching cm_first_noise_float_nchw: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES in cuLaunchKernel"
    assert str(caught.value) == line


# Arrays of callers in the GPU's memory


class Theirs:
    """Numbers in device memory of the context that is this thread's, with `__cuda_array_interface__` version 3."""

    def __init__(self, numbers: Any, **interface: Any) -> None:
        self.host = np.ascontiguousarray(numbers)
        error, self._address = cu.cuMemAlloc(self.host.nbytes)
        assert not error
        self._pinned = cu.cuMemHostAlloc(self.host.nbytes, 0)[1]
        ctypes.memmove(self._pinned, self.host.ctypes.data, self.host.nbytes)
        # Late: pinned memory is read when the stream comes to it.
        self._stream = interface.get("stream") or 0
        cu.cuMemcpyHtoDAsync(self._address, self._pinned, self.host.nbytes, self._stream)
        data = int(self._address), False
        own = {"shape": self.host.shape, "typestr": self.host.dtype.str, "data": data, "version": 3}
        self.__cuda_array_interface__ = own | interface

    def free(self) -> None:
        cu.cuStreamSynchronize(self._stream)
        cu.cuMemFree(self._address)
        cu.cuMemFreeHost(self._pinned)


class PaddingEngine(DriverEngine):
    """It takes multiples of 4 images."""

    def images(self, count: int) -> Any:
        return super().images(-(-count // 4) * 4)


@pytest.fixture
def host_bytes(engine: DriverEngine, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Sizes of all copies from the host, and to it."""
    driver, sizes = engine.on_device.device.context.driver, {"copy_in": [], "copy_out": []}

    def count(name: str, call: Callable[..., None], *values: Any) -> None:
        sizes[name] += [each.nbytes for each in values if isinstance(each, np.ndarray)]
        call(*values)

    for name in sizes:
        monkeypatch.setattr(driver, name, partial(count, name, getattr(driver, name)))
    return sizes


@pytest.fixture
def noise() -> Any:
    return np.random.default_rng(3).standard_normal((2, 7, *DriverEngine.manifest.image_shape), np.float32)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 3), (10, 3), (255, 64)])
def test_images_stay_in_memory(engine: DriverEngine, host_bytes: dict[str, list[int]], count: int, size: int) -> None:
    wanted = cm.sample(engine, count, micro_batch=size)
    host_bytes["copy_out"].clear()
    images = cm.sample(engine, count, micro_batch=size, output="device")
    batches = -(-count // size)
    assert host_bytes["copy_out"] == [256] * batches  # which says whether images are finite
    assert len(engine.bound) == (1 if count % size == 0 else 2)  # the graphs are those of images that leave
    assert (images.shape, images.dtype, len(images)) == (wanted.shape, wanted.dtype, count)
    interface = images.__cuda_array_interface__
    assert interface == {
        **{"shape": wanted.shape, "typestr": "|u1", "data": (images.address, False), "strides": None},
        **{"stream": None, "version": 3},
    }
    memory = (ctypes.c_uint8 * wanted.size).from_address(images.address)  # all of it is there by now
    assert np.array_equal(np.ctypeslib.as_array(memory).reshape(wanted.shape), wanted)
    del memory
    assert np.array_equal(images.copy_to_host(), wanted) and np.array_equal(np.asarray(images), wanted)
    assert np.asarray(images, np.float32).dtype == np.float32
    with pytest.raises(ValueError, match="by a copy alone"):
        np.array(images, copy=False)


def test_images_come_to_the_host_behind_what_a_caller_wrote(engine: DriverEngine) -> None:
    images = cm.sample(engine, 3, output="device")
    with engine.on_device.device.context.current():
        cu.cuMemsetD8Async(images.address, 7, images.nbytes, 0)
    assert (np.asarray(images) == 7).all()


def test_images_are_freed_in_any_thread_and_outlive_the_model() -> None:
    engines = [DriverEngine()]
    kept = [cm.sample(engines[0], 10, micro_batch=3, output="device")]
    engines.clear()
    assert np.array_equal(np.asarray(kept[0]), WANTED)
    if not os.fork():
        kept.clear()  # which must not free what is its parent's
        os._exit(0)
    assert os.wait()[1] == 0
    in_thread(kept.clear)


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("kind", [DriverEngine, PaddingEngine])
def test_noise_is_read_in_memory(
    engine: DriverEngine, host_bytes: dict[str, list[int]], noise: Any, size: int, kind: type[DriverEngine]
) -> None:
    """In a stream of the caller's, whose copy is late: who did not wait for it would read NaN."""
    wanted = cm.sample(HostEngine(), noise=noise, micro_batch=size)
    with engine.on_device.device.context.current():
        _, stream = cu.cuStreamCreate(1)
        theirs = Theirs(noise, stream=int(stream), strides=noise.strides)
        images = cm.sample(kind(), noise=theirs, micro_batch=size, output="device")
        assert max(host_bytes["copy_in"]) < noise[0, 0].nbytes and sum(host_bytes["copy_out"]) == 256 * -(-7 // size)
        assert np.array_equal(np.asarray(images), wanted)
        assert np.array_equal(cm.sample(engine, noise=theirs, micro_batch=size, steps=2), wanted)
        theirs.free()
        cu.cuStreamDestroy(stream)


@pytest.mark.parametrize("stream", [None, 1, 2])
def test_noise_of_a_context_of_the_callers_own(engine: DriverEngine, noise: Any, stream: int | None) -> None:
    """As pycuda's make_context makes: its default streams are others than those of the primary context."""
    _, context = cu.cuCtxCreate(None, 0, 0)
    theirs = Theirs(noise, stream=stream)
    wanted = cm.sample(HostEngine(), noise=noise)
    assert np.array_equal(cm.sample(engine, noise=theirs), wanted)
    assert current() == int(context)
    theirs.free()
    cu.cuCtxDestroy(context)


def test_noise_that_does_not_fit_is_one_line(engine: DriverEngine, noise: Any) -> None:
    device = engine.on_device.device
    with device.context.current():
        theirs = [Theirs(noise)]
        own = theirs[0].__cuda_array_interface__
        c, h, w = DriverEngine.manifest.image_shape
        cases: list[tuple[dict[str, Any], str]] = [
            ({"typestr": "<f2"}, r"must be float32, not float16"),
            ({"typestr": ">f4"}, r"must be float32, not >f4"),
            ({"strides": noise.strides[::-1]}, r"must be contiguous, in the order \(K, N, C, H, W\)"),
            ({"data": (noise.ctypes.data, False)}, r"is in no memory that CUDA knows: CUDA_ERROR_INVALID_VALUE"),
            ({"shape": (2, 7, c, w)}, rf"noise must be \(K, N, {c}, {h}, {w}\), not \(2, 7, {c}, {w}\)"),
        ]
        for change, line in cases:
            with pytest.raises(RequestError, match=line):
                cm.sample(engine, noise=SimpleNamespace(__cuda_array_interface__=own | change))
        with pytest.raises(RequestError, match="count is 3 but the noise is for 7 images"):
            cm.sample(engine, 3, noise=theirs[0])
        with pytest.raises(RequestError, match="noise is for 2 steps, but 3 were asked for"):
            cm.sample(engine, steps=3, noise=theirs[0])
        theirs[0].free()
        theirs = [Theirs(noise * np.float32(np.nan))]
        with pytest.raises(EngineError, match="not finite"):
            cm.sample(engine, noise=theirs[0])
        theirs[0].free()
    other = Device(1)
    with other.context.current():
        theirs = [Theirs(noise)]
        with pytest.raises(RequestError, match=r"^noise is on cuda:1, and the model on cuda:0$"):
            cm.sample(engine, noise=theirs[0])
        theirs[0].free()


@pytest.mark.parametrize("call", ["cuMemAlloc_v2", "cuMemcpyDtoDAsync_v2", "cuPointerGetAttribute", "cuEventRecord"])
def test_a_call_that_fails_leaves_no_images(noise: Any, call: str) -> None:
    with DriverEngine().on_device.device.context.current():
        theirs = Theirs(noise)
        before, failures = left(), 0
        for number in itertools.count(1):
            with failing(f"{call}:{number}:1"):
                try:
                    cm.sample(DriverEngine(), noise=theirs, micro_batch=3, output="device")
                except (EngineError, RequestError) as error:
                    assert "CUDA_ERROR_INVALID_VALUE" in str(error) and "\n" not in str(error)
                    failures += 1
                done = STANDIN.cm_driver_calls(call.encode()) < number
            assert left() == before, number
            if done:
                break
        assert failures
        theirs.free()


def test_halved_batches_are_joined_in_memory(engine: DriverEngine, caplog: pytest.LogCaptureFixture) -> None:
    wanted = cm.sample(HostEngine(), 100, micro_batch=64)
    whole = memory_of(engine, 64)
    with room(engine.on_device.device, whole + wanted.size - 16 * KIBI), caplog.at_level(logging.WARNING, "cm_runtime"):
        images = cm.sample(engine, 100, micro_batch=64, output="device")
    (record,) = caplog.records
    assert record.getMessage().endswith("going on with 32 images at once in place of 64")
    assert np.abs(np.asarray(images).astype(int) - wanted).max() <= 1


# Processes


def test_a_forked_child_says_so(engine: DriverEngine) -> None:
    draw(engine)
    reader, writer = os.pipe()
    if not os.fork():
        lines = []
        for body in (lambda: draw(engine), lambda: DriverEngine(1)):
            with suppress(Exception):
                try:
                    body()
                except EngineError as error:
                    lines.append(str(error))
        os.write(writer, "\n".join(lines).encode())
        os._exit(0)
    os.wait()
    os.close(writer)
    said = os.read(reader, 10_000).decode().splitlines()
    os.close(reader)
    assert len(said) == 2 and all("start it by spawn" in line for line in said)
    assert np.array_equal(draw(engine), WANTED)


if BINDING == "pycuda":

    def test_a_callers_pycuda_context_chooses_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
        import pycuda.driver

        monkeypatch.delenv(context.BINDING)
        assert context.driver().name == "cuda-bindings"
        theirs = pycuda.driver.Device(0).make_context()
        assert context.driver().name == "pycuda"
        engine = DriverEngine()
        assert np.array_equal(draw(engine), WANTED)
        assert pycuda.driver.Context.get_current() == theirs and current() == theirs.handle
        theirs.pop()
        theirs.detach()

    def test_gpuarrays_come_and_go_without_a_copy(engine: DriverEngine, noise: Any) -> None:
        """Noise that pycuda's own context has, images as a GPUArray that keeps their memory."""
        import pycuda.driver
        from pycuda.gpuarray import GPUArray, to_gpu

        theirs = pycuda.driver.Device(0).make_context()
        z = to_gpu(noise)
        images = cm.sample(engine, noise=z, output="device")
        array = GPUArray(images.shape, images.dtype, base=images, gpudata=images.address)
        assert array.__cuda_array_interface__["data"][0] == images.address
        del images
        assert np.array_equal(array.get(), cm.sample(HostEngine(), noise=noise))
        del z, array
        theirs.pop()
        theirs.detach()
