"""cm_group_norm_silu in both of its forms beside its formula in float64, and beside torch."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import host_gpu
import ml_dtypes
import numpy as np
import pytest
import torch
from host_gpu import address, placed
from tiers import covering

from cm_runtime import kernels
from cm_runtime.errors import RequestError
from cm_runtime.kernels.group_norm import BLOCKS, NormPlan, group_norm_silu, plan_norm
from cm_runtime.kernels.launches import Arrays, Images, Type
from cm_runtime.kernels.limits import Limits

pytestmark = pytest.mark.process  # processes which compiles the kernels for the host

AT = Arrays(*[16] * len(Arrays._fields))  # nowhere
Array = np.ndarray[Any, Any]
TYPES: dict[Type, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
ROUNDING = {"fp32": 2.0**-19, "fp16": 2.0**-10, "bf16": 2.0**-7}  # of sums in another order, and of y
ERROR = {"fp32": 1e-5, "fp16": 1.01 * 2.0**-11, "bf16": 1.01 * 2.0**-8}  # allowed, of what is rounded once
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
# Channels, and height and width, of the normalisations of the ImageNet-64 network
IMAGENET = [
    (192, 64),
    (384, 64),
    (576, 64),
    (192, 32),
    (384, 32),
    (576, 32),
    (768, 32),
    (960, 32),
    (384, 16),
    (576, 16),
]
IMAGENET += [(768, 16), (960, 16), (1152, 16), (1344, 16), (576, 8), (768, 8), (1344, 8), (1536, 8)]
A100, H100 = Limits(163 << 10, 1, "sm_80"), Limits(227 << 10, 8, "sm_90")
ADA, BLACKWELL = Limits(99 << 10, 1, "sm_80"), Limits(99 << 10, 8, "sm_120")
EPS = 1e-5


def inputs(shape: tuple[int, ...], type: Type, mean: float = 0.5, spread: float = 2.0) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    n, c, h, w = shape[:4]
    x = (mean + spread * rng.standard_normal((n, h, w, c))).astype(TYPES[type])
    both = rng.standard_normal((n, 2 * c)).astype(TYPES[type])
    gamma, beta = (rng.standard_normal(c).astype(np.float32) for _ in range(2))
    arrays = {"x": x, "gamma": gamma, "beta": beta, "scale_shift": both}
    return {name: placed(array) for name, array in arrays.items()}


def formula(case: dict[str, Array], groups: int, silu: bool = True, has_scale: bool = True) -> Array:
    """The formula by torch in float64."""
    x, gamma, beta, both = (torch.from_numpy(case[name].astype(np.float64)) for name in case)
    y = torch.nn.functional.group_norm(x.movedim(-1, 1).contiguous(), groups, gamma, beta, EPS)
    if has_scale:
        scale, shift = both[:, :, None, None].chunk(2, dim=1)
        y = y * (1 + scale) + shift
    result: Array = (torch.nn.functional.silu(y) if silu else y).movedim(1, -1).numpy()
    return result


def plans(shape: tuple[int, ...], type: Type) -> list[NormPlan]:
    """A plan of each form; parts and threads that no plan has as well."""
    n, c, h, w, groups = shape
    images = Images(n, c, h, w, type, "nhwc")
    cluster = plan_norm(images, groups, H100)
    most = min(8, h * w)
    all = [cluster, cluster._replace(is_cluster=False), cluster._replace(parts=most), plan_norm(images, groups, A100)]
    all += [
        cluster._replace(parts=min(3, h * w), threads=512, is_cluster=False),
        cluster._replace(parts=most, threads=480),
    ]
    return all


def run(
    shape: tuple[int, ...], type: Type, case: dict[str, Array], plan: NormPlan | None = None, **options: Any
) -> Array:
    """y, in memory whose neighbours are looked after; moments are all that its memory has room for."""
    n, c, h, w, groups = shape
    images = Images(n, c, h, w, type, "nhwc")
    plan = plan or plan_norm(images, groups, host_gpu.limits())
    around = host_gpu.empty((case["x"].size + 64,), TYPES[type], 7)
    moments = host_gpu.empty((plan.moments(images, groups) + 16,), np.float32)
    both = address(case["scale_shift"]) if options.get("has_scale", True) else 0
    offset = address(options["offset"]) if "offset" in options else 0
    at = Arrays(x=address(case["x"]), gamma=address(case["gamma"]), beta=address(case["beta"]), scale_shift=both)
    at = at._replace(y=address(around[32:]), moments=address(moments), offset=offset)
    for work in group_norm_silu(images, at, groups, EPS, options.get("silu", True), plan):
        if max(work.cluster / host_gpu.limits().cluster, work.shared / host_gpu.limits().shared) > 1:
            pytest.skip("this GPU has no such clusters")
        host_gpu.launch(work)
    assert (around[:32] == 7).all() and (around[-32:] == 7).all()
    assert np.isnan(moments[-16:]).all()
    return around[32:-32].reshape(case["x"].shape)


def is_close(y: Array, expected: Array, rounding: float) -> bool:
    difference = np.abs(y.astype(np.float64) - expected)
    return bool((difference <= rounding * np.maximum(np.abs(expected), 1)).all())


@pytest.mark.covering(1)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("form", range(6))
def test_in_float32_it_is_its_formula_to_one_in_a_hundred_thousand(
    shape: Any, has_scale: bool, silu: bool, form: int
) -> None:
    case = inputs(shape, "fp32")
    y = run(shape, "fp32", case, plans(shape, "fp32")[form], silu=silu, has_scale=has_scale)
    assert is_close(y, formula(case, shape[4], silu, has_scale), 1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("type", ["fp16", "bf16"])
@pytest.mark.parametrize("form", range(6))
def test_in_half_types_it_errs_at_most_twice_as_much_as_the_plain_formula(shape: Any, type: Any, form: int) -> None:
    """The plain formula: every operation of torch's group_norm and silu rounded to the type."""
    case = inputs(shape, type)
    expected = formula(case, shape[4])
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[type]
    x, gamma, beta, both = (torch.tensor(case[name].astype(np.float32)).to(half) for name in case)
    y = torch.nn.functional.group_norm(x.movedim(-1, 1), shape[4], gamma, beta, EPS)
    scale, shift = both[:, :, None, None].chunk(2, dim=1)
    plain = torch.nn.functional.silu(y * (1 + scale) + shift).movedim(1, -1).double().numpy()
    ours = run(shape, type, case, plans(shape, type)[form]).astype(np.float64)
    assert np.abs(ours - expected).max() <= 2 * np.abs(plain - expected).max()


def network_cases() -> list[Any]:
    """Every pair of shape, type, batch, form and options of the ImageNet-64 network; what is large is slow."""
    limits, types = (H100, A100, BLACKWELL), tuple(TYPES)
    values: list[Any] = [IMAGENET, types, (1, 3, 7), limits, (True, False), (True, False)]
    cases = covering(list(itertools.product(*(range(len(each)) for each in values))), 2)
    params = []
    for (c, size), type, n, limit, *options in (
        [each[i] for each, i in zip(values, case, strict=True)] for case in cases
    ):
        marks = [pytest.mark.slow] if n * c * size * size > 150_000 else []
        params.append(pytest.param((n, c, size, size, 32), type, limit, *options, marks=marks))
    return [pytest.param((1, 192, 64, 64, 32), "fp16", limit, True, True) for limit in limits[:2]] + params


@pytest.mark.parametrize(("shape", "type", "limits", "has_scale", "silu"), network_cases())
def test_at_the_shapes_of_the_network_it_is_torchs_formula_in_float64(
    shape: Any, type: Type, limits: Limits, has_scale: bool, silu: bool
) -> None:
    case = inputs(shape, type)
    n, c, h, w, groups = shape
    plan = plan_norm(Images(n, c, h, w, type, "nhwc"), groups, limits)
    y = run(shape, type, case, plan, silu=silu, has_scale=has_scale)
    assert is_close(y, formula(case, groups, silu, has_scale), ERROR[type])


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("form", range(6))
def test_neither_a_mean_far_from_0_nor_a_tiny_variance_costs_anything(type: Type, form: int) -> None:
    """As sums are of differences: at 10,000 float32 has steps of 0.001, and a sum of them no digit left for 0.003."""
    shape = (2, 48, 16, 16, 8)
    spread = {"fp32": 3e-3, "fp16": 16.0, "bf16": 100.0}[type]  # a few steps of the type
    case = inputs(shape, type, mean=1e4, spread=spread)
    y = run(shape, type, case, plans(shape, type)[form], silu=False)
    assert is_close(y, formula(case, 8, silu=False), ERROR[type])


@pytest.mark.parametrize("type", TYPES)
def test_an_offset_is_added_to_x(type: Type) -> None:
    shape = (2, 96, 5, 7, 32)
    case = inputs(shape, type)
    offset = placed((3 * np.random.default_rng(1).standard_normal(96)).astype(np.float32))
    expected = formula(dict(case, x=case["x"].astype(np.float64) + offset), 32)
    for plan in plans(shape, type):
        assert is_close(run(shape, type, case, plan, offset=offset), expected, ERROR[type])


@pytest.mark.parametrize("form", range(6))
def test_a_first_pixel_that_no_other_is_like_costs_nothing(form: int) -> None:
    shape = (1, 48, 16, 16, 8)
    case = inputs(shape, "fp32")
    case["x"][:, 0, 0] = 1e4
    assert is_close(run(shape, "fp32", case, plans(shape, "fp32")[form]), formula(case, 8), 1e-5)


@pytest.mark.parametrize("type", TYPES)
def test_a_constant_image_becomes_its_shift(type: Type) -> None:
    shape = (1, 32, 5, 7, 4)
    case = inputs(shape, type, mean=1e4, spread=0)
    for plan in plans(shape, type):
        y = run(shape, type, case, plan, silu=False, has_scale=False)
        assert (y == case["beta"].astype(TYPES[type])).all()


@pytest.mark.parametrize("form", range(6))
def test_what_is_not_finite_stays_in_its_group(form: int) -> None:
    shape = (2, 48, 4, 4, 8)
    case = inputs(shape, "fp32")
    plan = plans(shape, "fp32")[form]
    clean = run(shape, "fp32", case, plan)
    for value in (np.nan, np.inf):
        case["x"][1, 2, 3, 17] = value
        y = run(shape, "fp32", case, plan)
        assert np.isnan(y[1, ..., 12:18]).all()
        y[1, ..., 12:18] = clean[1, ..., 12:18]
        assert np.array_equal(y, clean)


@pytest.mark.covering(1)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] < 255], ids=str)
@pytest.mark.parametrize("type", TYPES)
def test_every_launch_computes_the_same(shape: Any, type: Type) -> None:
    """In one launch or two, with more threads or fewer, and in place; sums have another order where parts differ."""
    case = inputs(shape, type)
    n, c, h, w, groups = shape
    images = Images(n, c, h, w, type, "nhwc")
    plan = plan_norm(images, groups, H100)
    expected = run(shape, type, case, plan)
    for threads, parts in ((128, 1), (224, 5), (512, 8)):
        cut = plan._replace(threads=threads, parts=min(parts, h * w))
        one, two = (run(shape, type, case, cut._replace(is_cluster=each)) for each in (True, False))
        assert np.array_equal(one.view(np.uint8), two.view(np.uint8))
        assert is_close(one, expected.astype(np.float64), ROUNDING[type])
    for each in (plan, plan._replace(is_cluster=False)):
        again = dict(case, x=placed(case["x"]))
        moments = host_gpu.empty((each.moments(images, groups) + 16,), np.float32)
        names = {"x": "x", "y": "x", "gamma": "gamma", "beta": "beta", "scale_shift": "scale_shift"}
        at = Arrays(**{name: address(again[source]) for name, source in names.items()}, moments=address(moments))
        for work in group_norm_silu(images, at, groups, EPS, True, each):
            host_gpu.launch(work)
        assert np.array_equal(again["x"].view(np.uint8), expected.view(np.uint8))


@pytest.mark.skipif(host_gpu.ON_GPU, reason="a GPU has an order of its own")
def test_the_order_of_blocks_is_not_seen() -> None:
    shape = (2, 48, 4, 4, 8)
    case = inputs(shape, "fp16")
    for plan in plans(shape, "fp16"):
        expected = run(shape, "fp16", case, plan)
        for seed in (1, 2):
            host_gpu.library().cm_set_order(seed)
            try:
                assert np.array_equal(run(shape, "fp16", case, plan), expected)
            finally:
                host_gpu.library().cm_set_order(0)


# Plans


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("n", [1, 3, 7, 64, 255])
@pytest.mark.parametrize("limits", [H100, BLACKWELL], ids=["H100", "Blackwell"])
def test_clusters_read_every_image_of_the_network_once(type: Type, n: int, limits: Limits) -> None:
    """In blocks that fill the GPU, or of at most one run for each thread."""
    for c, size in IMAGENET:
        images = Images(n, c, size, size, type, "nhwc")
        plan = plan_norm(images, 32, limits)
        (work,) = group_norm_silu(images, AT, 32, EPS, True, plan)
        assert (work.cluster, work.grid[0]) == (plan.parts, plan.parts)
        blocks, runs = np.prod(work.grid), images.elements // np.prod(work.grid) // (4 if type == "fp32" else 8)
        assert blocks >= BLOCKS // 2 or runs <= plan.threads <= 512
        assert 2 * (work.shared + 1024) <= limits.shared + 1024 or plan.parts == 8


def test_the_table_of_the_readme_is_what_is_planned() -> None:
    text = (Path(kernels.__file__).parent / "README.md").read_text()
    rows = re.findall(
        r"^\| (\d+)x(\d+)x\2 \| \d+ \| \d, \d+ \| 4, (\d+) \| (\d+) x (\d) \| (\d+) x (\d), (\d+) KiB", text, re.M
    )
    assert len(rows) == len(IMAGENET)
    for c, size, blocks, *numbers in (map(int, row) for row in rows):
        images = Images(1, c, size, size, "fp16", "nhwc")
        one, many = (plan_norm(images._replace(n=n), 32, H100) for n in (1, 64))
        (work,) = group_norm_silu(images._replace(n=64), AT, 32, EPS, True, many)
        assert numbers == [one.slab, one.parts, many.slab, many.parts, round(work.shared / 1024)]
        assert blocks == -(-c // one.slab) * one.parts


@pytest.mark.parametrize("limits", [A100, ADA, Limits()], ids=["A100", "Ada", "any"])
def test_without_clusters_a_slab_that_fits_in_no_block_takes_two_launches(limits: Limits) -> None:
    images = Images(1, 192, 64, 64, "fp16", "nhwc")
    plan = plan_norm(images, 32, limits)
    works = group_norm_silu(images, AT, 32, EPS, True, plan)
    assert [work.kernel for work in works] == ["cm_group_norm_moments_half", "cm_group_norm_apply_half"]
    assert all(work.cluster == 1 and work.shared <= limits.shared for work in works)
    assert np.prod(works[0].grid) >= BLOCKS
    small = images._replace(channels=768, height=8, width=8)
    assert len(group_norm_silu(small, AT, 32, EPS, True, plan_norm(small, 32, limits))) == 1


def test_an_image_that_fits_in_no_cluster_is_read_twice() -> None:
    images = Images(1, 256, 256, 256, "fp16", "nhwc")
    works = group_norm_silu(images, AT, 32, EPS, True, plan_norm(images, 32, H100))
    assert len(works) == 2 and all(work.shared <= H100.shared for work in works)


def test_what_it_cannot_is_refused() -> None:
    images = Images(1, 32, 4, 4, "fp16", "nhwc")
    plan = plan_norm(images, 32, H100)
    with pytest.raises(RequestError, match="NHWC"):
        group_norm_silu(images._replace(layout="nchw"), AT, 32, EPS, True, plan)
    with pytest.raises(RequestError, match="32 channels cannot be split in 5 groups"):
        plan_norm(images, 5, H100)
    with pytest.raises(RequestError, match="gamma is misaligned: its address must be a multiple of 4"):
        group_norm_silu(images, AT._replace(gamma=18), 32, EPS, True, plan)
    with pytest.raises(RequestError, match="moments is misaligned"):
        group_norm_silu(images, AT._replace(moments=18), 32, EPS, True, plan._replace(is_cluster=False))
    with pytest.raises(RequestError, match="need 1023 threads"):
        plan_norm(Images(1, 1023, 1, 1, "fp32", "nhwc"), 1, H100)
    with pytest.raises(RequestError, match="need 10256 bytes of shared memory, not 8192"):
        plan_norm(Images(1, 512, 1, 1, "fp32", "nhwc"), 1, Limits(8 << 10))
