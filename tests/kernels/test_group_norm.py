"""cm_group_norm_silu beside its formula in float64, and beside torch."""

from __future__ import annotations

from typing import Any

import host_gpu
import ml_dtypes
import numpy as np
import pytest
import torch
from host_gpu import address, placed

from cm_runtime.errors import RequestError
from cm_runtime.kernels import launches
from cm_runtime.kernels.launches import Arrays, Images, NormBlock

pytestmark = pytest.mark.process  # processes which compiles the kernels for the host

AT = Arrays(*[16] * len(Arrays._fields))  # nowhere
Array = np.ndarray[Any, Any]
TYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
# N, C, H, W, groups: 1 to 24 channels a group, widths that no 16 bytes divide, slabs that do not divide the channels
SHAPES = [(1, 32, 8, 8, 32), (2, 64, 7, 5, 32), (3, 96, 4, 4, 32), (1, 128, 16, 16, 32), (2, 192, 3, 1, 32)]
SHAPES += [
    (1, 768, 2, 2, 32),
    (7, 3, 5, 5, 3),
    (1, 255, 3, 3, 51),
    (255, 8, 1, 1, 4),
    (1, 6, 1, 1023, 2),
    (2, 40, 3, 3, 5),
    (1, 65, 4, 4, 5),
]
EPS = 1e-5


def inputs(shape: tuple[int, ...], type: str, mean: float = 0.5, spread: float = 2.0) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    n, c, h, w = shape[:4]
    x = (mean + spread * rng.standard_normal((n, h, w, c))).astype(TYPES[type])
    both = rng.standard_normal((n, 2 * c)).astype(TYPES[type])
    gamma, beta = (rng.standard_normal(c).astype(np.float32) for _ in range(2))
    return {"x": placed(x), "gamma": placed(gamma), "beta": placed(beta), "scale_shift": placed(both)}


def formula(given: dict[str, Array], groups: int, silu: bool, has_scale: bool) -> Array:
    x = given["x"].astype(np.float64)
    n, h, w, c = x.shape
    split = x.reshape(n, h * w, groups, c // groups)
    mean, variance = split.mean(axis=(1, 3), keepdims=True), split.var(axis=(1, 3), keepdims=True)
    y = ((split - mean) / np.sqrt(variance + EPS)).reshape(x.shape) * given["gamma"] + given["beta"]
    if has_scale:
        both = given["scale_shift"].astype(np.float64)[:, None, None]
        y = y * (1 + both[..., :c]) + both[..., c:]
    return y / (1 + np.exp(-y)) if silu else y


def run(shape: tuple[int, ...], type: Any, given: dict[str, Array], has_scale: bool = True, **options: Any) -> Array:
    n, c, h, w, groups = shape
    y = host_gpu.empty(given["x"].shape, TYPES[type])
    both = address(given["scale_shift"]) if has_scale else 0
    at = Arrays(x=address(given["x"]), gamma=address(given["gamma"]), beta=address(given["beta"]), y=address(y))
    images = Images(n, c, h, w, type, "nhwc")
    host_gpu.launch(launches.group_norm_silu(images, at._replace(scale_shift=both), groups, EPS, **options))
    return y


@pytest.mark.covering(2)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize("silu", [True, False])
def test_in_float32_it_is_its_formula_to_one_in_a_hundred_thousand(shape: Any, has_scale: bool, silu: bool) -> None:
    given = inputs(shape, "fp32")
    wanted = formula(given, shape[4], silu, has_scale)
    found = run(shape, "fp32", given, has_scale, silu=silu)
    assert (np.abs(found - wanted) <= 1e-5 * np.maximum(np.abs(wanted), 1)).all()


@pytest.mark.covering(1)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("type", ["fp16", "bf16"])
def test_in_half_types_it_errs_at_most_twice_as_much_as_the_plain_formula(shape: Any, type: Any) -> None:
    """The plain formula: every operation of torch's group_norm and silu rounded to the type."""
    given = inputs(shape, type)
    wanted = formula(given, shape[4], True, True)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[type]
    x, gamma, beta, both = (torch.tensor(given[name].astype(np.float32)).to(half) for name in given)
    y = torch.nn.functional.group_norm(x.movedim(-1, 1), shape[4], gamma, beta, EPS)
    scale, shift = both[:, :, None, None].chunk(2, dim=1)
    plain = torch.nn.functional.silu(y * (1 + scale) + shift).movedim(1, -1).double().numpy()
    found = run(shape, type, given).astype(np.float64)
    assert np.abs(found - wanted).max() <= 2 * np.abs(plain - wanted).max()


@pytest.mark.parametrize("type", TYPES)
def test_a_mean_far_from_0_costs_nothing(type: Any) -> None:
    """As the variance is of differences; of squares there would be none left."""
    shape = (1, 32, 8, 8, 8)
    given = inputs(shape, type, mean=100.0, spread=0.5)
    wanted = formula(given, shape[4], False, False)
    found = run(shape, type, given, False, silu=False).astype(np.float64)
    rounding = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}[type]
    assert np.abs(found - wanted).max() <= 3e-5 * np.abs(wanted).max() + rounding * np.abs(wanted).max()


@pytest.mark.covering(1)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] < 255], ids=str)
@pytest.mark.parametrize("type", TYPES)
def test_every_launch_computes_the_same(shape: Any, type: Any) -> None:
    """With the slab in shared memory or not, with more threads or fewer, and in place; sums have another order."""
    given = inputs(shape, type)
    wanted = run(shape, type, given, block=NormBlock(1 << 20)).astype(np.float64)
    for threads in (64, 255, 512, 1024):
        for shared in (1 << 20, 34 << 10):
            found = run(shape, type, given, block=NormBlock(shared, threads)).astype(np.float64)
            rounding = {"fp32": 2.0**-20, "fp16": 2.0**-10, "bf16": 2.0**-7}[type]
            assert (np.abs(found - wanted) <= rounding * np.maximum(np.abs(wanted), 1)).all()
    again = dict(given, x=placed(given["x"]))
    n, c, h, w, groups = shape
    at = Arrays(
        **{name: address(again["x" if name == "y" else name]) for name in ("x", "gamma", "beta", "scale_shift", "y")}
    )
    work = launches.group_norm_silu(Images(n, c, h, w, type, "nhwc"), at, groups, EPS)
    host_gpu.launch(work)
    assert (np.abs(again["x"].astype(np.float64) - wanted) <= rounding * np.maximum(np.abs(wanted), 1)).all()


def test_a_slab_that_fits_is_kept_and_others_are_not() -> None:
    images = Images(1, 128, 32, 32, "fp16", "nhwc")
    fits = launches.group_norm_silu(images, AT, block=NormBlock(100 << 10))
    assert fits.shared > 16 * 1024 * 2 and fits.arguments[-1] == 1
    larger = launches.group_norm_silu(images._replace(height=256), AT, block=NormBlock(100 << 10))
    assert larger.shared < 48 << 10 and larger.arguments[-1] == 0
    assert fits.grid == larger.grid == (8, 1, 1)  # slabs of 16 channels, 32 bytes


def test_what_it_cannot_is_refused() -> None:
    images = Images(1, 32, 4, 4, "fp16", "nhwc")
    with pytest.raises(RequestError, match="NHWC"):
        launches.group_norm_silu(images._replace(layout="nchw"), AT)
    with pytest.raises(RequestError, match="32 channels cannot be split in 5 groups"):
        launches.group_norm_silu(images, AT, groups=5)
    with pytest.raises(RequestError, match="gamma is misaligned: its address must be a multiple of 4"):
        launches.group_norm_silu(images, AT._replace(gamma=18))
    with pytest.raises(RequestError, match="need 1023 threads"):
        launches.group_norm_silu(Images(1, 1023, 1, 1, "fp32", "nhwc"), AT, groups=1)
