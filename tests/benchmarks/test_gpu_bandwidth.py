"""The kernels that `make gpu-check` times: at the network's real shapes, and nothing is written beside arrays."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host_gpu
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from gpu import bandwidth

from cm_runtime.kernels.launches import Launch


class HostDevice:
    """`cuda.Device` in host memory that is full of NaN until it is written; ``log`` has launches and graphs."""

    def __init__(self, launch: Callable[[Launch], None] = host_gpu.launch) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.log: list[str] = []
        self.run = launch
        self.context = SimpleNamespace(limits=host_gpu.limits())

    def address(self, name: str, size: int) -> int:
        if name not in self.arrays or self.arrays[name].size < size:
            self.arrays[name] = host_gpu.empty((size,), np.uint8)
            self.arrays[name][...] = 0xFF
        return host_gpu.address(self.arrays[name])

    def send(self, name: str, array: np.ndarray) -> int:
        address = self.address(name, array.nbytes)
        self.put(address, array)
        return address

    def put(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def move(self, to: int, address: int, size: int) -> None:
        ctypes.memmove(to, address, size)

    def fetch(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        return self.arrays[name].view(dtype)[: int(np.prod(shape))].reshape(shape).copy()

    def launch(self, work: Launch) -> None:
        self.log.append(work.kernel)
        self.run(work)

    def capture(self, body: Callable[[], None]) -> Any:
        body()
        return SimpleNamespace(launch=lambda: self.log.append("graph"))


@pytest.fixture(autouse=True)
def even_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each graph takes 2 ms."""

    class Timer:
        def __init__(self, device: HostDevice) -> None: ...

        def milliseconds(self, body: Callable[[], None]) -> float:
            body()
            return 2.0

    monkeypatch.setattr(bandwidth, "Timer", Timer)


@pytest.mark.process
@pytest.mark.parametrize("type", ["fp32", "fp16"])
def test_every_kernel_runs_on_finite_numbers_between_guards(monkeypatch: pytest.MonkeyPatch, type: Any) -> None:
    """Traffic is that of kernels/README: bytes an element."""
    device = HostDevice()
    monkeypatch.setattr(bandwidth, "Device", lambda: device)
    monkeypatch.setattr(
        bandwidth, "step_work", lambda d, b, images, f=bandwidth.step_work: f(d, b, images._replace(height=4, width=4))
    )
    rows = bandwidth.time_steps(type, 7)
    elements = 7 * 3 * 4 * 4
    wanted = {"cm_first_noise": (8, 6), "cm_step": (16, 12), "cm_finish": (9, 7), "cm_skip_scale": (12, 10)}
    for name, each in wanted.items():
        row, traffic = rows[name], each[type == "fp16"] * elements
        assert row["ms"] == 2.0 / bandwidth.REPEATS
        assert row["GB/s"] == round(traffic * bandwidth.REPEATS / 2.0 / 1e6, 1)
        assert row["of copy"][0] == pytest.approx(traffic / (8 * elements), abs=1e-3)
    inner = slice(bandwidth.GUARD, -bandwidth.GUARD)
    assert np.isfinite(device.arrays["x"][inner].view(np.float32)).all()
    assert np.isfinite(device.arrays["F"][inner].view("f4" if type == "fp32" else "f2")).all()
    assert device.fetch("flag", (bandwidth.GUARD + 4,), np.dtype(np.uint8))[-4:].tolist() in ([0] * 4, [0xFF] * 4)
    assert device.log.count("graph") == 5 * (1 + bandwidth.ROUNDS)


@pytest.mark.process
@pytest.mark.parametrize(("place", "words"), [(-1, "before"), (0, "behind")])
def test_a_kernel_that_writes_beside_its_array_is_an_error(place: int, words: str) -> None:
    device = HostDevice()
    buffers = bandwidth.Buffers(device)  # type: ignore[arg-type]
    start = buffers.take("y", 64)
    ctypes.memset(start, 0, 64)
    buffers.check()
    ctypes.memset(start - 1 if place else start + 64, 0, 1)
    with pytest.raises(RuntimeError, match=f"a kernel wrote {words} y"):
        buffers.check()


@pytest.mark.process
def test_norms_are_timed_as_often_as_an_evaluation_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    device = HostDevice()
    monkeypatch.setattr(bandwidth, "Device", lambda: device)
    monkeypatch.setattr(bandwidth, "norm_shapes", lambda network: {(64, 4): 3, (32, 1): 2})
    rows = bandwidth.time_norms("fp16", "any", 3)
    assert list(rows) == ["64x4x4", "32x1x1", "all of an evaluation"], "the largest first"
    assert rows["64x4x4"]["MB"] == round(2 * 2 * 3 * 64 * 16 / 1e6, 1)
    assert rows["all of an evaluation"] == {"times": 5, "ms": 5 * 2.0 / bandwidth.REPEATS}


def test_the_shapes_are_those_of_the_published_network() -> None:
    """95 normalisations of 35.1 million elements an image, from 192x64x64 to 1536x8x8 (counted from its blocks)."""
    shapes = bandwidth.norm_shapes("imagenet64")
    assert sum(shapes.values()) == 95
    assert round(sum(n * channels * size**2 for (channels, size), n in shapes.items()) / 1e6, 1) == 35.1
    assert {(192, 64), (384, 64), (1536, 8)} <= set(shapes)
    assert max(size for _, size in shapes) == 64
