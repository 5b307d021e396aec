"""What torch is asked as sampling stays on a GPU, beside other threads that use it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import stand_in_gpu
import torch

from cm_runtime.backends import torch as torch_module
from cm_runtime.backends import torch_stream
from cm_runtime.backends.torch import TorchBackend, TorchGraph
from cm_runtime.cuda.device import Device


class Pool:
    """`torch.cuda.MemPool` and `use_mem_pool`, which no machine without a GPU has."""

    log: ClassVar[list[Any]] = []
    alive: ClassVar[weakref.WeakSet[Pool]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.alive.add(self)

    @classmethod
    @contextmanager
    def use(cls, pool: Pool) -> Iterator[None]:
        cls.log.append("pool")
        try:
            yield
        finally:
            cls.log.append("end of pool")


class Driver(stand_in_gpu.Gpu):
    """Logs captures, and if garbage is collected meanwhile."""

    def begin_capture(self, stream: int) -> None:
        super().begin_capture(stream)
        Pool.log.append(("capture", gc.isenabled()))

    def end_capture(self, stream: int) -> Any:
        Pool.log.append("end of capture")
        return super().end_capture(stream)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setattr(torch.cuda, "MemPool", Pool)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", Pool.use)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: pytest.fail("it stops random numbers of every thread"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("other threads may be capturing"))
    monkeypatch.setattr(Pool, "log", [])
    with stand_in_gpu.installed(Driver()):
        yield Device()
        gc.collect()


CAPTURE = ["pool", ("capture", False), "body", "end of capture", "end of pool"]


def test_a_graph_bears_other_threads_and_collects_nothing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own would stop the random numbers of a training loop; memory is of a pool that lives as the graph."""
    streams: list[Any] = []

    def on_stream(*arguments: Any) -> Any:
        streams.append(arguments)
        return nullcontext()

    monkeypatch.setattr(torch_stream, "on_stream", on_stream)
    graph = TorchGraph(device, torch.device("cuda:1"), lambda: Pool.log.append("body"))
    assert Pool.log == CAPTURE
    assert len(Pool.alive) == 1
    graph.launch()
    assert streams == [(device.stream, torch.device("cuda:1"))]
    assert list(vars(graph)) == ["_graph", "_pool"], "the order in which they end"
    del graph
    assert not Pool.alive


def test_a_graph_that_is_interrupted_leaves_nothing(device: Device) -> None:
    def interrupt() -> None:
        Pool.log.append("body")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TorchGraph(device, torch.device("cpu"), interrupt)
    assert Pool.log == CAPTURE
    assert gc.isenabled() and not Pool.alive
    TorchGraph(device, torch.device("cpu"), lambda: None).launch()


def test_sampling_comes_behind_torchs_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """In which weights may have been copied or trained; and torch's cache is given back where memory ends."""
    followed: list[Any] = []
    monkeypatch.setattr(torch_module, "open_device", lambda _: SimpleNamespace(follow=followed.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=(str(device), 9)))
    on_device = TorchBackend._open_device(torch.device("cuda:1"))
    assert on_device is not None
    on_device._follow()
    assert followed == [("cuda:1", 9)]
    assert on_device._trim is torch.cuda.empty_cache
