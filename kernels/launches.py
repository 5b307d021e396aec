"""The kernels as launches: names, grids and arguments, made of addresses on a device and shapes, and checked.

Whoever launches them, pycuda or the host build of the tests, does so with these and nothing else. The words are those
of `sampling.HostSteps`, which is the same mathematics in NumPy; images are in the network's type and layout.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from cm_runtime.errors import RequestError
from cm_runtime.errors.wording import quantity
from cm_runtime.precond import Precond
from cm_runtime.projections import Luma, Mask, PatchMean, Projection

Type = Literal["fp32", "fp16", "bf16"]
Layout = Literal["nchw", "nhwc"]
TYPES: dict[Type, str] = {"fp32": "float", "fp16": "half", "bf16": "bfloat16"}
SIZES: dict[Type, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
ALIGNMENT = 16
ONE_BY_ONE = ("not_finite", "level", "request", "sigma", "offset", "gamma", "beta", "scale_shift")
THREADS = 256
MOST_ROWS = 65535  # of blocks
MOST_BLOCKS = 1 << 16  # a launch of fewer threads than items goes round
PATCHES = (2, 4, 8)
NORM_THREADS = 512  # of a block of the normalisation at most: group_norm.cu

LEVEL = np.dtype([("c_skip", "f4"), ("c_out", "f4"), ("renoise", "f4"), ("c_in", "f4")])  # steps.cu's Level
REQUEST = np.dtype([("seed", "<u8"), ("first", "<u8")])  # philox.h's Request


class Launch(NamedTuple):
    """kernel: its entry point; shared: bytes of dynamic shared memory; arguments: NumPy scalars, addresses uint64.

    cluster: blocks, neighbours along x, that share their shared memory; 1 launches as ever.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arguments: tuple[np.generic, ...]
    cluster: int = 1


class Images(NamedTuple):
    """A batch as a network sees it: n images of (channels, height, width), their type and layout.

    type: of what it reads, x_in; output: of F, where that is float32 all the same; None is ``type``.
    """

    n: int
    channels: int
    height: int
    width: int
    type: Type = "fp32"
    layout: Layout = "nchw"
    output: Literal["fp32"] | None = None

    @property
    def pixels(self) -> int:
        """Pixels of one image."""
        return self.height * self.width

    @property
    def elements(self) -> int:
        """Elements of the batch."""
        return self.n * self.channels * self.pixels

    @property
    def F_type(self) -> Type:
        """The type of F."""
        return self.output or self.type

    def suffix(self, *types: Type) -> str:
        """The end of its kernels' names; with one channel the layouts are one."""
        types_text = "_".join(TYPES[type] for type in dict.fromkeys(types))
        return f"{types_text}_{'nchw' if self.channels == 1 else self.layout}"


class Arrays(NamedTuple):
    """Addresses of a kernel's arrays, as its formula names them; 0 for those that it does without."""

    request: int = 0
    level: int = 0
    given: int = 0
    x: int = 0
    F: int = 0
    x_next: int = 0
    x_in: int = 0
    y: int = 0
    sigma: int = 0
    offset: int = 0
    gamma: int = 0
    beta: int = 0
    scale_shift: int = 0
    moments: int = 0
    bytes: int = 0
    floats: int = 0
    not_finite: int = 0

    def pointers(self, *names: str, is_wide: bool = True) -> tuple[np.generic, ...]:
        """Some of them as arguments. Raises RequestError for one that is misaligned."""
        return _pointers(is_wide, **{name: getattr(self, name) for name in names})


class Placed(NamedTuple):
    """A projection whose arrays are on the device: the addresses of the known image and of a mask."""

    projection: Projection
    known: int
    mask: int = 0


def levels(sigmas: tuple[float, ...], form: Precond, sigma_min: float, *, is_f: bool = False) -> np.ndarray:
    """The coefficients of a request's steps, (K+1,) `LEVEL`: entry k is for the kernel before evaluation k, K the last.

    c_skip and c_out are those of the evaluation before it, renoise and c_in those of the one after it. is_f: the
    network is f itself, a denoiser graph, which scales its own input.
    """
    table = np.zeros(len(sigmas) + 1, LEVEL)
    s = np.array(sigmas, np.float32).astype(np.float64)  # so that coefficients are rounded once
    table["c_skip"][1:], table["c_out"][1:] = (0, 1) if is_f else (form.c_skip(s), form.c_out(s))
    table["c_in"][:-1] = 1 if is_f else form.c_in(s)
    table["renoise"][:-1] = [sigmas[0], *(math.sqrt(sigma**2 - sigma_min**2) for sigma in sigmas[1:])]
    return table


def first_noise(images: Images, at: Arrays, draw: int = 0) -> Launch:
    """x = sigma_0 z float32, and x_in = c_in x in the network's type, unless 0; z is ``given``, or drawn if 0."""
    arguments = (
        *at.pointers("request", "level"),
        _draw(draw),
        *at.pointers("given", "x", "x_in", is_wide=_width(images.pixels, images.type) > 1),
        *check_sizes(images),
    )
    return Launch(f"cm_first_noise_{images.suffix(images.type)}", *_grid(_runs(images, images.type)), 0, arguments)


def step(images: Images, at: Arrays, draw: int, *, clip: bool = True, edit: Placed | None = None) -> Launch:
    """x_next = project(clamp(c_skip x + c_out F)) + renoise z_draw, and x_in = c_in x_next, unless 0.

    x 0: F is f itself. not_finite: an int32 that becomes 1 where f is not finite. x_next may be x, and x_in may be F
    where they have one type.
    """
    if at.x_in and at.x_in == at.F and images.type != images.F_type:
        raise RequestError(f"x_in cannot be written over F, which is {images.F_type} and not {images.type}")
    head = (
        *at.pointers("request", "level"),
        _draw(draw),
        *at.pointers("given", "x", "F", "x_next", "x_in", is_wide=_is_wide(images, images.type, edit)),
        *check_sizes(images),
        np.uint32(clip),
        *at.pointers("not_finite"),
    )
    kind, more = _edit(images, edit)
    name = f"cm_step_{kind}{images.suffix(images.type, images.F_type)}"
    return Launch(name, *_grid(_items(images, images.type, edit)), 0, head + more)


def finish(images: Images, at: Arrays, *, clip: bool = True, edit: Placed | None = None) -> Launch:
    """project(clamp(c_skip x + c_out F)) as uint8 at ``bytes`` and as float32 at ``floats``, NHWC, unless 0."""
    if not at.bytes and not at.floats:
        raise RequestError("finish writes bytes or floats, and was given neither")
    is_wide = _is_wide(images, images.F_type, edit)
    pointers = at.pointers("level", "x", "F", "bytes", "floats", is_wide=is_wide)
    head = (*pointers, *check_sizes(images), np.uint32(clip), *at.pointers("not_finite"))
    kind, more = _edit(images, edit)
    name = f"cm_finish_{kind}{images.suffix(images.F_type)}"
    return Launch(name, *_grid(_items(images, images.F_type, edit)), 0, head + more)


def skip_scale(images: Images, at: Arrays, form: Precond, *, levels: int | None = None) -> Launch:
    """y = c_skip(sigma) x + c_out(sigma) F, float32; sigma: (levels,) float32, one an image or one for all."""
    if form.form == "piecewise":
        raise RequestError("the piecewise form has no skip-scale; it is a choice between x and F")
    count = images.n if levels is None else levels
    if count not in (1, images.n):
        raise RequestError(f"sigma must be one number, or one for each of {quantity(images.n, 'image')}, not {count}")
    check_sizes(images)
    size = images.channels * images.pixels
    bits = (np.float32(value).view(np.int32) for value in (form.sigma_data, form.sigma_boundary))
    arguments = (*at.pointers("x", "F", "sigma"), np.int32(size), np.int32(count), *bits, *at.pointers("y"))
    (blocks, _, _), block = _grid(-(-size // _width(size, images.F_type)))
    return Launch(f"cm_skip_scale_{TYPES[images.F_type]}", (blocks, count_rows(images), 1), block, 0, arguments)


def _pointers(is_wide: bool = True, /, **addresses: int) -> tuple[np.generic, ...]:
    """Raises RequestError for one that is no multiple of 16, as a view into the middle of an array has.

    What kernels read number by number, parameters, or all of it where not is_wide, may be at multiples of 4.
    """
    for name, address in addresses.items():
        multiple = ALIGNMENT if is_wide and name not in ONE_BY_ONE else 4
        if address % multiple:
            raise RequestError(f"{name} is misaligned: its address must be a multiple of {multiple} bytes")
    return tuple(np.uint64(address) for address in addresses.values())


def check_sizes(images: Images) -> tuple[np.generic, ...]:
    """Raises RequestError for sizes that are none or beyond the kernels' 32-bit indices."""
    if min(images[:4]) < 1 or images.channels * images.pixels >= 1 << 31 or images.n * images.pixels >= 1 << 32:
        raise RequestError(
            f"{quantity(images.n, 'image')} of {images.channels}x{images.height}x{images.width} are no batch"
        )
    return np.uint32(images.n), np.uint32(images.channels), np.uint32(images.pixels)


def _width(size: int, type: Type) -> int:
    """Elements that a thread moves at once of runs of ``size``: see portable.h and steps.cu."""
    most = ALIGNMENT // SIZES[type]
    return 1 if size % most else most


def _is_wide(images: Images, type: Type, edit: Placed | None) -> bool:
    """Return True if a thread moves several elements together; if not, arrays may lie at any of their elements."""
    return _width(images.pixels, type) > 1 or (edit is not None and isinstance(edit.projection, PatchMean))


def count_rows(images: Images) -> int:
    """Images as rows of blocks. Raises RequestError for more than a grid has."""
    if images.n > MOST_ROWS:
        raise RequestError(f"this kernel takes {MOST_ROWS} images at once, not {images.n}")
    return images.n


def _draw(draw: int) -> np.generic:
    if not 0 <= draw < 1 << 32:
        raise RequestError(f"draw must be from 0 to {(1 << 32) - 1}, not {draw}")
    return np.uint32(draw)


def _runs(images: Images, type: Type) -> int:
    return images.n * images.pixels // _width(images.pixels, type)


def _items(images: Images, type: Type, edit: Placed | None) -> int:
    """The items that the threads of a launch are shared out over."""
    if edit is not None and isinstance(edit.projection, PatchMean):
        patches = images.elements // edit.projection.p**2
        if patches >= 1 << 32:
            raise RequestError(f"{patches} patches are more than the kernels can count")
        return patches
    return _runs(images, type)


def _grid(items: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return (min(-(-items // THREADS), MOST_BLOCKS), 1, 1), (THREADS, 1, 1)


def _edit(images: Images, edit: Placed | None) -> tuple[str, tuple[np.generic, ...]]:
    """The part of a kernel's name that says its projection, and the arguments for it. Raises RequestError."""
    if edit is None:
        return "", ()
    projection, n, c, pixels = edit.projection, images.n, images.channels, images.pixels
    projection.check((n, c, images.height, images.width))
    stride = np.uint32(0 if len(projection.known) == 1 else projection.known[0].size)
    if isinstance(projection, Mask):
        each, channel = projection.mask.shape[:2]
        strides = (stride, np.uint32(0 if each == 1 else channel * pixels), np.uint32(0 if channel == 1 else pixels))
        return "mask_", (*_pointers(known=edit.known, mask=edit.mask), *strides)
    if isinstance(projection, Luma):
        w = np.array(projection.w, np.float32)
        return "luma_", (*_pointers(known=edit.known), stride, *w, *(w / (w @ w)))
    if projection.p not in PATCHES:
        raise RequestError(f"on a GPU patches are of {', '.join(map(str, PATCHES))} pixels, not {projection.p}")
    return "patch_", (*_pointers(known=edit.known), stride, np.uint32(images.width), np.uint32(projection.p))
