"""cm_runtime/precond.py against the papers' formulas in float64, tables, and NumPy and torch against each other."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from cm_runtime.errors import ConfigError
from cm_runtime.precond import FORMS, Precond, precond

COEFFICIENTS = ("c_skip", "c_out", "c_in", "c_noise")
BOUNDARY = Precond("boundary", 0.5, 0.002)
# Awkward counts of levels over the whole range, its ends included.
LEVELS = [np.geomspace(0.002, 80, n) if n > 1 else np.array([80.0]) for n in (1, 3, 7, 255)]

# sigma, c_skip, c_out, c_in, c_noise of the boundary form, sigma_data 0.5, boundary 0.002.
TABLE = [
    (80.0, 3.906293e-5, 0.4999777, 0.01249976, 1095.50666),
    (1.3823680, 0.1159869, 0.4695084, 0.6802656, 80.949485),
    (0.002, 1.0, 0.0, 1.999984, -1553.65202),
]


def reference(sigma: float, boundary: float, sigma_data: float) -> tuple[float, ...]:
    """The four coefficients with 40 digits, from the exact values of the three floats."""
    with localcontext() as context:
        context.prec = 40
        s, b, d = Decimal(sigma), Decimal(boundary), Decimal(sigma_data)
        root = (s * s + d * d).sqrt()
        values = (d * d / ((s - b) ** 2 + d * d), d * (s - b) / root, 1 / root, 250 * s.ln())
        return tuple(float(value) for value in values)


@pytest.mark.parametrize("row", TABLE)
def test_boundary_form_has_the_published_values(row):
    sigma, *expected = row
    for name, value in zip(COEFFICIENTS, expected, strict=True):
        assert getattr(BOUNDARY, name)(np.float64(sigma)) == pytest.approx(value, rel=5e-7, abs=1e-15), name


def test_edm_form_is_table_1_of_karras():
    form = precond("edm", 0.5)
    for sigma in (0.002, 0.5, 1.0, 7.0, 80.0):
        variance = sigma**2 + 0.5**2
        assert form.c_skip(np.float64(sigma)) == pytest.approx(0.5**2 / variance)
        assert form.c_out(np.float64(sigma)) == pytest.approx(sigma * 0.5 / math.sqrt(variance))
        assert form.c_in(np.float64(sigma)) == pytest.approx(1 / math.sqrt(variance))
        assert form.c_noise(np.float64(sigma)) == pytest.approx(1000 * math.log(sigma) / 4, abs=1e-12)


@pytest.mark.parametrize("sigmas", LEVELS, ids=len)
@pytest.mark.parametrize(("form", "boundary"), [("boundary", 0.002), ("edm", 0.0), ("boundary", 0.3)])
@pytest.mark.parametrize("sigma_data", [0.5, 0.3, 1.0])
def test_float64_coefficients_match_forty_digits(form, boundary, sigma_data, sigmas):
    made = Precond(form, sigma_data, boundary)
    expected = np.array([reference(s, boundary, sigma_data) for s in sigmas]).T
    for name, values in zip(COEFFICIENTS, expected, strict=True):
        np.testing.assert_allclose(getattr(made, name)(sigmas), values, rtol=1e-14, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("sigmas", LEVELS, ids=len)
@pytest.mark.parametrize("form", ["boundary", "edm"])
def test_float32_coefficients_of_numpy_and_torch_differ_by_rounding_only(form, sigmas):
    made = precond(form)
    single = sigmas.astype(np.float32)
    exact = np.array([reference(float(s), made.sigma_boundary, 0.5) for s in single]).T
    for name, values in zip(COEFFICIENTS, exact, strict=True):
        scale = 250 if name == "c_noise" else 0.5  # what the last operation multiplies by: absolute rounding near 0
        tolerance = {"rtol": 5e-7, "atol": 2.5e-7 * scale}
        ours, torchs = getattr(made, name)(single), getattr(made, name)(torch.from_numpy(single))
        assert ours.dtype == np.float32 and torchs.dtype == torch.float32
        np.testing.assert_allclose(ours, values, **tolerance, err_msg=name)
        np.testing.assert_allclose(torchs.numpy(), values, **tolerance, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_shape_and_dtype_of_sigma_are_kept(form, name):
    coefficient = getattr(precond(form), name)
    for shape in ((), (1,), (3,), (7, 1, 1, 1)):
        for dtype in (np.float32, np.float64):
            result = coefficient(np.full(shape, 1.5, dtype)[()])
            assert (np.shape(result), result.dtype) == (shape, dtype)
            tensor = coefficient(torch.from_numpy(np.full(shape, 1.5, dtype)))
            assert (tuple(tensor.shape), str(tensor.dtype)) == (shape, f"torch.{np.dtype(dtype)}")


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.3, 0.29, 0.41, 0.7, 1.7])
@pytest.mark.parametrize("boundary", [0.002, 0.001, 0.3])
def test_at_the_boundary_f_is_exactly_the_identity(sigma_data, boundary):
    """Whatever sigma_data is: 1 x + 0 F = x, bit for bit, in either precision and library."""
    made = Precond("boundary", sigma_data, boundary)
    for dtype in (np.float32, np.float64):
        level = np.full(3, boundary, dtype)
        for sigma in (level, level[0], torch.from_numpy(level)):
            assert (np.asarray(made.c_skip(sigma)) == 1).all(), (type(sigma), dtype)
            assert (np.asarray(made.c_out(sigma)) == 0).all(), (type(sigma), dtype)


@pytest.mark.parametrize("library", [np.asarray, torch.tensor])
def test_piecewise_is_x_up_to_the_boundary_and_F_above(library):
    made = precond("piecewise")
    edge = np.float32(0.002)
    levels = np.array([0.001, np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(1)), 80], "f4")
    np.testing.assert_array_equal(np.asarray(made.c_skip(library(levels))), [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(np.asarray(made.c_out(library(levels))), [0, 0, 0, 1, 1])


def test_piecewise_prepares_the_networks_input_as_the_others_do():
    sigma = np.float64(1.382368)
    assert precond("piecewise").c_in(sigma) == pytest.approx(0.6802656, rel=1e-7)
    assert precond("piecewise").c_noise(sigma) == pytest.approx(80.949485, rel=1e-7)


def test_sigma_data_is_the_scale_of_everything():
    """Coefficients of (k sigma, k sigma_data, k boundary) are those of (sigma, sigma_data, boundary), but for units."""
    one, three = Precond("boundary", 0.5, 0.002), Precond("boundary", 1.5, 0.006)
    sigma = np.geomspace(0.002, 80, 7)
    np.testing.assert_allclose(three.c_skip(3 * sigma), one.c_skip(sigma), rtol=1e-12)
    np.testing.assert_allclose(three.c_out(3 * sigma), 3 * one.c_out(sigma), rtol=1e-12)
    np.testing.assert_allclose(three.c_in(3 * sigma), one.c_in(sigma) / 3, rtol=1e-12)


def test_defaults_of_the_boundary_depend_on_the_form():
    assert precond("edm") == Precond("edm", 0.5, 0.0)
    assert precond("boundary") == Precond("boundary", 0.5, 0.002)
    assert precond("piecewise", 0.7) == Precond("piecewise", 0.7, 0.002)
    assert precond("boundary", 0.5, 0.01).sigma_boundary == 0.01


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("vp",), "must be one of boundary, edm, piecewise, not 'vp'"),
        (("",), "must be one of"),
        (("boundary", 0.0), "sigma_data must be positive"),
        (("boundary", -0.5), "sigma_data must be positive"),
        (("boundary", float("nan")), "sigma_data must be positive"),
        (("edm", 0.5, 0.002), "boundary at sigma 0"),
        (("boundary", 0.5, 0.0), "needs sigma_boundary above 0"),
        (("piecewise", 0.5, -1.0), "needs sigma_boundary above 0"),
        (("boundary", 0.5, float("nan")), "needs sigma_boundary above 0"),
    ],
)
def test_impossible_forms_are_refused(arguments, complaint):
    with pytest.raises(ConfigError, match=complaint):
        precond(*arguments)
