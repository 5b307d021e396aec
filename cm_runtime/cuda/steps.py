"""The step ops on a GPU, `sampling.HostSteps`' twin: each is one launch, and images are addresses that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cm_runtime.kernels import launches
from cm_runtime.kernels.launches import LEVEL, Arrays, Images, Launch, Placed


class Launcher(Protocol):
    """`Device`, or what stands in for it."""

    def launch(self, work: Launch) -> None: ...


@dataclass(frozen=True)
class Places:
    """Addresses on the device, for a batch of N images and K steps.

    request: launches.REQUEST; levels: (K+1,) launches.LEVEL; x: (N,C,H,W) or (N,H,W,C) float32; x_in: the same in the
    network's type, or 0 where the network is f and reads x; bytes and floats: (N,H,W,C) uint8 and float32, one of them
    0; not_finite: int32; noise: (K,N,C,H,W) float32 of the caller's, or 0 to draw it; start: float32 as x, that an edit
    begins with, or 0.
    """

    request: int
    levels: int
    x: int
    x_in: int
    bytes: int
    floats: int
    not_finite: int
    noise: int = 0
    start: int = 0


@dataclass(frozen=True)
class DeviceSteps:
    """First noise, skip-scale, clamp, projection, renoise and quantisation for one micro-batch, in a stream's order.

    What `sampling.run` passes on is the address of the network's input or output. Noise levels are those of the table
    in memory, so that a graph captured of one request serves others.
    """

    device: Launcher
    images: Images
    places: Places
    steps: int
    clip: bool = True
    edit: Placed | None = None

    def first(self, sigma: float) -> int:
        """sigma_0 z_0, with what an edit begins with, and its scaled copy."""
        p = self.places
        if p.start:
            self._begin()
            return p.x_in or p.x
        self.device.launch(launches.first_noise(self.images, self._arrays(0)._replace(x=p.x)))
        return p.x_in or p.x

    def _begin(self) -> None:
        """An edit's first images take the place of f in a step, with the table's entry 0 for noise and scale."""
        images = self.images._replace(output="fp32")
        at = self._arrays(0)._replace(x=0, F=self.places.start)
        self.device.launch(launches.step(images, at, 0, clip=False))

    def step(self, x0: int, k: int, sigma: float) -> int:
        """x0: the address of F, or of f; the input of evaluation k."""
        at = self._arrays(k)._replace(F=x0)
        self.device.launch(launches.step(self.images, at, k, clip=self.clip, edit=self.edit))
        return self.places.x_in or self.places.x

    def finish(self, x0: int) -> int:
        """x0: the address of the last F, or f; the images, NHWC."""
        at = self._arrays(self.steps)._replace(F=x0)
        self.device.launch(launches.finish(self.images, at, clip=self.clip, edit=self.edit))
        return self.places.bytes or self.places.floats

    def _arrays(self, k: int) -> Arrays:
        """The arrays of the launch before evaluation k, or after the last; without x where F is f itself."""
        p = self.places
        return Arrays(
            request=p.request,
            level=p.levels + k * LEVEL.itemsize,
            given=p.noise and p.noise + k * self.images.elements * 4,
            x=p.x if p.x_in else 0,
            x_next=p.x,
            x_in=p.x_in,
            bytes=p.bytes,
            floats=p.floats,
            not_finite=p.not_finite,
        )
