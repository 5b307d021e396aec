"""What the tests of training share: a tiny run that takes well under a second, and pictures for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cm_runtime.training.data.image_set import ImageSet

if TYPE_CHECKING:
    from torch import Tensor

    from cm_runtime.training.config import TrainConfig

TINY_NETWORK = {"channels": 32, "channel_mult": [1, 2], "res_blocks": 1, "head_channels": 32}


@pytest.fixture(scope="session", autouse=True)
def real_commit() -> Iterator[Callable[[Path], str]]:
    """Runs here do not ask git where they come from, which takes as long as a tiny run; the function that does."""
    from cm_runtime.training import provenance

    with pytest.MonkeyPatch.context() as patch:
        real = provenance.commit
        patch.setattr(provenance, "commit", lambda root: "")
        yield real


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread, as bit-for-bit comparisons want it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample grids of 4 images and, for teachers, 2 Heun steps: the same code in a twentieth of the time."""
    from cm_runtime import sampling
    from cm_runtime.training import loop

    heun = sampling.heun
    monkeypatch.setattr(loop, "GRID_IMAGES", 4)
    monkeypatch.setattr(sampling, "heun", lambda denoiser, x, label: heun(denoiser, x, label, steps=2))


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., TrainConfig]:
    """(edm={}, ect={}, network={}, data={}, phases=2, **top) -> a config with those keys changed."""
    from cm_runtime.training.config import parse_config

    def config(
        edm: dict[str, Any] | None = None,
        ect: dict[str, Any] | None = None,
        network: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        phases: int = 2,
        **top: Any,
    ) -> TrainConfig:
        shared = {"steps": 3, "batch": 4, "learning_rate": 1e-3, "ema": [0.5]}
        phase = [{"method": "edm", **shared, **(edm or {})}, {"method": "ect", **shared, "stages": 3, **(ect or {})}]
        tree = {
            "data": {"source": "toy", **(data or {})},
            "network": {**TINY_NETWORK, **(network or {})},
            "phase": phase[:phases],
            **top,
        }
        return parse_config(tree, "tiny")

    return config


@pytest.fixture(scope="session")
def toy_images() -> ImageSet:
    """50 grey 8x8 pictures of 3 classes, each class a bright bar in another row; uint8."""
    rng = np.random.default_rng(0)
    labels = np.arange(50, dtype=np.int64) % 3
    images = rng.integers(0, 60, (50, 1, 8, 8)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label + 1, : 4 + label] = 250
    return ImageSet(images, labels, 3, "toy")


@pytest.fixture(scope="session")
def ect_fixed_point() -> Callable[[Tensor, float, int], Tensor]:
    """(t, s, stage) -> g with f(x, t) = g x the minimiser of ECT (q 2, k 8, b 1) on data N(0, s^2).

    The mean of x_r given x_t is (s^2 + t r) / (s^2 + t^2) x_t, so g(t) = g(r) (s^2 + t r) / (s^2 + t^2).
    """

    def g_of(t: Tensor, s: float, stage: int) -> Tensor:
        t = t.double()
        g = t * 0 + 1
        while (t > 1e-5).any():  # below, a factor is 1 to 1e-9
            r = (t * (1 - (1 + 8 / (1 + t.exp())) / 2 ** (stage + 1))).clamp(min=0)
            g, t = g * (s**2 + t * r) / (s**2 + t**2), r
        return g

    return g_of
