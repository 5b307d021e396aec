"""cm_runtime/editing.py against algorithm 4 written out with explicit orthogonal matrices, and against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from cm_runtime import editing, noise
from cm_runtime.errors import RequestError
from cm_runtime.generation.stream import sample
from cm_runtime.manifest import Manifest, TrainingSummary
from cm_runtime.projections import LUMA
from cm_runtime.sampling import to_uint8

EPS, T = 0.002, 80.0
Array = np.ndarray[Any, Any]
Make = Callable[..., Manifest]


class Gaussian:
    """The exact consistency function of data N(mean, C), whose pixels and channels hang together.

    f(x, t) = mean + U sqrt((v + eps^2) / (v + t^2)) U' (x - mean), with C = U v U'; a label moves the mean.
    """

    def __init__(self, manifest: Manifest, C: Array, mean: float = 0.1, micro_batch: int = 64) -> None:
        self.manifest, self.micro_batch, self.mean = manifest, micro_batch, mean
        self.variances, self.U = scipy.linalg.eigh(C)

    def denoise(self, x: Array, sigma: Any, label: Array | None = None) -> Array:
        assert (label is None) == (self.manifest.num_classes == 0)
        return self.exact(x.astype(np.float64), float(sigma), label).astype(np.float32)

    def exact(self, x: Array, t: float, label: Array | None = None) -> Array:
        mean = self.mean + (0 if label is None else label[:, None] / 20)
        scale = np.sqrt((self.variances + EPS**2) / (self.variances + t**2))
        apart = (x.reshape(len(x), -1) - mean) @ self.U
        return (mean + (apart * scale) @ self.U.T).reshape(x.shape)


class Independent:
    """Data N(0.1, 0.2^2), pixel by pixel."""

    s, mean = 0.2, 0.1

    def __init__(self, manifest: Manifest, micro_batch: int = 64) -> None:
        self.manifest, self.micro_batch = manifest, micro_batch

    def denoise(self, x: Array, sigma: Any, label: Array | None = None) -> Array:
        scale = math.sqrt((self.s**2 + EPS**2) / (self.s**2 + float(sigma) ** 2))
        return ((x - self.mean) * np.float32(scale) + np.float32(self.mean)).astype(np.float32)


def covariance(size: int) -> Array:
    A = np.random.default_rng(8).standard_normal((size, size))
    return 0.09 * A @ A.T / size + 0.01 * np.eye(size)


@pytest.fixture
def colour(make_manifest: Make) -> Gaussian:
    manifest = make_manifest(image_shape=(3, 8, 8), num_classes=4, sigmas={2: (T, 0.9)})
    return Gaussian(manifest, covariance(3 * 8 * 8))


@pytest.fixture
def grey(make_manifest: Make) -> Gaussian:
    return Gaussian(make_manifest(image_shape=(1, 6, 4)), covariance(24))


@pytest.fixture
def images(rng: np.random.Generator) -> Array:
    return rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


def algorithm_4(
    model: Gaussian, A: Array, open_: Array, y: Array, sigmas: Any, index: int, label: Any, clip: bool
) -> Array:
    """One image in float64; A: orthogonal, (D,D), of flat CHW pixels; open_: Omega, (D,), 1 what is to be made."""
    shape = y.shape
    known = A @ y.ravel() * (1 - open_)

    def z(k: int) -> Array:
        return noise.normal(5, [index], k, shape)[0].astype(np.float64).ravel()

    def f(x: Array, t: float) -> Array:
        x0 = model.exact(x.reshape(1, *shape), t, None if label is None else np.array([label])).ravel()
        return np.clip(x0, -1, 1) if clip else x0

    x = A.T @ known + sigmas[0] * z(0)
    x = A.T @ (known + (A @ f(x, sigmas[0])) * open_)
    for k, t in enumerate(sigmas[1:], start=1):
        x = x + math.sqrt(t**2 - EPS**2) * z(k)
        x = A.T @ (known + (A @ f(x, t)) * open_)
    return x.reshape(shape)


def of_hole(hole: Array) -> tuple[Array, Array]:
    return np.eye(3 * hole.size), np.tile(hole.ravel(), 3).astype(np.float64)


def of_luminance(pixels: int) -> tuple[Array, Array]:
    """An orthogonal 3 x 3 whose first row is the luminance's, at each pixel."""
    first = np.array(LUMA) / np.linalg.norm(LUMA)
    B = np.linalg.qr(np.column_stack([first, np.eye(3)[:, 1:]]))[0].T
    B *= np.sign(B[0] @ first)
    assert np.allclose(B[0], first) and np.allclose(B @ B.T, np.eye(3))
    return np.kron(B, np.eye(pixels)), np.repeat([0.0, 1, 1], pixels)


def of_patches(channels: int, height: int, width: int, p: int) -> tuple[Array, Array]:
    """An orthogonal p^2 x p^2 in each patch, whose first coefficient is p times the mean."""
    B = np.linalg.qr(np.column_stack([np.ones(p * p), np.random.default_rng(0).standard_normal((p * p, p * p - 1))]))[
        0
    ].T
    place = np.arange(channels * height * width).reshape(channels, height // p, p, width // p, p)
    A, open_ = np.zeros((place.size,) * 2), np.ones(place.size)
    for patch in place.transpose(0, 1, 3, 2, 4).reshape(-1, p * p):
        A[np.ix_(patch, patch)] = B
        open_[patch[0]] = 0
    return A, open_


# The public algorithm


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("sigmas", [(T,), (T, 0.9), (20.0, 5.0, 1.0, 0.1)])
@pytest.mark.parametrize("kind", ["inpaint", "colorize", "superres 2", "superres 4", "superres 8"])
def test_every_edit_is_algorithm_4(colour: Gaussian, images: Array, kind: str, sigmas: Any, clip: bool) -> None:
    """Three images, two answers each, in batches that end within an image's answers."""
    options: Any = {"sigmas": sigmas, "labels": [3, 0, 2], "seed": 5, "start": 2**40, "answers": 2, "micro_batch": 3}
    options |= {"output": "float32", "clip": clip}
    y = images.transpose(0, 3, 1, 2) / 127.5 - 1
    if kind == "inpaint":
        hole = np.random.default_rng(2).integers(0, 2, (8, 8))
        made, A, open_ = editing.inpaint(colour, images, hole, **options), *of_hole(hole)
    elif kind == "colorize":
        made, A, open_ = editing.colorize(colour, images, **options), *of_luminance(64)
    else:
        p = int(kind[-1])
        small = editing.patch_means(y.astype(np.float32), p).transpose(0, 2, 3, 1)
        made, A, open_ = editing.superres(colour, small, p, **options), *of_patches(3, 8, 8, p)
    assert made.shape == (6, 8, 8, 3)
    for n, image in enumerate(made.transpose(0, 3, 1, 2)):
        wanted = algorithm_4(colour, A, open_, y[n // 2], sigmas, 2**40 + n, [3, 0, 2][n // 2], clip)
        assert np.abs(image - wanted).max() < 1e-4
    assert np.abs(made[0] - made[1]).max() > 1e-3  # another answer


@pytest.mark.parametrize("steps", [1, 3])
def test_a_painting_begins_in_the_middle(grey: Gaussian, rng: np.random.Generator, steps: int) -> None:
    painting = rng.integers(0, 256, (1, 6, 4, 1), dtype=np.uint8)
    y = painting.transpose(0, 3, 1, 2)[0] / 127.5 - 1
    ramp = np.linspace(4.0 ** (1 / 7), EPS ** (1 / 7), steps + 1)[:-1] ** 7
    made = editing.stroke(grey, painting, 4.0, steps=steps, seed=5, start=7, answers=3, output="float32")
    for n, image in enumerate(made.transpose(0, 3, 1, 2)):
        wanted = algorithm_4(grey, np.eye(24), np.ones(24), y, ramp, 7 + n, None, True)
        start = y + ramp[0] * noise.normal(5, [7 + n], 0, y.shape)[0]
        x0 = np.clip(grey.exact(start[None], ramp[0])[0], -1, 1)
        for k, t in enumerate(ramp[1:], start=1):
            x = x0 + math.sqrt(t**2 - EPS**2) * noise.normal(5, [7 + n], k, y.shape)[0]
            x0 = np.clip(grey.exact(x[None], t)[0], -1, 1)
        assert np.abs(image - x0).max() < 1e-5
        assert np.abs(image - wanted).max() > 1e-3  # which forgets the painting


def test_denoising_is_f_of_what_is_given(grey: Gaussian, rng: np.random.Generator) -> None:
    noisy = rng.normal(0, 0.8, (3, 6, 4, 1)).astype(np.float32)
    x = noisy.transpose(0, 3, 1, 2).astype(np.float64)
    made = editing.denoise(grey, noisy, 0.3, output="float32")
    assert np.abs(made.transpose(0, 3, 1, 2) - np.clip(grey.exact(x, 0.3), -1, 1)).max() < 1e-6
    again = editing.denoise(grey, noisy, 0.3, steps=2, seed=5, output="float32").transpose(0, 3, 1, 2)
    second = ((0.3 ** (1 / 7) + EPS ** (1 / 7)) / 2) ** 7
    for n in range(3):
        x0 = np.clip(grey.exact(x[n : n + 1], 0.3), -1, 1)
        x1 = x0 + math.sqrt(second**2 - EPS**2) * noise.normal(5, [n], 1, (1, 6, 4))
        assert np.abs(again[n] - np.clip(grey.exact(x1, second), -1, 1)[0]).max() < 1e-5


# What is kept


def test_what_is_known_stays(colour: Gaussian, images: Array) -> None:
    options: Any = {"steps": 3, "labels": 1, "output": "float32"}
    y = (images / np.float32(127.5) - 1).astype(np.float32)
    hole = np.zeros((3, 8, 8), bool)
    hole[0, 2:5], hole[1, :, 7], hole[2, 3, 3] = True, True, True
    made = editing.inpaint(colour, images, hole, **options)
    np.testing.assert_array_equal(made[~hole], y[~hole])
    assert np.abs(made[hole] - y[hole]).min() > 0
    np.testing.assert_array_equal(editing.inpaint(colour, images, hole, labels=1, steps=3)[~hole], images[~hole])
    made = editing.colorize(colour, images, **options)
    assert np.abs(made @ np.array(LUMA) - y @ np.array(LUMA)).max() < 1e-5
    for p in (2, 4, 8):
        small = editing.patch_means(y.transpose(0, 3, 1, 2), p)
        made = editing.superres(colour, small.transpose(0, 2, 3, 1), p, **options)
        assert (
            np.abs(made.reshape(3, 8 // p, p, 8 // p, p, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2) - small).max()
            < 1e-5
        )


def test_in_bytes_it_stays_within_half_a_grey_level_but_where_it_is_clipped(colour: Gaussian, images: Array) -> None:
    y = images / 127.5 - 1
    made = editing.colorize(colour, images, labels=0, output="float32")
    grey = to_uint8(made.transpose(0, 3, 1, 2)) / 127.5 - 1
    beyond = (np.abs(made) > 1).any(axis=-1)
    assert 0 < beyond.sum() < beyond.size
    apart = np.abs((grey - y) @ np.array(LUMA))
    assert apart[~beyond].max() <= 0.5 / 127.5 + 1e-5
    assert editing.count_clipped(made) == (np.abs(made) > 1 + 1 / 255).sum() > 0


def test_a_grey_image_is_its_own_luminance_but_for_the_weights_sum(colour: Gaussian) -> None:
    grey = np.full((1, 8, 8, 1), 0.5, np.float32)
    made = editing.colorize(colour, grey, labels=0, output="float32")
    assert np.abs(made @ np.array(LUMA) - 0.5 * sum(LUMA)).max() < 1e-5


# Distributions


def test_the_draws_in_a_hole_are_of_the_datas_distribution(make_manifest: Make) -> None:
    model = Independent(make_manifest(image_shape=(1, 8, 8)))
    known = model.mean + model.s * np.random.default_rng(0).standard_normal((1, 8, 8, 1))
    hole = np.zeros((8, 8))
    hole[2:6, 1:7] = 1
    for steps in (1, 2, 4):
        made = editing.inpaint(model, known.clip(-1, 1), hole, steps=steps, answers=400, output="float32")
        drawn = made[:, hole.astype(bool)].astype(np.float64).ravel()
        error = model.s / math.sqrt(drawn.size)
        assert abs(drawn.mean() - model.mean) < 4 * error
        low, high = scipy.stats.chi2.ppf([1e-4, 1 - 1e-4], drawn.size) / drawn.size
        assert low < drawn.var() / model.s**2 < high
        assert scipy.stats.kstest(drawn, "norm", (model.mean, model.s)).pvalue > 1e-4


def test_noise_of_independent_pixels_is_taken_off_as_well_as_can_be(make_manifest: Make) -> None:
    """Closed form: f shrinks towards the mean by sqrt(s^2 / (s^2 + sigma^2))."""
    model = Independent(make_manifest(image_shape=(1, 32, 32)))
    rng = np.random.default_rng(3)
    clean = model.mean + model.s * rng.standard_normal((8, 32, 32, 1))
    noisy = (clean + 0.3 * rng.standard_normal(clean.shape)).astype(np.float32)
    made = editing.denoise(model, noisy, 0.3, output="float32")
    c = math.sqrt(model.s**2 / (model.s**2 + 0.3**2))
    wanted = model.s**2 * (1 - c) ** 2 + 0.3**2 * c**2
    assert np.mean((made - clean) ** 2) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 2.0])
def test_the_noise_is_estimated(sigma: float, rng: np.random.Generator) -> None:
    smooth = np.sin(np.arange(64) / 9)[:, None] * np.cos(np.arange(62) / 7)[None]
    noisy = smooth + sigma * rng.standard_normal((4, 1, 64, 62))
    found = editing.estimated_sigma(noisy.astype(np.float32))
    assert found.shape == (4,) and np.abs(found / sigma - 1).max() < 0.15
    assert editing.estimated_sigma(smooth[None, None].astype(np.float32))[0] < 0.01
    edges = (np.indices((64, 62)).sum(axis=0) // 16 % 2).astype(np.float32)[None, None]
    assert editing.estimated_sigma(edges)[0] < 0.01


def test_an_estimate_is_an_images_own(make_manifest: Make, rng: np.random.Generator) -> None:
    model = Independent(make_manifest(image_shape=(1, 32, 32)))
    noisy = np.stack([sigma * rng.standard_normal((32, 32, 1)) for sigma in (0.1, 0.6)]).astype(np.float32)
    levels = editing.estimated_sigma(noisy.transpose(0, 3, 1, 2))
    assert levels[1] > 3 * levels[0]
    made = editing.denoise(model, noisy, answers=2, output="float32")
    for n, (level, image) in enumerate(zip(levels, noisy, strict=True)):
        own = editing.denoise(model, image[None], float(level), output="float32")
        np.testing.assert_array_equal(made[2 * n : 2 * n + 2], np.repeat(own, 2, axis=0))


def test_an_image_without_noise_is_denoised_from_just_above_sigma_min(grey: Gaussian) -> None:
    """Its estimate is 0, and sigma_min itself would be refused."""
    clean = np.full((2, 6, 4, 1), 0.25, np.float32)
    denoised = editing.denoise(grey, clean, output="float32")
    answer = grey.exact(clean.transpose(0, 3, 1, 2).astype(np.float64), 1.001 * EPS)
    assert np.abs(denoised.transpose(0, 3, 1, 2) - answer).max() < 1e-6


# Interpolation


def test_the_ends_are_the_two_samples(colour: Gaussian) -> None:
    for steps in (1, 2, 4):
        options: Any = {"steps": steps, "seed": 9, "output": "float32"}
        made = editing.interpolate(colour, 3, 2**63, 5, labels=2, **options)
        assert made.shape == (5, 8, 8, 3)
        for frame, index in ((0, 3), (-1, 2**63)):
            np.testing.assert_array_equal(made[frame], sample(colour, 1, start=index, labels=2, **options)[0])
        assert np.abs(np.diff(made, axis=0)).reshape(4, -1).max(axis=1).min() > 1e-3


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 7), (3, 255, 1)])
def test_between_the_ends_noise_turns_evenly(shape: Any, rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((2, *shape)).astype(np.float32)
    t = np.linspace(0, 1, 9)
    z = editing.slerp(a, b, t).reshape(9, -1).astype(np.float64)
    np.testing.assert_array_equal(z[0], a.ravel())
    np.testing.assert_array_equal(z[-1], b.ravel())
    if a.size == 1:
        np.testing.assert_allclose(z[:, 0], a.ravel()[0] + t * (b - a).ravel()[0], rtol=1e-6)
        return
    # what a combination sin((1-t) w), sin(t w) over sin w has for a length, w the angle between a and b
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    w = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    p, q = np.sin((1 - t) * w) / np.sin(w), np.sin(t * w) / np.sin(w)
    np.testing.assert_allclose((z**2).sum(axis=1), p**2 * (x @ x) + q**2 * (y @ y) + 2 * p * q * (x @ y), rtol=1e-5)
    unit = editing.slerp((x / np.linalg.norm(x)).astype(np.float32), (y / np.linalg.norm(y)).astype(np.float32), t)
    angles = np.arccos(
        np.clip(
            (unit[1:] * unit[:-1]).sum(axis=-1)
            if unit.ndim == 2
            else (unit[1:] * unit[:-1]).reshape(8, -1).sum(axis=1),
            -1,
            1,
        )
    )
    np.testing.assert_allclose(angles, w / 8, atol=2e-3)


# Images and answers


def test_an_answer_depends_on_its_image_its_number_and_nothing_else(colour: Gaussian, images: Array) -> None:
    hole = np.eye(8)
    options: Any = {"answers": 2, "seed": 4}
    whole = editing.inpaint(colour, images, hole, start=10, labels=[0, 1, 2], **options)
    np.testing.assert_array_equal(whole[2:4], editing.inpaint(colour, images[1:2], hole, start=12, labels=1, **options))
    np.testing.assert_array_equal(
        whole, editing.inpaint(colour, images, hole, start=10, labels=[0, 1, 2], micro_batch=1, **options)
    )
    assert (whole[2:4] != editing.inpaint(colour, images[1:2], hole, start=10, labels=1, **options)).any()
    assert (whole[2:4] != editing.inpaint(colour, images[1:2], hole, start=12, labels=2, **options)).any()


def test_a_mask_may_be_each_images_own(colour: Gaussian, images: Array) -> None:
    holes = np.stack([np.eye(8), np.eye(8)[::-1], np.tri(8)])
    whole = editing.inpaint(colour, images, holes, labels=0)
    for n in range(3):
        np.testing.assert_array_equal(
            whole[n], editing.inpaint(colour, images[n : n + 1], holes[n], labels=0, start=n)[0]
        )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", 1),
        ("start", 1),
        ("steps", 3),
        ("sigmas", (T, 0.5)),
        ("labels", 3),
        ("clip", False),
        ("output", "float32"),
    ],
)
def test_every_option_changes_something(colour: Gaussian, images: Array, option: str, value: Any) -> None:
    given: Any = {"labels": 0, "output": "float32", "steps": 2} | {option: value}
    if option == "sigmas":
        del given["steps"]
    if option == "output":
        given["output"] = "uint8"
    small = 2 * editing.patch_means((images.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32), 2).transpose(
        0, 2, 3, 1
    )
    small = small.clip(-1, 1)  # patches near white, in which f goes beyond it
    plain = editing.superres(colour, small, 2, labels=0, output="float32", steps=2)
    assert (editing.superres(colour, small, 2, **given) != plain).any()


# What is refused


HOLE = np.eye(8)
WRONG: dict[str, tuple[Callable[[Gaussian, Array], Any], str]] = {
    "size": (
        lambda m, y: editing.inpaint(m, y[:, :7], HOLE, labels=0),
        r"images must be \(N, 8, 8, 3\), not \(3, 7, 8, 3\)",
    ),
    "channels": (lambda m, y: editing.inpaint(m, y[..., :1], HOLE, labels=0), r"images must be \(N, 8, 8, 3\)"),
    "no images": (lambda m, y: editing.inpaint(m, y[:0], HOLE, labels=0), "images must be"),
    "numbers": (lambda m, y: editing.inpaint(m, y.astype(int), HOLE, labels=0), "must be uint8, or float32 in"),
    "range": (lambda m, y: editing.inpaint(m, y / 1.0, HOLE, labels=0), r"must be finite and in \[-1, 1\]"),
    "NaN": (lambda m, y: editing.denoise(m, y * np.nan, 1.0, labels=0), "must be finite"),
    "mask's size": (lambda m, y: editing.inpaint(m, y, np.eye(7), labels=0), r"a mask must be \(8, 8\) or \(3, 8, 8\)"),
    "empty mask": (lambda m, y: editing.inpaint(m, y, 0 * HOLE, labels=0), "the mask has no hole"),
    "full mask": (lambda m, y: editing.inpaint(m, y, np.ones((8, 8)), labels=0), "nothing of the image is known"),
    "one empty mask": (
        lambda m, y: editing.inpaint(m, y, np.stack([HOLE, 0 * HOLE, HOLE]), labels=0),
        "the mask of image 1 has no hole",
    ),
    "grey mask": (lambda m, y: editing.inpaint(m, y, HOLE / 2, labels=0), "made of 0 and 1"),
    "factor": (
        lambda m, y: editing.superres(m, y, 3, labels=0),
        "a factor of 3 does not divide the model's images of 8x8",
    ),
    "factor 1": (lambda m, y: editing.superres(m, y, 1, labels=0), "a factor of 1 does not divide"),
    "small": (lambda m, y: editing.superres(m, y, 2, labels=0), r"images must be \(N, 4, 4, 3\)"),
    "no label": (
        lambda m, y: editing.inpaint(m, y, HOLE),
        "this model has 4 classes: give the images' own, from 0 to 3, as label",
    ),
    "label": (lambda m, y: editing.inpaint(m, y, HOLE, labels=4), "labels must be from 0 to 3, not 4"),
    "labels": (
        lambda m, y: editing.inpaint(m, y, HOLE, labels=[0, 1]),
        r"one for each of 3 images, not \[0, 1\]",
    ),
    "steps and sigmas": (lambda m, y: editing.inpaint(m, y, HOLE, labels=0, steps=2, sigmas=(80,)), "not both"),
    "no steps": (lambda m, y: editing.inpaint(m, y, HOLE, labels=0, steps=0), "steps must be from 1"),
    "no sigmas": (lambda m, y: editing.inpaint(m, y, HOLE, labels=0, sigmas=()), "sigmas is empty"),
    "sigmas": (lambda m, y: editing.inpaint(m, y, HOLE, labels=0, sigmas=(81,)), "must be the model's sigma_max 80"),
    "low sigmas": (lambda m, y: editing.inpaint(m, y, HOLE, labels=0, sigmas=(1, 0.001)), "must lie above"),
    "answers": (lambda m, y: editing.inpaint(m, y, HOLE, labels=0, answers=0), "at least 1 answer"),
    "index": (lambda m, y: editing.inpaint(m, y, HOLE, labels=0, start=2**64 - 2), "image indices must be from 0"),
    "sigma": (lambda m, y: editing.stroke(m, y, 0.001, labels=0), r"sigma must be above 0\.002 and at most 80"),
    "high sigma": (lambda m, y: editing.denoise(m, y, 81, labels=0), r"sigma must be above 0\.002 and at most 80"),
    "stroke's sigmas": (
        lambda m, y: editing.stroke(m, y, 4.0, labels=0, sigmas=(4.0, 1.0)),
        "takes the sigma where it",
    ),
    "one index": (lambda m, y: editing.interpolate(m, 3, 3, labels=0), "nothing between image 3 and itself"),
    "no number": (
        lambda m, y: editing.stroke(m, y, 2.0, labels=True),
        "one label from 0 to 3, or one for each of 3 images, not True",
    ),
    "huge label": (lambda m, y: editing.stroke(m, y, 2.0, labels=2**70), f"from 0 to 3, not {2**70}"),
    "labels by name": (
        lambda m, y: editing.stroke(m, y, 2.0, labels="random"),
        "one for each of 3 images, not 'random'",
    ),
    "counted labels": (lambda m, y: editing.stroke(m, y, 2.0, labels={1: 3}), "one for each of 3 images, not {1: 3}"),
    "answers' type": (lambda m, y: editing.stroke(m, y, 2.0, labels=0, answers=None), "answers must be a whole"),
    "factor's type": (lambda m, y: editing.superres(m, y, 2.0, labels=0), "factor must be a whole number"),
    "frames' type": (lambda m, y: editing.interpolate(m, 3, 4, 2.0, labels=0), "frames must be a whole number"),
    "sigmas' type": (lambda m, y: editing.inpaint(m, y, HOLE, labels=0, sigmas=b"P"), "sigmas must be numbers"),
    "classes between": (
        lambda m, y: editing.interpolate(m, 3, 4, labels=[0, 1]),
        r"under one label, from 0 to 3, not \[0, 1\]",
    ),
    "all between": (lambda m, y: editing.interpolate(m, 3, 4, labels="all"), "under one label, from 0 to 3, not 'all'"),
    "huge label between": (lambda m, y: editing.interpolate(m, 3, 4, labels=2**70), f"from 0 to 3, not {2**70}"),
    "start between": (lambda m, y: editing.interpolate(m, 3, 4, labels=0, start=1), "leave start out"),
    "one frame": (lambda m, y: editing.interpolate(m, 3, 4, 1, labels=0), "frames must be from 2"),
    "no label between": (lambda m, y: editing.interpolate(m, 3, 4), "give the images' own, from 0 to 3, as label"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused_in_one_line(colour: Gaussian, images: Array, name: str) -> None:
    body, message = WRONG[name]
    with pytest.raises(RequestError, match=message) as refused:
        body(colour, images)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 7}, r"^inpaint\(\) got an unexpected keyword argument 'count'$"),
        ({"label": 0}, r"^inpaint\(\) got an unexpected keyword argument 'label'; it is labels$"),
    ],
)
def test_an_option_that_is_none_names_the_function(
    colour: Gaussian, images: Array, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        editing.inpaint(colour, images, HOLE, **options)


def test_colours_are_of_models_with_three_channels(grey: Gaussian) -> None:
    with pytest.raises(RequestError, match="colorization is of images with 3 channels, not 1"):
        editing.colorize(grey, np.zeros((1, 6, 4, 1), np.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph": "sampler", "sigmas": {1: (T,)}}, "export the model with --graph denoiser"),
        ({"training": TrainingSummary(method="edm", data="x", steps=1, images=1, seconds=1.0)}, "EDM teacher"),
    ],
)
def test_models_that_cannot_edit_say_so(make_manifest: Make, changes: Any, message: str) -> None:
    model = Independent(make_manifest(**changes))
    with pytest.raises(RequestError, match=message):
        editing.denoise(model, np.zeros((1, 3, 7, 1), np.uint8), 1.0)


# A model that was trained


def gradients(count: int, seed: int) -> Array:
    """(count,3,8,8): warm and bright with a horizontal gradient, or cold and dark with a vertical one."""
    rng = np.random.default_rng(seed)
    sign, ramp = rng.choice([-1, 1], count), np.linspace(-1, 1, 8)
    slope = (rng.uniform(0.2, 0.4, count) * rng.choice([-1, 1], count))[:, None, None]
    field = np.where((sign > 0)[:, None, None], ramp[None, None, :], ramp[None, :, None])
    luma = (sign * rng.uniform(0.3, 0.5, count))[:, None, None] + slope * field
    warmth = 0.3 * sign[:, None, None]
    return np.stack([luma + warmth, luma, luma - warmth], axis=1).clip(-1, 1).astype(np.float32)


@pytest.mark.slow
def test_a_model_trained_for_it_colours_and_enlarges_as_its_data(tmp_path: Path) -> None:
    """Colours from luminance, and the direction of the gradient from the mean of all 8x8 pixels."""
    from cm_runtime.backends.torch import TorchBackend
    from cm_runtime.checkpoints.native import read_checkpoint
    from cm_runtime.training.config import load_config
    from cm_runtime.training.data.image_set import ImageSet
    from cm_runtime.training.loop import train

    settings = ["phase.0.steps=133", "phase.0.P_mean=-0.8", "phase.0.P_std=1.4", "phase.0.batch=32"]
    settings += ["phase.1.steps=400", "phase.1.P_mean=-0.5", "phase.1.batch=32"]
    data = ImageSet(gradients(8192, 0), None, 0, "gradients")
    trained = read_checkpoint(train(load_config("gaussian-ect", settings), data, tmp_path / "run"))
    model = TorchBackend(trained.model(), trained.manifest())
    y = gradients(256, 1).transpose(0, 2, 3, 1)
    is_warm = y[:, 0, 0, 0] > y[:, 0, 0, 2]
    options: Any = {"sigmas": (80.0, 2.0, 1.0, 0.5), "output": "float32"}

    made = editing.colorize(model, y, **options)
    assert np.abs((made - y) @ np.array(LUMA)).max() < 1e-5
    assert np.mean((made[..., 0] > made[..., 2]).mean(axis=(1, 2)).round() == is_warm) > 0.95

    small = y.mean(axis=(1, 2), keepdims=True)
    made = editing.superres(model, small, 8, **options)
    assert np.abs(made.mean(axis=(1, 2), keepdims=True) - small).max() < 1e-5
    luma = made @ np.array(LUMA)
    across = np.abs(luma[:, :, 4:].mean(axis=(1, 2)) - luma[:, :, :4].mean(axis=(1, 2)))
    down = np.abs(luma[:, 4:].mean(axis=(1, 2)) - luma[:, :4].mean(axis=(1, 2)))
    assert np.mean((across > down) == is_warm) > 0.65  # by chance 0.5, and 0.03 of it
