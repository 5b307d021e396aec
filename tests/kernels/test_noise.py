"""The device's noise: integers bit for bit, normals to 1e-6, whatever the launch and the layout."""

from __future__ import annotations

import ctypes
from typing import Any

import host_gpu
import numpy as np
import pytest
from host_gpu import address

from cm_runtime import noise
from cm_runtime.kernels import launches
from cm_runtime.kernels.launches import LEVEL, REQUEST, Arrays, Images

pytestmark = pytest.mark.process  # processes which compiles the kernels for the host

ONES = 0xFFFFFFFF


def words(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    made = (ctypes.c_uint32 * 4)()
    host_gpu.library().cm_words((ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), made)
    return list(made)


# Salmon et al.'s known answers (Random123's kat_vectors), and those of our own layout.
@pytest.mark.parametrize(
    ("counter", "key", "known"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
        ((0, 0, 17, 0), (0, 0), (0x704C9333, 0x4D352EE4, 0x1FA81629, 0x806A2A3C)),
        ((0, 1, 0, 0), (1, 0), (0x833FF8DC, 0x225C963C, 0x232B88B3, 0x0B334B07)),
    ],
)
def test_the_words_are_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], known: tuple[int, ...]
) -> None:
    assert words(counter, key) == list(known)


def test_the_words_are_the_hosts() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        counter, key = rng.integers(0, 1 << 32, 4, np.uint64), rng.integers(0, 1 << 32, 2, np.uint64)
        wanted = noise.philox(counter[:, None], int(key[0]) | int(key[1]) << 32)[:, 0]
        assert words(tuple(map(int, counter)), (int(key[0]), int(key[1]))) == wanted.tolist()


def drawn(images: Images, seed: int, first: int, draw: int = 0, grid: int | None = None) -> Any:
    """z of a draw as the kernels make it, (N,C,H,W) float32: by cm_first_noise, or by cm_step of an f that is 0."""
    (n, c, h, w), layout = images[:4], images.layout
    shape = (n, c, h, w) if layout == "nchw" else (n, h, w, c)
    request = host_gpu.placed(np.array([(seed, first)], REQUEST))
    level = host_gpu.placed(np.array([(0, 1, 1, 1)], LEVEL))
    x = host_gpu.empty(shape, np.float32)
    if draw:
        F, bad = host_gpu.empty(shape, np.float32, 0), host_gpu.empty((1,), np.int32)
        at = Arrays(address(request), address(level), F=address(F), x_next=address(x), not_finite=address(bad))
        work = launches.step(images, at, draw)
    else:
        work = launches.first_noise(images, Arrays(address(request), address(level), x=address(x)))
    host_gpu.launch(work._replace(grid=(grid or work.grid[0], 1, 1)))
    return x if layout == "nchw" else np.moveaxis(x, -1, 1)


def test_a_million_normals_agree_to_one_in_a_million() -> None:
    images = Images(64, 3, 72, 76)
    for seed, first, draw in ((0, 0, 0), (2**64 - 1, 2**32 - 7, 1), (12345, 2**64 - 64, 3)):
        found = drawn(images, seed, first, draw)
        index = np.arange(64, dtype=np.uint64) + np.uint64(first)
        wanted = noise.normal(seed, index, draw, (3, 72, 76))
        assert found.size > 1e6
        assert (np.abs(found - wanted.astype(np.float64)) <= 1e-6 * np.maximum(1, np.abs(wanted))).all()


def test_the_rarest_words_agree_too() -> None:
    """Near u = 0, u = 1, 2/3 where the logarithm changes its form, powers of two, turning points of the angle."""
    edges = {0, 1, 2, 3, ONES, ONES - 1, ONES - 2, 0xAAAAAAAA, 0xAAAAAAAB, 0xAAAAAAAC}
    edges |= {(1 << k) + d for k in range(2, 32) for d in (-1, 0, 1)} | {
        (k << 29) + d for k in range(1, 8) for d in (-1, 0, 1)
    }
    one = np.array(sorted(edges), np.uint64)
    a, b = (grid.ravel() for grid in np.meshgrid(one, one))
    found = np.empty((a.size, 2), np.float32)
    from_words = host_gpu.library().cm_box_muller
    for i in range(a.size):
        from_words(ctypes.c_uint32(int(a[i])), ctypes.c_uint32(int(b[i])), found[i].ctypes.data_as(ctypes.c_void_p))
    u, v = (word * 2.0**-32 + 2.0**-33 for word in (a, b))
    r, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * v
    wanted = np.stack([r * np.sin(angle), r * np.cos(angle)], 1)
    assert (np.abs(found - wanted) <= 1e-6 * np.maximum(1, np.abs(wanted))).all()


SHAPES = [(1, 1, 1, 1), (3, 3, 7, 5), (7, 1, 28, 28), (2, 4, 8, 6), (1, 7, 3, 255), (255, 1, 1, 7), (1, 3, 1, 1023)]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [*SHAPES, (1023, 1, 1, 3), (1, 255, 2, 2), (1, 1023, 1, 1), (1, 3, 32, 32)])
def test_it_is_addressed_by_seed_index_and_element(shape: tuple[int, int, int, int], layout: Any) -> None:
    for draw, first in ((0, 17), (2, 2**32 - 1)):
        found = drawn(Images(*shape, layout=layout), 5, first, draw)
        wanted = noise.normal(5, np.arange(shape[0], dtype=np.uint64) + np.uint64(first), draw, shape[1:])
        assert (np.abs(found - wanted) <= 1e-6 * np.maximum(1, np.abs(wanted))).all()


def test_every_launch_draws_the_same() -> None:
    images = Images(5, 3, 8, 8)
    wanted = drawn(images, 1, 0)
    for grid in (1, 2, 3, 1000):
        assert np.array_equal(drawn(images, 1, 0, grid=grid), wanted)
