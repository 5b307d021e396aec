"""The step ops on a GPU, `sampling.HostSteps`' twin: each is one launch, and images are addresses that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cm_runtime.kernels import launches
from cm_runtime.kernels.launches import LEVEL, Images, Launch, Placed


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
        self.device.launch(
            launches.first_noise(self.images, p.request, p.levels, p.x, x_in=p.x_in, given=self._given(0))
        )
        return p.x_in or p.x

    def _begin(self) -> None:
        """An edit's first images take the place of f in a step, with the table's entry 0 for noise and scale."""
        p, given = self.places, self._given(0)
        images = self.images._replace(made="fp32")
        self.device.launch(
            launches.step(
                images, p.request, p.levels, 0, p.start, p.x, p.not_finite, x_in=p.x_in, given=given, clip=False
            )
        )

    def step(self, x0: int, k: int, sigma: float) -> int:
        """x0: the address of F, or of f; the input of evaluation k."""
        p = self.places
        self.device.launch(
            launches.step(
                self.images,
                p.request,
                self._level(k),
                k,
                x0,
                p.x,
                p.not_finite,
                x=p.x if p.x_in else 0,
                x_in=p.x_in,
                given=self._given(k),
                clip=self.clip,
                edit=self.edit,
            )
        )
        return p.x_in or p.x

    def finish(self, x0: int) -> int:
        """x0: the address of the last F, or f; the images, NHWC."""
        p = self.places
        x = p.x if p.x_in else 0
        options = {"bytes": p.bytes, "floats": p.floats}
        self.device.launch(
            launches.finish(
                self.images, self._level(self.steps), x0, p.not_finite, x=x, clip=self.clip, edit=self.edit, **options
            )
        )
        return p.bytes or p.floats

    def _level(self, k: int) -> int:
        return self.places.levels + k * LEVEL.itemsize

    def _given(self, k: int) -> int:
        return self.places.noise and self.places.noise + k * self.images.elements * 4
