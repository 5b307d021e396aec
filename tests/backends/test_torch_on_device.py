"""What torch is asked as sampling stays on a GPU, beside other threads that use it."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from cm_runtime.backends import torch as torch_module
from cm_runtime.backends import torch_stream
from cm_runtime.backends.torch import TorchBackend, TorchGraph


class Graph:
    """`torch.cuda.CUDAGraph`, which no machine without a GPU can make; log: its calls, and if garbage is collected."""

    log: ClassVar[list[Any]] = []

    def capture_begin(self, capture_error_mode: str) -> None:
        self.log.append((capture_error_mode, gc.isenabled()))

    def capture_end(self) -> None:
        self.log.append("end")


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_graph_bears_other_threads_and_collects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.graph would wait for the whole GPU, and by itself forbid other threads to allocate."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("other threads may be capturing"))
    monkeypatch.setattr(torch_stream, "on_stream", lambda *_: nullcontext())
    monkeypatch.setattr(Graph, "log", log := [])
    TorchGraph(7, torch.device("cuda:1"), lambda: log.append("body"))
    with pytest.raises(KeyboardInterrupt):
        TorchGraph(7, torch.device("cuda:1"), interrupt)
    assert log == [("thread_local", False), "body", "end", ("thread_local", False), "end"]
    assert gc.isenabled()


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
