"""`sampling.HostSteps` against algorithm 1's formulas in float64 and exact arithmetic for the pixels."""

import math
from fractions import Fraction

import numpy as np
import pytest

from cm_runtime.errors import EngineError
from cm_runtime.sampling import HostSteps, to_nhwc, to_uint8

SHAPES = [(1, 1, 1, 1), (3, 1, 3, 7), (7, 3, 5, 3), (1, 3, 255, 1), (2, 4, 8, 8)]


@pytest.fixture(params=SHAPES, ids=str)
def z(request, rng):
    return rng.standard_normal((3, *request.param)).astype(np.float32)


def test_first_noise_is_scaled_and_the_callers_noise_is_left_alone(z):
    kept = z.copy()
    x = HostSteps(lambda k: z[k], 0.002).first(80.0)
    assert x.dtype == np.float32 and x.shape == z.shape[1:]
    np.testing.assert_allclose(x, 80 * z[0].astype(np.float64), rtol=1e-7)
    np.testing.assert_array_equal(z, kept)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("sigma", "sigma_min"), [(1.382368, 0.002), (0.003, 0.002), (5.0, 3.0)])
def test_a_step_clamps_and_renoises_to_sigma(z, clip, sigma, sigma_min):
    x0 = 2 * z[0]
    expected = x0.astype(np.float64)
    if clip:
        expected = np.minimum(np.maximum(expected, -1), 1)
    expected = expected + math.sqrt(sigma * sigma - sigma_min * sigma_min) * z[2]
    kept = z.copy()
    x = HostSteps(lambda k: z[k], sigma_min, clip).step(x0, 2, sigma)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(z, kept)


def test_finish_clamps_only_where_it_is_asked(z):
    x0 = 2 * z[1]
    np.testing.assert_array_equal(HostSteps(lambda k: z[k], 0.002).finish(x0.copy()), np.clip(x0, -1, 1))
    np.testing.assert_array_equal(HostSteps(lambda k: z[k], 0.002, clip=False).finish(x0.copy()), x0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("clip", [True, False])
def test_one_pixel_that_is_not_finite_is_an_engine_error(bad, clip):
    x0 = np.zeros((3, 1, 3, 7), np.float32)
    x0[2, 0, 1, 6] = bad
    ops = HostSteps(lambda k: np.zeros_like(x0), 0.002, clip)
    with pytest.raises(EngineError, match="not finite"):
        ops.finish(x0.copy())
    with pytest.raises(EngineError, match="not finite"):
        ops.step(x0.copy(), 1, 1.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channels_go_last_and_stay_contiguous(shape, rng):
    x0 = rng.standard_normal(shape).astype(np.float32)
    images = to_nhwc(x0)
    assert images.flags.c_contiguous and images.dtype == np.float32
    for n, c, h, w in np.ndindex(*shape):
        assert images[n, h, w, c] == x0[n, c, h, w]
    assert to_uint8(x0).shape == images.shape


def exact_grey(value: float) -> tuple[int, Fraction]:
    """The grey level of a float32, half to even, and how far it is from the nearest tie: in fractions."""
    level = (min(max(Fraction(value), Fraction(-1)), Fraction(1)) + 1) * Fraction(255, 2)
    return round(level), abs(level - math.floor(level) - Fraction(1, 2))


def test_pixels_are_rounded_as_exact_arithmetic_rounds_them(rng):
    x0 = rng.uniform(-1.2, 1.2, (3, 3, 7, 31)).astype(np.float32)
    pixels = to_uint8(x0)
    assert pixels.dtype == np.uint8
    for value, pixel in zip(np.moveaxis(x0, 1, -1).ravel().tolist(), pixels.ravel().tolist(), strict=True):
        grey, from_tie = exact_grey(value)
        assert pixel == grey or (abs(pixel - grey) == 1 and from_tie < 2e-5), value  # float32 near a tie


@pytest.mark.parametrize(
    ("value", "pixel"),
    [(-1.0, 0), (1.0, 255), (0.0, 128), (-0.0, 128), (-7.0, 0), (7.0, 255), (-1 + 2**-9, 0), (1 - 2**-9, 255)],
)
def test_known_pixels(value, pixel):
    """0 is the one exact tie, 127.5: half to even makes it 128."""
    assert to_uint8(np.full((1, 1, 1, 1), value, np.float32)).item() == pixel


def test_all_grey_levels_survive_a_round_trip():
    levels = np.arange(256)
    x0 = (levels / 127.5 - 1).astype(np.float32).reshape(1, 1, 16, 16)
    np.testing.assert_array_equal(to_uint8(x0).ravel(), levels)


def test_quantising_leaves_the_floats_alone(rng):
    x0 = rng.uniform(-2, 2, (3, 1, 7, 3)).astype(np.float32)
    kept = x0.copy()
    to_uint8(x0)
    np.testing.assert_array_equal(x0, kept)
