"""GB/s of the kernels and of a copy on the same GPU, in turns, on memory of the device with guards around it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from cm_runtime.bench.turns import ratio, take_turns
from cm_runtime.cuda.context import Owned
from cm_runtime.cuda.device import Device
from cm_runtime.kernels import launches
from cm_runtime.kernels.group_norm import group_norm_silu, plan_norm
from cm_runtime.kernels.launches import LEVEL, REQUEST, SIZES, Arrays, Images, Type
from cm_runtime.precond import precond

GUARD = 4096  # bytes before and behind each array
PATTERN = 0xA5
ROUNDS = 20
REPEATS = 20  # of a launch in one graph: small ones take less than a call from Python

Work = dict[str, tuple[int, Callable[[], None]]]  # name -> bytes of traffic, and the launch


class Buffers:
    """Arrays of a device between guards, which nothing may write to."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._ends: dict[str, tuple[int, int]] = {}
        self._pattern = np.full(GUARD, PATTERN, np.uint8)

    def take(self, name: str, size: int) -> int:
        """The address of ``size`` bytes, a multiple of 16."""
        front = self._device.address(name, size + 2 * GUARD)
        for guard in (front, front + GUARD + size):
            self._device.put(guard, self._pattern)
        self._ends[name] = front, front + GUARD + size
        return front + GUARD

    def check(self) -> None:
        """Raise RuntimeError where a guard was written to."""
        for name, guards in self._ends.items():
            for guard in guards:
                self._device.move(self._device.address("guard", GUARD), guard, GUARD)
                if (self._device.fetch("guard", (GUARD,), np.dtype(np.uint8)) != PATTERN).any():
                    raise RuntimeError(f"a kernel wrote {'before' if guard == guards[0] else 'behind'} {name}")


class Timer:
    """Times of what is put in a device's stream, by events of the GPU."""

    def __init__(self, device: Device) -> None:
        self._device, self._driver = device, device.context.driver
        with device.use("measuring"):
            self._begin, self._end = (
                Owned(device.context, self._driver.create_event(), self._driver.destroy_event) for _ in range(2)
            )

    def milliseconds(self, body: Callable[[], None]) -> float:
        """Milliseconds between events before and behind ``body``."""
        begin, end, stream = self._begin.handle, self._end.handle, self._device.stream
        with self._device.use("measuring"):
            self._driver.record(begin, stream)
            body()
            self._driver.record(end, stream)
            self._driver.synchronize_event(end)
            return self._driver.milliseconds(begin, end)


def time_steps(type: Type, count: int, seconds: float = 60) -> dict[str, Any]:
    """The step kernels on ``count`` images of 3x64x64, and a copy of as many float32."""
    device = Device()
    buffers = Buffers(device)
    return measure(device, buffers, step_work(device, buffers, Images(count, 3, 64, 64, type)))


def time_norms(type: Type, network: str, batch: int, seconds: float = 60) -> dict[str, Any]:
    """Each normalisation of a network, and the milliseconds of all of them, as one evaluation has them."""
    device = Device()
    buffers = Buffers(device)
    rows: dict[str, Any] = {}
    total = 0.0
    for (channels, size), times in sorted(norm_shapes(network).items(), key=lambda each: -each[0][0] * each[0][1] ** 2):
        name = f"{channels}x{size}x{size}"
        images = Images(batch, channels, size, size, type, "nhwc")
        row = measure(device, buffers, norm_work(device, buffers, images))["cm_group_norm_silu"]
        rows[name] = {"times": times, **row}
        total += times * row["ms"]
    return rows | {"all of an evaluation": {"times": sum(norm_shapes(network).values()), "ms": round(total, 4)}}


def norm_shapes(network: str) -> Counter[tuple[int, int]]:
    """How often a network normalises (channels, size) in one evaluation, asked of the network on no device."""
    import torch
    from torch import nn

    from cm_runtime.bench.networks import STANDING, config
    from cm_runtime.checkpoints.load import load_checkpoint
    from cm_runtime.networks.consistency import build

    settings = config(network) if network in STANDING else load_checkpoint(network).config
    shapes: Counter[tuple[int, int]] = Counter()
    F = build(settings, "meta").F
    for module in F.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: shapes.update([tuple(inputs[0].shape[1:3])]))
    with torch.device("meta"):
        label = torch.zeros(1, dtype=torch.int64) if settings.network.num_classes else None
        F(torch.zeros(1, *settings.image_shape), torch.zeros(1), label)
    return shapes


def step_work(device: Device, buffers: Buffers, images: Images) -> Work:
    """The launches of one step, on normals that the first of them draws."""
    n, size = images.elements, SIZES[images.type]
    request = device.send("request", np.array([(0, 0)], REQUEST))
    level = device.send("level", np.array([(0.1, 0.5, 1.5, 0.6)], LEVEL))
    sigma = device.send("sigma", np.full(images.n, 1.5, np.float32))
    x, y = (buffers.take(name, n * 4) for name in "xy")
    F, x_in = (buffers.take(name, n * size) for name in ("F", "x_in"))
    out, flag = buffers.take("bytes", n), buffers.take("flag", 16)
    for target in (F, x_in):
        device.launch(launches.first_noise(images, Arrays(request, level, x=x, x_in=target)))
    step = Arrays(request, level, 0, x, F, x, x_in, not_finite=flag)
    kernels = {
        "cm_first_noise": (4 + size, launches.first_noise(images, Arrays(request, level, x=x, x_in=x_in))),
        "cm_step": (8 + 2 * size, launches.step(images, step, 1)),
        "cm_finish": (5 + size, launches.finish(images, Arrays(0, level, 0, x, F, bytes=out, not_finite=flag))),
        "cm_skip_scale": (
            8 + size,
            launches.skip_scale(images, Arrays(x=x, F=F, sigma=sigma, y=y), precond("boundary")),
        ),
    }
    return {
        "copy": (8 * n, partial(device.move, y, x, 4 * n)),
        **{name: (n * traffic, partial(device.launch, each)) for name, (traffic, each) in kernels.items()},
    }


def norm_work(device: Device, buffers: Buffers, images: Images) -> Work:
    """One normalisation, on normals, and a copy of its input."""
    n, size = images.elements, SIZES[images.type]
    request = device.send("request", np.array([(0, 0)], REQUEST))
    level = device.send("level", np.array([(0, 0, 1, 1)], LEVEL))
    gamma = device.send("gamma", np.ones(images.channels, np.float32))
    noise, x, y = buffers.take("noise", 4 * n), buffers.take("norm", n * size), buffers.take("normed", n * size)
    device.launch(launches.first_noise(images, Arrays(request, level, x=noise, x_in=x)))
    plan = plan_norm(images, 32, device.context.limits)
    moments = buffers.take("moments", 4 * plan.moments(images, 32) + 16)
    at = Arrays(x=x, gamma=gamma, beta=gamma, moments=moments, y=y)
    works = group_norm_silu(images, at, 32, 1e-5, True, plan)

    def normalise() -> None:
        for work in works:
            device.launch(work)

    move = partial(device.move, y, x, n * size)
    return {"copy": (2 * n * size, move), "cm_group_norm_silu": (2 * n * size, normalise)}


def measure(device: Device, buffers: Buffers, work: Work) -> dict[str, Any]:
    """Medians over rounds; shares are of the copy in the same round. Raises RuntimeError for a guard written to."""
    timer = Timer(device)
    for _, body in work.values():
        body()  # what is loaded at a first launch cannot be captured
    graphs = {name: device.capture(partial(_repeat, body)) for name, (_, body) in work.items()}
    ms = take_turns(
        {name: partial(timer.milliseconds, graph.launch) for name, graph in graphs.items()}, range(1 + ROUNDS)
    )
    speeds = {name: [traffic * REPEATS / each / 1e6 for each in ms[name][1:]] for name, (traffic, _) in work.items()}
    buffers.check()
    return {
        name: {
            "MB": round(work[name][0] / 1e6, 1),
            "ms": round(statistics.median(ms[name][1:]) / REPEATS, 5),
            "GB/s": round(statistics.median(speeds[name]), 1),
            "of copy": [round(q, 3) for q in ratio(speeds[name], speeds["copy"])],
        }
        for name in work
    }


def _repeat(body: Callable[[], None]) -> None:
    for _ in range(REPEATS):
        body()
