"""cm_first_noise, cm_step and cm_finish beside their formulas in float64, and beside the step ops in NumPy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import host_gpu
import ml_dtypes
import numpy as np
import pytest
from host_gpu import address, placed

from cm_runtime.errors import RequestError
from cm_runtime.kernels import launches
from cm_runtime.kernels.launches import LEVEL, REQUEST, Arrays, Images, Placed
from cm_runtime.precond import precond
from cm_runtime.projections import Edit, Luma, Mask, PatchMean, Projection
from cm_runtime.sampling import HostSteps, to_uint8

pytestmark = pytest.mark.process  # processes which compiles the kernels for the host

AT = Arrays(*[16] * len(Arrays._fields))  # nowhere
Array = np.ndarray[Any, Any]
TYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}  # relative, of a result in that type
LEAST = {"fp32": 2.0**-149, "fp16": 2.0**-24, "bf16": 2.0**-133}  # spacing of subnormals
ULP = 2.0**-23
SHAPES = [(1, 1, 1, 1), (3, 3, 7, 5), (7, 1, 28, 28), (2, 4, 8, 6), (1, 7, 3, 255), (255, 1, 1, 7), (1, 3, 1, 1023)]
SHAPES += [(1023, 3, 1, 1), (1, 255, 2, 2), (1, 1023, 1, 1), (2, 3, 16, 16), (3, 3, 2, 6), (2, 4, 4, 4)]
IMAGES = [Images(*shape, type, layout) for shape in SHAPES for type in TYPES for layout in ("nchw", "nhwc")]  # type: ignore[arg-type]
IMAGES += [
    Images(*shape, type, layout, "fp32") for shape in SHAPES for type in ("fp16", "bf16") for layout in ("nchw", "nhwc")
]  # type: ignore[arg-type]
LAYOUTS = pytest.mark.parametrize("layout", ["nchw", "nhwc"])


def laid_out(array: Array, images: Images) -> Array:
    """(N,C,H,W) in the layout of ``images``, where a kernel can take it."""
    return placed(array if images.layout == "nchw" else np.moveaxis(array, 1, -1))


def as_nchw(array: Array, images: Images) -> Array:
    return array if images.layout == "nchw" else np.moveaxis(array, -1, 1)


@dataclass
class Case:
    """Inputs of a step drawn for ``images``: x and z float32, F in the network's type, at a level's coefficients."""

    images: Images
    form: str = "boundary"
    sigma: tuple[float, float] = (80.0, 1.5)
    clip: bool = True
    projection: Projection | None = None
    seed: int = 0
    bad: Array = field(default_factory=lambda: host_gpu.empty((1,), np.int32))

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        shape = self.images[:4]
        self.x = (self.sigma[0] * rng.standard_normal(shape)).astype(np.float32)
        self.F = rng.standard_normal(shape).astype(TYPES[self.images.F_type])
        self.z = rng.standard_normal(shape).astype(np.float32)
        self.levels = placed(launches.levels(self.sigma, precond(self.form), 0.002))
        self.request = placed(np.array([(3, 17)], REQUEST))
        known = self.projection and placed(self.projection.known)
        mask = placed(self.projection.mask) if isinstance(self.projection, Mask) else None
        self.edit = self.projection and Placed(self.projection, address(known), 0 if mask is None else address(mask))
        self.kept = known, mask

    def arrays(self, k: int, **arrays: Array) -> Arrays:
        """Those of the case, at level ``k``, and others."""
        level = address(self.levels) + k * LEVEL.itemsize
        named = {name: address(array) for name, array in arrays.items()}
        return Arrays(request=address(self.request), level=level, not_finite=address(self.bad), **named)

    def f(self) -> tuple[Array, Array]:
        """x0 in float64 as algorithm 4 has it, and the size of what was added to make it."""
        c = precond(self.form)
        s = np.float64(np.float32(self.sigma[0]))
        skip, out = c.c_skip(s) * self.x.astype(np.float64), c.c_out(s) * self.F.astype(np.float64)
        x0 = skip + out
        if self.clip:
            x0 = np.clip(x0, -1, 1)
        size = np.maximum(np.abs(skip), np.abs(out))
        if isinstance(self.projection, Luma | PatchMean):
            size = np.maximum(size, 1)  # sums over channels and patches, of pixels of that size
        return projected(x0, self.projection), size

    def run(self, kind: str, in_place: bool = False, noise: str = "given") -> tuple[Array, ...]:
        """What the kernels write: x_next and x_in, or bytes and floats, in NCHW or NHWC as they are."""
        x, F = laid_out(self.x, self.images), laid_out(self.F, self.images)
        n, c, h, w = self.images[:4]
        if kind == "finish":
            made = host_gpu.empty((n, h, w, c), np.uint8), host_gpu.empty((n, h, w, c), np.float32)
            at = self.arrays(1, x=x, F=F, bytes=made[0], floats=made[1])
            work = launches.finish(self.images, at, clip=self.clip, edit=self.edit)
        else:
            z = placed(self.z)
            type = TYPES[self.images.type]
            made = (x, F) if in_place else (host_gpu.empty(x.shape, x.dtype), host_gpu.empty(F.shape, type))
            at = self.arrays(1, x=x, F=F, x_next=made[0], x_in=made[1], **({"given": z} if noise == "given" else {}))
            work = launches.step(self.images, at, 1, clip=self.clip, edit=self.edit)
        host_gpu.launch(work)
        return made


def projected(x0: Array, projection: Projection | None) -> Array:
    """The projection by explicit orthogonal matrices, A^-1[(A y)(1 - Omega) + (A x0) Omega], in float64."""
    n, c, h, w = x0.shape
    if isinstance(projection, Mask):
        m = projection.mask.astype(np.float64)
        return m * projection.known + (1 - m) * x0
    if isinstance(projection, Luma):
        first = np.array(projection.w) / np.linalg.norm(projection.w)
        A = np.linalg.qr(np.column_stack([first, np.eye(3)[:, :2]]))[0].T
        A *= np.sign(A[0] @ first)
        coefficients = np.einsum("ij,njhw->nihw", A, x0)
        coefficients[:, 0] = projection.known[:, 0] / np.linalg.norm(projection.w)
        return np.einsum("ji,njhw->nihw", A, coefficients)
    if isinstance(projection, PatchMean):
        p = projection.p
        rng = np.random.default_rng(0)
        A = np.linalg.qr(np.column_stack([np.ones(p * p), rng.standard_normal((p * p, p * p - 1))]))[0].T
        A *= np.sign(A[0, 0])
        patches = x0.reshape(n, c, h // p, p, w // p, p).transpose(0, 1, 2, 4, 3, 5).reshape(n, c, h // p, w // p, -1)
        coefficients = patches @ A.T
        coefficients[..., 0] = projection.known * p
        patches = (coefficients @ A).reshape(n, c, h // p, w // p, p, p)
        return patches.transpose(0, 1, 2, 4, 3, 5).reshape(n, c, h, w)
    return x0


def masks(images: Images, shared: bool) -> Mask:
    rng = np.random.default_rng(1)
    n, c, h, w = images[:4]
    mask = rng.integers(0, 2, (1 if shared else n, 1 if shared else c, h, w)).astype(np.float32)
    return Mask(rng.uniform(-1, 1, (1 if shared else n, c, h, w)).astype(np.float32), mask)


def check_step(case: Case, made: tuple[Array, ...], more: float = 2) -> None:
    """Within ``more`` ulp of the largest number in the sum; x_in within the rounding of its type."""
    x0, size = case.f()
    renoise = np.sqrt(case.sigma[1] ** 2 - 0.002**2)
    wanted = x0 + renoise * case.z.astype(np.float64)
    x_next, x_in = (as_nchw(each, case.images).astype(np.float64) for each in made)
    largest = np.maximum.reduce([size, np.abs(x0), np.abs(renoise * case.z)])
    assert (np.abs(x_next - wanted) <= more * ULP * largest + LEAST["fp32"]).all()
    scaled = precond(case.form).c_in(case.sigma[1]) * x_next
    allowed = np.abs(scaled) * (ROUNDING[case.images.type] + 2 * ULP) + LEAST[case.images.type]
    assert (np.abs(x_in - scaled) <= allowed).all()
    assert case.bad[0] == 0


def check_finish(case: Case, made: tuple[Array, ...], more: float = 2) -> None:
    """Floats likewise; bytes those of the floats."""
    x0, size = case.f()
    written, floats = made
    assert (
        np.abs(floats - np.moveaxis(x0, 1, -1)) <= more * ULP * np.moveaxis(np.maximum(size, np.abs(x0)), 1, -1)
    ).all()
    assert np.array_equal(written, to_uint8(np.moveaxis(floats, -1, 1)))


@pytest.mark.parametrize("images", IMAGES, ids=str)
def test_a_step_is_its_formula(images: Images) -> None:
    for form, sigma, clip in (("boundary", (80.0, 1.5), True), ("edm", (0.3, 0.01), False)):
        case = Case(images, form, sigma, clip)
        check_step(case, case.run("step"))
        check_finish(case, case.run("finish"))


@pytest.mark.parametrize("images", IMAGES, ids=str)
def test_a_mask_is_its_formula_and_what_is_known_is_kept_to_the_bit(images: Images) -> None:
    for shared in (False, True):
        case = Case(images, projection=masks(images, shared))
        check_step(case, case.run("step"))
        made = case.run("finish")
        check_finish(case, made)
        mask, known = (np.broadcast_to(each, images[:4]) for each in (case.projection.mask, case.projection.known))  # type: ignore[union-attr]
        assert np.array_equal(np.moveaxis(made[1], -1, 1)[mask == 1], known[mask == 1])


@pytest.mark.parametrize("images", [each for each in IMAGES if each.channels == 3], ids=str)
def test_a_luminance_is_its_formula(images: Images) -> None:
    n, _, h, w = images[:4]
    for count in {1, n}:
        known = np.random.default_rng(1).uniform(-1, 1, (count, 1, h, w)).astype(np.float32)
        case = Case(images, projection=Luma(known))
        check_step(case, case.run("step"), more=4)
        made = case.run("finish")
        check_finish(case, made, more=4)
        luma = (made[1] * np.array(case.projection.w)).sum(-1)  # type: ignore[union-attr]
        assert np.abs(luma - np.broadcast_to(known[:, 0], luma.shape)).max() < 1e-6


PATCHED = [(1, 1, 2, 2), (3, 3, 8, 16), (2, 7, 16, 8), (255, 1, 4, 4), (1, 3, 8, 1024)]


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("shape", PATCHED)
@LAYOUTS
def test_a_patch_mean_is_its_formula(shape: Any, type: Any, layout: Any) -> None:
    images = Images(*shape, type, layout)
    n, c, h, w = shape
    for p in (each for each in (2, 4, 8) if h % each == 0 and w % each == 0):
        for count in {1, n}:
            known = np.random.default_rng(1).uniform(-1, 1, (count, c, h // p, w // p)).astype(np.float32)
            case = Case(images, projection=PatchMean(known, p))
            check_step(case, case.run("step"), more=4)
            made = case.run("finish")
            check_finish(case, made, more=4)
            means = made[1].reshape(n, h // p, p, w // p, p, c).mean(axis=(2, 4), dtype=np.float64)
            assert np.abs(means - np.moveaxis(known, 1, -1)).max() < 1e-6


@pytest.mark.parametrize("images", [each for each in IMAGES if each[:4] in ((3, 3, 7, 5), (2, 3, 16, 16))], ids=str)
@pytest.mark.parametrize("kind", ["plain", "mask", "luma", "patch"])
def test_in_place_is_out_of_place(images: Images, kind: str) -> None:
    n, c, h, w = images[:4]
    if (kind == "patch" and h % 4) or images.F_type != images.type:
        pytest.skip("no patches, or x_in has another size than F")
    known = np.full((n, 1, h, w), 0.3, np.float32)
    projections = {"mask": masks(images, False), "luma": Luma(known), "patch": None, "plain": None}
    projection = (
        PatchMean(np.full((1, c, h // 4, w // 4), 0.3, np.float32), 4) if kind == "patch" else projections[kind]
    )
    case = Case(images, projection=projection)
    for noise in ("given", "drawn"):
        for here, there in zip(case.run("step", True, noise), case.run("step", False, noise), strict=True):
            assert np.array_equal(here, there)


@pytest.mark.parametrize(
    "images", [Images(3, 3, 8, 8, "fp16", "nhwc"), Images(3, 2, 8, 8), Images(2, 3, 5, 5)], ids=str
)
def test_noise_that_is_drawn_is_noise_that_is_given(images: Images) -> None:
    """The draw of cm_step is that of cm_first_noise, and so what tests/kernels/test_noise.py proves of it holds."""
    case = Case(images)
    plain = Images(*images[:4])
    level, bad = placed(np.array([(0, 1, 1, 1)], LEVEL)), host_gpu.empty((1,), np.int32)
    zero, z = host_gpu.empty(images[:4], np.float32, 0), host_gpu.empty(images[:4], np.float32)
    host_gpu.launch(
        launches.step(
            plain, case.arrays(0, F=zero, x_next=z)._replace(level=address(level), not_finite=address(bad)), 1
        )
    )
    case.z = z
    for given, drawn in zip(case.run("step", noise="given"), case.run("step", noise="drawn"), strict=True):
        assert np.array_equal(given, drawn)


@pytest.mark.parametrize("images", IMAGES, ids=str)
def test_the_first_noise_is_scaled_by_sigma_and_c_in(images: Images) -> None:
    case = Case(images, sigma=(80.0, 1.5))
    z = placed(case.z)
    shape = laid_out(case.x, images).shape
    x, x_in = host_gpu.empty(shape, np.float32), host_gpu.empty(shape, TYPES[images.type])
    host_gpu.launch(launches.first_noise(images, case.arrays(0, x=x, x_in=x_in, given=z)))
    found = as_nchw(x, images)
    assert np.array_equal(found, np.float32(80) * case.z)
    scaled = precond("boundary").c_in(80.0) * found.astype(np.float64)
    allowed = np.abs(scaled) * (ROUNDING[images.type] + 2 * ULP) + LEAST[images.type]
    assert (np.abs(as_nchw(x_in, images).astype(np.float64) - scaled) <= allowed).all()


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", ["plain", "mask", "luma", "patch"])
def test_the_steps_of_a_denoiser_are_those_of_the_host(kind: str, clip: bool) -> None:
    """No skip-scale: F is f itself."""
    images = Images(3, 3, 8, 12)
    rng = np.random.default_rng(0)
    known = rng.uniform(-1, 1, (3, 1, 8, 12)).astype(np.float32)
    small = rng.uniform(-1, 1, (1, 3, 2, 3)).astype(np.float32)
    projection = {"plain": None, "mask": masks(images, False), "luma": Luma(known), "patch": PatchMean(small, 4)}[kind]
    case = Case(images, clip=clip, projection=projection)
    case.levels = placed(launches.levels((80.0, 1.5), precond("boundary"), 0.002, is_f=True))
    f, z, x_next = placed(case.F * 1.2), placed(case.z), host_gpu.empty(images[:4], np.float32)
    options: Any = {"clip": clip, "edit": case.edit}
    host_gpu.launch(launches.step(images, case.arrays(1, given=z, F=f, x_next=x_next), 1, **options))
    host = HostSteps(lambda k: case.z, 0.002, clip, Edit(case.x, projection))
    assert np.abs(x_next - host.step(case.F * 1.2, 1, 1.5)).max() < 1e-6
    made, floats = host_gpu.empty((3, 8, 12, 3), np.uint8), host_gpu.empty((3, 8, 12, 3), np.float32)
    host_gpu.launch(launches.finish(images, case.arrays(2, F=f, bytes=made, floats=floats), **options))
    x0 = host.finish(case.F * 1.2)
    assert np.abs(floats - np.moveaxis(x0, 1, -1)).max() < 1e-6
    assert np.abs(made.astype(int) - to_uint8(x0)).max() <= 1
    assert (made != to_uint8(x0)).mean() < 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("images", [each for each in IMAGES if each[:4] in ((3, 3, 7, 5), (2, 3, 16, 16))], ids=str)
def test_what_is_not_finite_is_flagged(images: Images, value: float) -> None:
    for kind in ("step", "finish"):
        case = Case(images)
        case.F[1, 2, 3, 4] = value
        case.run(kind)
        assert case.bad[0] == 1
    patches = Images(1, 1, 4, 4, images.type)
    for kind in ("step", "finish"):
        case = Case(patches, projection=PatchMean(np.zeros((1, 1, 2, 2), np.float32), 2))
        case.F[0, 0, 3, 3] = value
        case.run(kind)
        assert case.bad[0] == 1


@pytest.mark.parametrize("kind", ["plain", "mask", "luma", "patch"])
def test_every_launch_computes_the_same(kind: str) -> None:
    images = Images(3, 3, 8, 8, "fp16", "nhwc")
    known = np.full((3, 1, 8, 8), 0.3, np.float32)
    small = PatchMean(np.full((1, 3, 2, 2), 0.3, np.float32), 4)
    projection = {"plain": None, "mask": masks(images, False), "luma": Luma(known), "patch": small}[kind]
    case = Case(images, projection=projection)
    wanted = case.run("step")
    launch = host_gpu.launch
    for grid, block in ((1, 1), (1, 512), (3, 7), (50, 32)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                host_gpu, "launch", lambda work, g=grid, b=block: launch(work._replace(grid=(g, 1, 1), block=(b, 1, 1)))
            )
            for found, each in zip(case.run("step"), wanted, strict=True):
                assert np.array_equal(found, each)


def test_nothing_is_written_beside_the_images() -> None:
    for images in (Images(1, 3, 5, 5, "fp16", "nhwc"), Images(2, 1, 3, 3), Images(1, 4, 8, 8, "bf16", "nhwc")):
        case = Case(images)
        x, F = laid_out(case.x, images), laid_out(case.F, images)
        around = host_gpu.empty((x.size + 64,), np.float32, 7), host_gpu.empty((F.size + 64,), F.dtype, 7)
        inside = [each[32:] for each in around]
        host_gpu.launch(launches.step(images, case.arrays(1, x=x, F=F, x_next=inside[0], x_in=inside[1]), 1))
        for each in around:
            assert (each[:32] == 7).all() and (each[-32:] == 7).all() and not (each[32:-32] == 7).any()


def test_images_that_are_moved_one_by_one_may_lie_anywhere() -> None:
    """As the second of two draws of 3 images of 3x7x5 does, 1260 bytes behind the first."""
    images = Images(3, 3, 7, 5)
    case = Case(images)
    both = placed(np.stack([case.z, case.z]))
    assert (address(both) + both[0].nbytes) % 16
    made = [host_gpu.empty((*images[:4],), np.float32) for _ in range(2)]
    for z, x in zip(both, made, strict=True):
        host_gpu.launch(launches.first_noise(images, case.arrays(0, x=x, given=z)))
    assert np.array_equal(*made)
    with pytest.raises(RequestError, match="given is misaligned: its address must be a multiple of 16"):
        launches.first_noise(Images(3, 3, 8, 8), AT._replace(given=20))


# What is refused


@pytest.mark.parametrize("name", ["F", "x_next", "x", "x_in", "given"])
@pytest.mark.parametrize("offset", [2, 4, 8])
def test_a_misaligned_view_is_refused(name: str, offset: int) -> None:
    at = AT._replace(**{name: 64 + offset})
    with pytest.raises(RequestError, match=f"{name} is misaligned"):
        launches.step(Images(1, 1, 8, 8), at, 1)


@pytest.mark.parametrize(
    "shape", [(0, 3, 8, 8), (1, 0, 8, 8), (1, 3, 0, 8), (1 << 20, 3, 256, 256), (1, 3, 1 << 15, 1 << 15)]
)
def test_sizes_that_are_no_batch_are_refused(shape: Any) -> None:
    with pytest.raises(RequestError, match="are no batch"):
        launches.finish(Images(*shape), AT)


def test_numbers_out_of_range_and_a_place_that_is_taken_are_refused() -> None:
    images = Images(1, 3, 8, 8, "fp16", "nchw", "fp32")
    with pytest.raises(RequestError, match="x_in cannot be written over F, which is fp32 and not fp16"):
        launches.step(images, AT._replace(F=64, x_in=64), 1)
    for draw in (-1, 1 << 32):
        with pytest.raises(RequestError, match="draw must be from 0"):
            launches.first_noise(images, AT, draw)
    with pytest.raises(RequestError, match="patches are more than"):
        edit = Placed(PatchMean(np.zeros((1, 64, 128, 64), np.float32), 2), 16)
        launches.finish(Images(1 << 16, 64, 256, 128), AT, edit=edit)


def test_nothing_to_write_is_refused() -> None:
    with pytest.raises(RequestError, match="neither"):
        launches.finish(Images(1, 1, 8, 8), AT._replace(bytes=0, floats=0))


def test_projections_that_do_not_fit_are_refused() -> None:
    images = Images(2, 3, 8, 8)
    zeros = lambda *shape: np.zeros(shape, np.float32)  # noqa: E731
    wrong: list[tuple[Projection, str]] = [
        (Mask(zeros(3, 3, 8, 8), zeros(1, 1, 8, 8)), "the known image must be"),
        (Mask(zeros(2, 3, 8, 8), zeros(1, 2, 8, 8)), "the mask must be"),
        (Mask(zeros(2, 3, 8, 8), np.zeros((1, 1, 8, 8))), "float32, not"),
        (Luma(zeros(2, 3, 8, 8)), "the luminance must be"),
        (Luma(zeros(2, 1, 8, 8), (0, 0, 0)), "weights are all 0"),
        (PatchMean(zeros(2, 3, 4, 4), 4), "the small image must be"),
        (PatchMean(zeros(2, 3, 4, 4), 3), "not made of 3x3 patches"),
        (PatchMean(zeros(2, 3, 8, 8), 1), "on a GPU patches are of 2, 4, 8"),
    ]
    for projection, reason in wrong:
        with pytest.raises(RequestError, match=reason):
            launches.finish(images, AT, edit=Placed(projection, 16, 16))
    with pytest.raises(RequestError, match="3 channels, not 1"):
        launches.finish(Images(2, 1, 8, 8), AT, edit=Placed(Luma(zeros(2, 1, 8, 8)), 16))
