"""Zero-shot editing: part of an image goes in, the model's answers come out (arXiv 2303.01469, algorithm 4).

Every edit is the one sampling loop from the caller's images on, with a projection (or none) behind each clamp, on any
engine. Images are (N,H,W,C), uint8, or float32 in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cm_runtime import noise, sampling
from cm_runtime.errors import RequestError
from cm_runtime.errors.wording import quantity
from cm_runtime.manifest import Manifest
from cm_runtime.projections import LUMA, Array, Edit, Luma, Mask, PatchMean, Projection
from cm_runtime.request import (
    Draw,
    DrawOptions,
    Labels,
    check_labels,
    edit_request,
    explicit_signature,
    no_label,
    sampling_request,
    whole_number,
)
from cm_runtime.sampling import Denoiser, Drawer
from cm_runtime.schedule import as_numbers

MOST_FRAMES = 10_000
STEPS = 8  # where something is known of every x0: each step fits the rest to it better
HAAR_MAD = 0.6744897501960817  # the median of |z|


class EditOptions(DrawOptions, total=False):
    """Options of an edit: those of drawing, where labels are one for all images or one each, and its own.

    steps: default 8 to inpaint, colorize and enlarge, 2 for a painting, 1 to denoise; seed and start: answer n of them
    all has the noise of image ``start + n``; answers: to each image, one behind another.
    """

    steps: int | None
    seed: int
    answers: int


@dataclass(frozen=True)
class _Plan:
    """`EditOptions` as values."""

    draw: Draw
    answers: int = 1

    @classmethod
    def of(cls, options: EditOptions) -> _Plan:
        draw = {name: value for name, value in options.items() if name != "answers"}
        return cls(Draw(**draw), whole_number("answers", options.get("answers", 1)))  # type: ignore[arg-type]


@explicit_signature(EditOptions, answers=1)
def inpaint(model: Denoiser, images: ArrayLike, hole: ArrayLike, **options: Unpack[EditOptions]) -> NDArray[Any]:
    """Fill the hole of each image; the rest stays, to the bit in float32 (arXiv 2303.01469, algorithm 4).

    Args:
        model: of a denoiser or network graph, or a checkpoint.
        images: (M,H,W,C) uint8, or float32 in [-1, 1].
        hole: (H,W) or (M,H,W), true or 1 where pixels are to be made.
        **options: labels (one for all images, or one each), start, seed, steps (default 8), sigmas, answers (to each
            image), micro_batch, output and clip, as `EditOptions` and `cm.Draw` explain them.

    Returns:
        (M * answers, H, W, C) uint8, or float32 with output="float32".

    Raises:
        RequestError: the images, the options or the model do not fit.
        EngineError: the model's output is not finite, or the engine fails.

    Example:
        >>> editing.inpaint(model, images, hole, labels=4, answers=5)
    """
    y = from_images(images, model.manifest)
    return _answers(model, y.shape, Mask(y, _mask_of(hole, y)), _Plan.of(options))


@explicit_signature(EditOptions, answers=1)
def colorize(model: Denoiser, grey: ArrayLike, **options: Unpack[EditOptions]) -> NDArray[Any]:
    """Give each image colours; their luminance is that of ``grey`` (arXiv 2303.01469, algorithm 4).

    Args:
        model: of images with 3 channels.
        grey: (M,H,W,1), or (M,H,W,3), of which the luminance is taken; uint8, or float32 in [-1, 1].
        **options: labels (one for all images, or one each), start, seed, steps (default 8), sigmas, answers (to each
            image), micro_batch, output and clip, as `EditOptions` and `cm.Draw` explain them.

    Returns:
        (M * answers, H, W, C) uint8, or float32 with output="float32".

    Raises:
        RequestError: the images, the options or the model do not fit.
        EngineError: the model's output is not finite, or the engine fails.

    Example:
        >>> editing.colorize(model, grey, answers=4)
    """
    channels, height, width = model.manifest.image_shape
    y = from_images(grey, model.manifest, channels=(1, 3))
    return _answers(model, (len(y), channels, height, width), Luma(luminance(y)), _Plan.of(options))


@explicit_signature(EditOptions, answers=1)
def superres(model: Denoiser, small: ArrayLike, factor: int, **options: Unpack[EditOptions]) -> NDArray[Any]:
    """Enlarge each image; the means of its factor x factor patches are ``small`` (arXiv 2303.01469, algorithm 4).

    Args:
        model: of a denoiser or network graph, or a checkpoint.
        small: (M, H / factor, W / factor, C) uint8, or float32 in [-1, 1].
        factor: pixels a side that are made of one.
        **options: labels (one for all images, or one each), start, seed, steps (default 8), sigmas, answers (to each
            image), micro_batch, output and clip, as `EditOptions` and `cm.Draw` explain them.

    Returns:
        (M * answers, H, W, C) uint8, or float32 with output="float32".

    Raises:
        RequestError: the images, the options or the model do not fit.
        EngineError: the model's output is not finite, or the engine fails.

    Example:
        >>> editing.superres(model, small, 4, labels=7)
    """
    channels, height, width = model.manifest.image_shape
    y = from_images(small, model.manifest, size=small_size(model.manifest, factor))
    return _answers(model, (len(y), channels, height, width), PatchMean(y, factor), _Plan.of(options))


@explicit_signature(EditOptions, answers=1)
def stroke(model: Denoiser, paintings: ArrayLike, sigma: float, **options: Unpack[EditOptions]) -> NDArray[Any]:
    """Make pictures of paintings by strokes (SDEdit, arXiv 2108.01073, algorithm 1).

    Args:
        model: of a denoiser or network graph, or a checkpoint.
        paintings: (M,H,W,C) uint8, or float32 in [-1, 1].
        sigma: noise put over them; the more, the less is kept. Steps go down from there on the Karras grid.
        **options: labels (one for all images, or one each), start, seed, steps (default 2), answers (to each
            image), micro_batch, output and clip, as `EditOptions` and `cm.Draw` explain them.

    Returns:
        (M * answers, H, W, C) uint8, or float32 with output="float32".

    Raises:
        RequestError: the images, the options or the model do not fit.
        EngineError: the model's output is not finite, or the engine fails.

    Example:
        >>> editing.stroke(model, paintings, 3.0, labels=1)
    """
    return _from(model, from_images(paintings, model.manifest), sigma, False, _Plan.of(options))


@explicit_signature(EditOptions, answers=1)
def denoise(
    model: Denoiser, noisy: ArrayLike, sigma: float | None = None, **options: Unpack[EditOptions]
) -> NDArray[Any]:
    """Take the noise off images.

    Args:
        model: of a denoiser or network graph, or a checkpoint.
        noisy: (M,H,W,C), float32 if the noise is not to be clipped.
        sigma: of the noise, where black is -1 and white 1; None estimates it for each image.
        **options: labels (one for all images, or one each), start, seed, steps (default 1), answers (to each
            image), micro_batch, output and clip, as `EditOptions` and `cm.Draw` explain them.

    Returns:
        (M * answers, H, W, C) uint8, or float32 with output="float32".

    Raises:
        RequestError: the images, the options or the model do not fit.
        EngineError: the model's output is not finite, or the engine fails.

    Example:
        >>> editing.denoise(model, noisy, 0.3, labels=9)
    """
    m = model.manifest
    y = from_images(noisy, m, is_bounded=False)
    plan = _Plan.of(options)
    if plan.draw.steps is None:
        plan = replace(plan, draw=replace(plan.draw, steps=1))
    if sigma is not None:
        return _from(model, y, sigma, True, plan)
    levels = np.clip(estimated_sigma(y), 1.001 * m.sigma_min, m.sigma_max)
    labels = _labels(plan.draw.labels, len(y), m)
    images = []
    for n, level in enumerate(levels):
        label = None if labels is None else int(labels[n])
        draw = replace(plan.draw, start=plan.draw.start + n * plan.answers, labels=label)
        images.append(_from(model, y[n : n + 1], float(level), True, replace(plan, draw=draw)))
    return np.concatenate(images)


@explicit_signature()
def interpolate(
    model: Denoiser | Drawer,
    first: int,
    last: int,
    frames: int = 9,
    *,
    steps: int | None = None,
    seed: int = 0,
    **options: Unpack[DrawOptions],
) -> NDArray[Any]:
    """Draw what lies between two images of a seed, under one label.

    Every draw of noise goes along the great circle between theirs (slerp).

    Args:
        model: any model.
        first: index of the image that it begins with.
        last: index of the image that it ends with.
        frames: how many images, both ends included.
        steps: network evaluations of an image, default 2.
        seed: of both images.
        **options: labels (one), sigmas, micro_batch, output and clip, as `cm.Draw` explains them.

    Returns:
        (frames, H, W, C) uint8, or float32 with output="float32".

    Raises:
        RequestError: the frames, the options or the model do not fit.
        EngineError: the model's output is not finite, or the engine fails.

    Example:
        >>> editing.interpolate(model, 3, 8, frames=24, labels=7)
    """
    draw, m = Draw(steps=steps, seed=seed, **options), model.manifest
    if not 2 <= whole_number("frames", frames) <= MOST_FRAMES:
        raise RequestError(f"frames must be from 2 to {MOST_FRAMES}, not {frames}")
    if first == last:
        raise RequestError(f"there is nothing between image {first} and itself")
    if draw.start:
        raise RequestError("interpolation goes from image first to image last; leave start out")
    if m.num_classes and draw.labels is None:
        raise no_label(m.num_classes)
    request = sampling_request(m, replace(draw, count=frames))
    if m.num_classes and not (isinstance(request.labels, tuple) and len(request.labels) == 1):
        raise RequestError(f"interpolation is under one label, from 0 to {m.num_classes - 1}, not {draw.labels!r}")
    ends = noise.normals(request.seed, [first, last], request.steps, m.image_shape)
    z = np.stack([slerp(a, b, np.linspace(0, 1, frames)) for a, b in ends])
    return sampling.draw_images(model, draw, z)


def slerp(a: Array, b: Array, t: NDArray[np.float64]) -> Array:
    """Spherical interpolation: (len(t), *a.shape) float32; a where t is 0 and b where it is 1, to the bit."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    angle = math.acos(np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1, 1))
    if angle < 1e-6 or math.pi - angle < 1e-6:  # one number, or nearly: there is no great circle
        path = np.outer(1 - t, x) + np.outer(t, y)
    else:
        path = (np.outer(np.sin((1 - t) * angle), x) + np.outer(np.sin(t * angle), y)) / math.sin(angle)
    z = path.astype(np.float32).reshape(len(t), *a.shape)
    z[t == 0], z[t == 1] = a, b
    return z


def estimated_sigma(images: Array) -> NDArray[np.float64]:
    """The noise's sigma in each image, (N,), from the finest diagonal Haar coefficients (Donoho, Johnstone 1994, 4.2).

    images: (N,C,H,W) of at least 2x2. Their median absolute value over that of a standard normal: edges count little
    in it. Of noise that was clipped it says too little.
    """
    n, _, h, w = images.shape
    x = images[..., : h // 2 * 2, : w // 2 * 2].astype(np.float64)
    diagonal = (x[..., ::2, ::2] - x[..., 1::2, ::2] - x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 2
    sigma: NDArray[np.float64] = np.median(np.abs(diagonal.reshape(n, -1)), axis=1) / HAAR_MAD
    return sigma


def luminance(images: Array) -> Array:
    """w.y of (N,3,H,W), or of (N,1,H,W), which is grey: (N,1,H,W) float32."""
    w = np.array(LUMA, np.float32)[:, None, None]
    luma: Array = (w * images).sum(axis=1, keepdims=True, dtype=np.float32)
    return luma


def patch_means(images: Array, factor: int) -> Array:
    """(N,C,H,W) -> (N, C, H / factor, W / factor) float32."""
    n, c, h, w = images.shape
    means: Array = images.reshape(n, c, h // factor, factor, w // factor, factor).mean(axis=(3, 5), dtype=np.float32)
    return means


def small_size(manifest: Manifest, factor: int) -> tuple[int, int]:
    """The height and width of what super-resolution enlarges to the model's. Raises RequestError."""
    _, height, width = manifest.image_shape
    if whole_number("factor", factor) < 2 or height % factor or width % factor:
        raise RequestError(f"a factor of {factor} does not divide the model's images of {width}x{height}")
    return height // factor, width // factor


def from_images(
    images: ArrayLike,
    manifest: Manifest,
    *,
    size: tuple[int, int] | None = None,
    channels: tuple[int, ...] = (),
    is_bounded: bool = True,
) -> Array:
    """(M,H,W,C) uint8, or float32 in [-1, 1], as (M,C,H,W) float32. Raises RequestError for other sizes and numbers.

    size: (H, W), and channels: those that are taken, of the model if left out; is_bounded: floats beyond [-1, 1] are
    refused.
    """
    c, height, width = manifest.image_shape
    channels = channels or (c,)
    height, width = size or (height, width)
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[0] < 1 or array.shape[1:3] != (height, width) or array.shape[3] not in channels:
        counts = " or ".join(map(str, channels))
        raise RequestError(f"images must be (N, {height}, {width}, {counts}), not {array.shape}")
    if array.dtype == np.uint8:
        array = array / np.float32(127.5) - 1
    elif array.dtype.kind != "f":
        raise RequestError(f"images must be uint8, or float32 in [-1, 1], not {array.dtype}")
    elif not np.isfinite(array).all() or (is_bounded and np.abs(array).max() > 1 + 1e-6):
        raise RequestError("images of float32 must be finite and in [-1, 1]")
    return np.ascontiguousarray(np.moveaxis(array, -1, 1), np.float32)


def count_clipped(images: Array) -> int:
    """Count the numbers of float32 answers beyond [-1, 1] by over half a grey level, which change in uint8."""
    return int((np.abs(images) > 1 + 1 / 255).sum())


def _mask_of(hole: ArrayLike, y: Array) -> Array:
    """The mask m of what is known, (1 or M, 1, H, W) float32. Raises RequestError."""
    m, _, height, width = y.shape
    array = np.asarray(hole)
    if array.shape not in ((height, width), (m, height, width)):
        raise RequestError(f"a mask must be ({height}, {width}) or ({m}, {height}, {width}), not {array.shape}")
    if not np.isin(array, (0, 1)).all():
        raise RequestError("a mask is made of 0 and 1 alone")
    holes = array.reshape(-1, 1, height, width).astype(bool)
    for n, each in enumerate(holes):
        where = f" of image {n}" if len(holes) > 1 else ""
        if not each.any():
            raise RequestError(f"the mask{where} has no hole: there is nothing to fill")
        if each.all():
            raise RequestError(f"the mask{where} is all hole: nothing of the image is known, which is sampling")
    return (~holes).astype(np.float32)


def _answers(model: Denoiser, shape: tuple[int, ...], project: Projection, plan: _Plan) -> NDArray[Any]:
    """From x ~ N(A^-1[(A y)(1 - Omega)], sigma_0^2 I) on; the mean is the projection of 0."""
    m, draw = model.manifest, plan.draw
    project.check(shape)
    if draw.sigmas is None:
        sigmas = m.noise_range.levels(STEPS if draw.steps is None else draw.steps, m.sigmas)
    elif draw.steps is None:
        sigmas = as_numbers(draw.sigmas)
    else:
        raise RequestError("give steps or sigmas, not both")
    return _run(model, Edit(project(np.zeros(shape, np.float32)), project), sigmas, plan)


def _from(model: Denoiser, y: Array, sigma: float, is_noisy: bool, plan: _Plan) -> NDArray[Any]:
    """From images at a noise level in the middle on, down the Karras grid below it."""
    m, steps = model.manifest, plan.draw.steps
    if not m.sigma_min < sigma <= m.sigma_max:
        raise RequestError(f"sigma must be above {m.sigma_min:g} and at most {m.sigma_max:g}, not {sigma:g}")
    if plan.draw.sigmas is not None:
        raise RequestError("this edit takes the sigma where it begins, and steps, not sigmas")
    sigmas = replace(m.noise_range, sigma_max=sigma).levels(2 if steps is None else steps)
    return _run(model, Edit(y, is_noisy=is_noisy), sigmas, plan)


def _run(model: Denoiser, edit: Edit, sigmas: tuple[float, ...], plan: _Plan) -> NDArray[Any]:
    labels = _labels(plan.draw.labels, len(edit.start), model.manifest)
    edit = replace(edit, label=labels, answers=plan.answers)
    request = edit_request(model.manifest, replace(plan.draw, sigmas=sigmas), edit, model.micro_batch)
    return np.concatenate([part.images for part in sampling.batches(model, request)])


def _labels(labels: Labels, count: int, manifest: Manifest) -> NDArray[np.int64] | None:
    """One label for each of ``count`` images, or None. Raises RequestError."""
    if labels is None:
        return None
    is_list = isinstance(labels, Sequence | np.ndarray | int | np.integer) and not isinstance(labels, str | bool)
    classes = check_labels(labels, manifest.num_classes) if is_list or not manifest.num_classes else None
    if not isinstance(classes, tuple) or len(classes) not in (1, count):
        most = manifest.num_classes - 1
        raise RequestError(
            f"give one label from 0 to {most}, or one for each of {quantity(count, 'image')}, not {labels!r}"
        )
    return np.broadcast_to(np.array(classes, np.int64), count)
