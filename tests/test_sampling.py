"""cm_runtime/sampling.py against closed forms of Gaussian data, algorithm 1 written out, and the ODE's solution."""

import itertools
import math
import re
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

import cm_runtime as cm
from cm_runtime import editing, noise
from cm_runtime.errors import EngineError, RequestError
from cm_runtime.generation.stream import sample
from cm_runtime.manifest import TrainingSummary
from cm_runtime.request import Draw, even_micro_batch, sampling_request, split, teacher_request
from cm_runtime.sampling import Denoiser, HostSteps, batches, heun, run, teacher_batches, to_uint8
from cm_runtime.schedule import NoiseRange

LAST = 2**64 - 1
S, EPS, T = 0.5, 0.002, 80.0
TEACHER = TrainingSummary(method="edm", data="x", steps=1, images=1, seconds=1.0)


class Recorder:
    """A denoiser that remembers what it was asked; subclasses give it a formula, pixel by pixel."""

    def __init__(self, manifest, micro_batch=64):
        self.manifest = manifest
        self.micro_batch = micro_batch
        self.sizes: list[int] = []
        self.sigmas: list[float] = []
        self.labels: list[int] = []

    def denoise(self, x, sigma, label=None):
        assert isinstance(x, np.ndarray) and x.shape[1:] == self.manifest.image_shape
        assert label is None or label.dtype == np.int64
        self.sizes.append(len(x))
        self.sigmas.append(float(sigma))
        self.labels += [] if label is None else label.tolist()
        return self.f(x, float(sigma), label)


class Gaussian(Recorder):
    """The exact consistency function of data N(mean, S^2): (x - mean) sqrt((S^2 + eps^2) / (S^2 + t^2)) + mean."""

    mean = 0.0

    def f(self, x, t, label):
        shift = 0 if label is None else label[:, None, None, None] / 10
        scale = math.sqrt((S**2 + EPS**2) / (S**2 + t**2))
        return ((x - self.mean) * scale + self.mean + shift).astype(x.dtype)


class Teacher(Recorder):
    """The exact denoiser D of data N(0, S^2): x S^2 / (S^2 + t^2)."""

    def f(self, x, t, label):
        return x * (S**2 / (S**2 + t**2))


@pytest.fixture
def gaussian(make_manifest) -> Denoiser:
    return Gaussian(make_manifest())


@pytest.fixture
def classes(make_manifest) -> Denoiser:
    return Gaussian(make_manifest(num_classes=7))


def pixels_last(x: np.ndarray) -> np.ndarray:
    return np.transpose(x, (0, 2, 3, 1))


# --- what is computed -------------------------------------------------------------------------------------------------


def moments(sigmas: Sequence[float], mean: float) -> tuple[float, float]:
    """Mean and variance of algorithm 1's output for Gaussian data, step by step, without clipping."""
    average, variance = 0.0, sigmas[0] ** 2
    for k, sigma in enumerate(sigmas):
        if k:
            variance += sigma**2 - EPS**2
        a = math.sqrt((S**2 + EPS**2) / (S**2 + sigma**2))
        average, variance = mean + a * (average - mean), a * a * variance
    return average, variance


@pytest.mark.parametrize(
    "sigmas", [(80,), (80, 1.382368), (80, 24.4, 5.84, 0.9), (80, 10, 3, 1, 0.3, 0.1, 0.01)], ids=len
)
@pytest.mark.parametrize("mean", [0.0, 0.7])
def test_samples_of_gaussian_data_have_the_closed_forms_moments(make_manifest, sigmas, mean):
    model = Gaussian(make_manifest(), 1000)
    model.mean = mean
    x0 = sample(model, 4000, sigmas=sigmas, seed=3, clip=False, output="float32").astype(np.float64)
    average, variance = moments(sigmas, mean)
    assert abs(x0.mean() - average) < 4 * math.sqrt(variance / x0.size)
    assert abs(x0.var() - variance) < 4 * variance * math.sqrt(2 / x0.size)
    assert scipy.stats.kstest((x0.ravel() - average) / math.sqrt(variance), "norm").pvalue > 1e-3


def algorithm_1(f, z: np.ndarray, sigmas: Sequence[float], clip: bool) -> np.ndarray:
    """arXiv 2303.01469, algorithm 1, in float64 and with the design's clamp."""
    x = None
    for k, sigma in enumerate(sigmas):
        noisy = sigma * z[k] if x is None else x + (sigma**2 - EPS**2) ** 0.5 * z[k]
        x = f(noisy, sigma)
        if clip:
            x = np.minimum(1, np.maximum(-1, x))
    return x


@pytest.mark.parametrize("sigmas", [(80,), (80, 1.382368), (80, 10, 1, 0.1, 0.0021)], ids=len)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("count", [1, 3, 7, 255])
def test_the_callers_noise_goes_through_algorithm_1(gaussian, rng, sigmas, clip, count):
    gaussian.micro_batch = 7
    z = rng.standard_normal((len(sigmas), count, 1, 3, 7)).astype(np.float32)
    kept = z.copy()
    expected = algorithm_1(lambda x, t: gaussian.f(x, t, None), 2 * z.astype(np.float64), sigmas, clip)
    x0 = sample(gaussian, noise=2 * z, sigmas=sigmas, clip=clip, output="float32")
    assert x0.shape == (count, 3, 7, 1) and x0.dtype == np.float32
    np.testing.assert_allclose(x0, pixels_last(expected), atol=2e-6, rtol=2e-6)
    np.testing.assert_array_equal(z, kept)


def test_clipping_changes_what_comes_after(gaussian, rng):
    z = 5 * rng.standard_normal((2, 7, 1, 3, 7)).astype(np.float32)
    clipped, free = (sample(gaussian, noise=z, sigmas=(80, 0.5), clip=c, output="float32") for c in (True, False))
    assert np.abs(clipped).max() <= 1 < np.abs(free).max()
    assert np.abs(np.clip(free, -1, 1) - clipped).max() > 0.1  # the clamp of the first step, not only of the last


def test_seeded_sampling_is_the_callers_noise_drawn_by_address(gaussian):
    index = np.arange(5, 12)
    z = np.stack([noise.normal(9, index, k, (1, 3, 7)) for k in range(3)])
    seeded = sample(gaussian, 7, 3, seed=9, start=5, output="float32")
    np.testing.assert_array_equal(seeded, sample(gaussian, noise=z, output="float32"))


def test_draws_at_once_and_one_by_one_give_the_same_images(gaussian, monkeypatch):
    found = []
    for most in (0, 1 << 40):
        monkeypatch.setattr("cm_runtime.sampling.MOST_NORMALS", most)
        found.append(sample(gaussian, count=7, sigmas=[80.0, 9.0, 1.0], seed=3, output="float32"))
    assert (found[0] == found[1]).all()


def test_the_loop_asks_for_each_sigma_once_in_order(gaussian):
    sample(gaussian, 3, sigmas=(80, 5, 1, 0.1))
    assert gaussian.sigmas == [80, 5, 1, 0.1]
    gaussian.sigmas.clear()
    sample(gaussian, 3)
    assert gaussian.sigmas == pytest.approx([80, 2.5152], abs=5e-5)  # two steps unless told


def test_tuned_sigmas_of_the_model_are_used(make_manifest):
    model = Gaussian(make_manifest(sigmas={2: (80.0, 0.821)}))
    sample(model, 1, 2)
    assert model.sigmas == [80, 0.821]


def test_grid_of_the_models_own_range_is_used(make_manifest):
    model = Gaussian(make_manifest(sigma_max=50.0, sigma_min=0.01, rho=3.0))
    sample(model, 1, 2)
    middle = ((50 ** (1 / 3) + 0.01 ** (1 / 3)) / 2) ** 3
    assert model.sigmas == pytest.approx([50, middle])


def test_output_is_quantised_as_the_design_says(gaussian):
    floats = sample(gaussian, 255, seed=1, output="float32", clip=False)
    pixels = sample(gaussian, 255, seed=1, clip=False)
    assert pixels.dtype == np.uint8 and pixels.shape == (255, 3, 7, 1)
    levels = (np.minimum(np.maximum(floats.astype(np.float64), -1), 1) + 1) * 127.5
    assert (np.abs(pixels - levels) <= 0.5 + 2e-5).all() and len(np.unique(pixels)) > 200


def test_colour_images_have_their_channels_last(make_manifest, rng):
    model = Gaussian(make_manifest(image_shape=(3, 2, 5)))
    z = np.zeros((1, 1, 3, 2, 5), np.float32)
    z[0, 0, 2, 1, 4] = 1
    x0 = sample(model, noise=z, output="float32")
    assert x0.shape == (1, 2, 5, 3) and np.argwhere(x0 != 0).tolist() == [[0, 1, 4, 2]]


# --- an image is a function of (model, seed, index) -------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 2**32 - 20, 2**63 - 20, 2**64 - 40])
@pytest.mark.parametrize("labels", ["all", "random", [3, 1, 0, 6, 2], 4])
def test_an_image_is_the_same_in_any_batch_count_and_start(classes, first, labels):
    everything = sample(classes, 40, 3, seed=8, start=first, labels=labels, micro_batch=40, output="float32")
    for start, count, batch in [(0, 40, 1), (0, 40, 7), (0, 40, 255), (0, 1, 1), (3, 7, 3), (39, 1, None), (17, 23, 4)]:
        part = sample(
            classes, count, 3, seed=8, start=first + start, labels=labels, micro_batch=batch, output="float32"
        )
        np.testing.assert_array_equal(part, everything[start : start + count])


def test_seeds_and_indices_give_different_images(gaussian):
    images = sample(gaussian, 40, seed=0)
    assert len(np.unique(images.reshape(40, -1), axis=0)) == 40
    assert not np.array_equal(images, sample(gaussian, 40, seed=1))
    assert not np.array_equal(images, sample(gaussian, 40, seed=2**32))


def test_labels_are_functions_of_seed_and_index(classes, reference_words):
    start, count = 2**64 - 20, 20
    index = range(start, start + count)
    listed = [3, 1, 6]
    expected = {
        "all": [i % 7 for i in index],
        "random": [reference_words(5, i, 0xFFFFFFFF, 0)[0] * 7 >> 32 for i in index],
        "listed": [listed[i % 3] for i in index],
        "one": [4] * count,
    }
    for name, labels in {"all": "all", "random": "random", "listed": listed, "one": 4}.items():
        classes.labels.clear()
        sample(classes, count, 1, seed=5, start=start, labels=labels, micro_batch=7)
        assert classes.labels == expected[name], name


def test_labels_default_to_all_classes_and_reach_the_results(classes):
    parts = list(batches(classes, sampling_request(classes.manifest, Draw(count=17, steps=2, start=3, micro_batch=5))))
    assert [len(part.images) for part in parts] == [5, 5, 5, 2]
    assert np.concatenate([part.index for part in parts]).tolist() == list(range(3, 20))
    assert np.concatenate([part.labels for part in parts]).tolist() == [i % 7 for i in range(3, 20)]
    np.testing.assert_array_equal(np.concatenate([part.images for part in parts]), sample(classes, 17, 2, start=3))


def test_labels_of_the_callers_noise_follow_the_index_too(classes, rng):
    sample(classes, noise=rng.standard_normal((1, 17, 1, 3, 7)).astype(np.float32), start=3, micro_batch=5)
    assert classes.labels == [i % 7 for i in range(3, 20)]


@pytest.mark.parametrize("labels", [np.int64(4), np.array([4]), (4,), range(4, 5)])
def test_labels_may_be_any_integers(classes, labels):
    sample(classes, 3, 1, labels=labels)
    assert classes.labels == [4, 4, 4]


@pytest.mark.parametrize("start", [0, 4, (1 << 64) - 8])
def test_a_mapping_of_labels_is_how_many_images_of_each(classes, start):
    """In its order from the first image on, wherever that is and however the images are shared out."""
    for batch, count in ((6, None), (2, 6)):
        classes.labels.clear()
        images = sample(
            classes, count, 1, start=start, labels={3: 3, np.int64(0): 1, 6: np.int32(2)}, micro_batch=batch
        )
        assert len(images) == 6
        assert classes.labels == [3, 3, 3, 0, 6, 6]
    classes.labels.clear()
    sample(classes, steps=1, labels={5: 2}, start=start)
    assert classes.labels == [5, 5]
    stored = sampling_request(
        classes.manifest, Draw(count=6, steps=1, start=start, labels={3: 4, 0: 2}, micro_batch=6)
    ).labels
    again = sampling_request(
        classes.manifest, Draw(count=8, steps=1, start=start - start % 2, labels=stored, micro_batch=6)
    ).labels
    assert again == stored  # a plain list, from which a job or a picture draws them again


def test_what_is_no_model_is_refused(gaussian):
    for model in (3, b"model.onnx", object):
        with pytest.raises(
            RequestError, match=r"^model must be what cm\.load returns, the path of one, or None"
        ) as caught:
            sample(model, 1)
        assert "\n" not in str(caught.value)


def test_without_classes_no_labels_are_asked_for(gaussian):
    (part,) = batches(gaussian, sampling_request(gaussian.manifest, Draw(count=3, micro_batch=3)))
    assert part.labels is None and gaussian.labels == []


# --- memory and micro-batches -----------------------------------------------------------------------------------------


def test_batches_are_lazy_and_no_larger_than_asked(gaussian):
    """2^40 images take no more memory or time than the ones that are looked at."""
    stream = batches(gaussian, sampling_request(gaussian.manifest, Draw(count=1 << 40, steps=2, micro_batch=7)))
    assert gaussian.sizes == []
    assert next(stream).index.tolist() == list(range(7))
    assert gaussian.sizes == [7, 7]
    assert next(stream).index.tolist() == list(range(7, 14))
    assert gaussian.sizes == [7] * 4


@pytest.mark.parametrize(("count", "most", "size"), [(1, 64, 1), (64, 64, 64), (65, 64, 33), (256, 100, 86), (7, 3, 3)])
def test_micro_batches_are_even(gaussian, count, most, size):
    assert even_micro_batch(count, most) == size
    gaussian.micro_batch = most
    sample(gaussian, count, 1)
    assert gaussian.sizes[0] == size and sum(gaussian.sizes) == count and max(gaussian.sizes) <= most


def test_the_default_is_256_images(gaussian):
    assert sample(gaussian).shape == (256, 3, 7, 1)


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (3, 10), (7, 7), (1, 1), (255, 7)])
def test_splitting_a_request_covers_the_same_images(gaussian, count, batch):
    whole = sampling_request(gaussian.manifest, Draw(count=count, steps=2, seed=4, start=LAST - 300, micro_batch=5))
    parts = list(split(whole, batch))
    assert [part.count for part in parts[:-1]] == [batch] * (len(parts) - 1) and parts[-1].count <= batch
    images = [part.images for each in parts for part in batches(gaussian, each)]
    np.testing.assert_array_equal(np.concatenate(images), sample(gaussian, count, 2, seed=4, start=LAST - 300))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"steps": 0}, "steps must be from 1"),
        ({"steps": -1}, "steps must be from 1"),
        ({"steps": 1001}, "steps must be from 1 to 1000"),
        ({"steps": 2, "sigmas": (80, 1)}, "steps or sigmas, not both"),
        ({"sigmas": ()}, "sigmas is empty"),
        ({"sigmas": (1, 80)}, "first sigma must be the model's sigma_max"),
        ({"sigmas": (50, 1)}, "first sigma must be the model's sigma_max"),
        ({"sigmas": (80, 1, 5)}, "descend strictly"),
        ({"sigmas": (80, 1, 1)}, "descend strictly"),
        ({"sigmas": (80, 0.001)}, "above the model's sigma_min"),
        ({"sigmas": (80, float("nan"))}, "descend strictly"),
        ({"sigmas": (float("nan"),)}, "first sigma"),
        ({"count": 0}, "count must be at least 1"),
        ({"count": -3}, "count must be at least 1"),
        ({"micro_batch": 0}, "micro-batch must be from 1"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"seed": 2**64}, "seed must be from 0 to"),
        ({"seed": 1.5}, "seed must be"),
        ({"start": -1}, "image indices must be"),
        ({"start": 2**64 - 2}, "3 images from 18446744073709551614 are not"),
        ({"output": "float16"}, "output must be uint8 or float32"),
        ({"labels": 7}, "labels must be from 0 to 6, not 7"),
        ({"labels": -1}, "labels must be from 0 to 6, not -1"),
        ({"labels": [0, 1, 99]}, "labels must be from 0 to 6, not 99"),
        ({"labels": []}, "list of labels is empty"),
        ({"labels": "some"}, "labels must be all, random or numbers"),
        ({"labels": [1.5]}, "labels must be"),
        ({"labels": [float("nan")]}, "labels must be"),
        ({"labels": {3: 100, 6: 50}}, "the labels are for 150 images, but 3 are asked for"),
        ({"labels": {7: 3}}, "labels must be from 0 to 6, not 7"),
        ({"labels": {0: 3, 1: 0}}, "are for 1 image or more each, not 0"),
        ({"labels": {0: True, 1: 2}}, "are for 1 image or more each, not True"),
        ({"labels": {0: 1.0, 1: 2}}, "are for 1 image or more each, not 1.0"),
        ({"labels": {"0": 3}}, "labels must be whole numbers from 0 to 6, not '0'"),
        ({"labels": {}}, "list of labels is empty"),
        ({"labels": {0: 1 << 60}}, "for 1 to 1048576 images, not 1152921504606846976"),
        ({"labels": {0, 1}}, "labels must be all, random, a number from 0 to 6, a list of such, or a mapping"),
        ({"labels": 1.0}, "labels must be all, random, a number"),
        ({"labels": b"01"}, "labels must be all, random, a number"),
        ({"labels": object}, "labels must be all, random, a number"),
        ({"labels": True}, "labels must be all, random, a number"),
        ({"labels": [True, False]}, "labels must be whole numbers from 0 to 6, not True"),
        ({"labels": [np.True_]}, "labels must be whole numbers from 0 to 6, not"),
        ({"labels": np.array([True])}, "labels must be whole numbers from 0 to 6, not True"),
        ({"labels": np.array([1.0])}, "labels must be whole numbers from 0 to 6, not 1.0"),
        ({"labels": [[0, 1], [2, 3]]}, r"labels must be whole numbers from 0 to 6, not \[0, 1\]"),
        ({"labels": np.zeros((2, 2), int)}, r"labels must be whole numbers from 0 to 6, not \[0, 0\]"),
    ],
    ids=str,
)
def test_impossible_requests_are_refused_in_one_line_before_any_work(classes, arguments, complaint):
    with pytest.raises(RequestError, match=complaint) as caught:
        sample(classes, **{"count": 3, **arguments})
    assert "\n" not in str(caught.value)
    assert classes.sizes == []


@pytest.mark.parametrize("labels", ["all", "random", 0, [0]])
def test_labels_for_a_model_without_classes_are_refused(gaussian, labels):
    with pytest.raises(RequestError, match="no classes; leave the labels out"):
        sample(gaussian, 3, labels=labels)


def test_the_last_indices_there_are_can_be_drawn(gaussian):
    assert sample(gaussian, 3, start=2**64 - 3, seed=LAST).shape == (3, 3, 7, 1)


@pytest.mark.parametrize("arguments", [{}, {"steps": 2}, {"noise": np.zeros((2, 3, 1, 3, 7), np.float32)}])
def test_a_teacher_is_refused(make_manifest, arguments):
    with pytest.raises(RequestError, match="EDM teacher"):
        sample(Teacher(make_manifest(training=TEACHER)), **arguments)


@pytest.mark.parametrize(
    ("shape", "more", "complaint"),
    [
        ((2, 3, 1, 7, 3), {}, r"noise must be \(K, N, 1, 3, 7\), not \(2, 3, 1, 7, 3\)"),
        ((3, 1, 3, 7), {}, r"noise must be \(K, N, 1, 3, 7\)"),
        ((1, 3, 7), {}, r"noise must be"),
        ((), {}, r"noise must be"),
        ((2, 0, 1, 3, 7), {}, r"noise must be"),
        ((0, 3, 1, 3, 7), {}, "steps must be from 1"),
        ((2, 3, 1, 3, 7), {"count": 4}, "count is 4 but the noise is for 3 images"),
        ((2, 3, 1, 3, 7), {"steps": 3}, "noise is for 2 steps, but 3 were asked for"),
        ((2, 3, 1, 3, 7), {"sigmas": (80,)}, "noise is for 2 steps, but 1 were asked for"),
    ],
)
def test_noise_that_does_not_fit_is_refused(gaussian, shape, more, complaint):
    with pytest.raises(RequestError, match=complaint):
        sample(gaussian, noise=np.zeros(shape, np.float32), **more)
    assert gaussian.sizes == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_noise_that_is_not_finite_is_refused(gaussian, bad):
    z = np.zeros((2, 3, 1, 3, 7), np.float32)
    z[1, 2, 0, 0, 0] = bad
    with pytest.raises(RequestError, match="noise must be finite"):
        sample(gaussian, noise=z)


def test_memory_of_a_gpu_is_refused_where_a_model_goes_through_the_host(gaussian):
    """Noise is not looked at, so that a process without a driver says the same."""
    noise = SimpleNamespace(__cuda_array_interface__={})
    cases = [
        ("output device", lambda: cm.sample(gaussian, 3, output="device")),
        ("output device", lambda: cm.sample(output="device")),
        ("noise in a GPU's memory", lambda: cm.sample(gaussian, noise=noise)),
        ("noise in a GPU's memory", lambda: cm.sample(gaussian, noise=noise, output="device")),
    ]
    for subject, draw in cases:
        with pytest.raises(RequestError, match=f"^{subject} needs a model that samples in a GPU's memory, not ") as one:
            draw()
        assert "\n" not in str(one.value)


def test_only_samples_stay_in_a_gpus_memory(gaussian):
    line = r"^output device is cm\.sample's alone; here images come to the host, as uint8 or float32$"
    options = {"output": "device", "steps": 2}
    for draw in (
        lambda: cm.stream(gaussian, 3, **options),
        lambda: editing.stroke(gaussian, np.zeros((1, 3, 7, 1), np.uint8), 2.0, **options),
        lambda: editing.interpolate(gaussian, 0, 1, **options),
        lambda: sampling_request(gaussian.manifest, cm.Draw(**options)),
    ):
        with pytest.raises(RequestError, match=line):
            draw()
    assert gaussian.sizes == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("output", ["uint8", "float32"])
@pytest.mark.parametrize("at", [80.0, 1.0])
def test_a_model_that_returns_no_numbers_is_an_engine_error(make_manifest, bad, output, at):
    class Broken(Gaussian):
        def f(self, x, t, label):
            x0 = super().f(x, t, label)
            if t == at:
                x0[-1, 0, 0, 0] = bad
            return x0

    with pytest.raises(EngineError, match="not finite") as caught:
        sample(Broken(make_manifest()), 3, sigmas=(80, 1), output=output)
    assert "\n" not in str(caught.value)


# --- the loop and the ODE solver on their own -------------------------------------------------------------------------


def test_run_calls_its_steps_in_order(gaussian):
    calls = []

    class Steps(HostSteps):
        def first(self, sigma):
            calls.append(("first", sigma))
            return super().first(sigma)

        def step(self, x0, k, sigma):
            calls.append(("step", k, sigma))
            return super().step(x0, k, sigma)

        def finish(self, x0):
            calls.append("finish")
            return super().finish(x0)

    run(gaussian, Steps(lambda k: np.zeros((3, 1, 3, 7), np.float32), EPS), (80.0, 5.0, 1.0), None)
    assert [call for call in calls if call != "finish"] == [("first", 80.0), ("step", 1, 5.0), ("step", 2, 1.0)]
    assert calls[-1] == "finish"


def solution(x: np.ndarray) -> np.ndarray:
    """x at sigma_min on the probability-flow ODE's path from x at T, then the last Euler step to 0, which is D."""
    at_eps = x * math.sqrt((S**2 + EPS**2) / (S**2 + T**2))
    return at_eps * S**2 / (S**2 + EPS**2)


def test_heun_converges_to_the_ode_with_second_order(make_manifest, rng):
    x = T * rng.standard_normal((3, 1, 3, 7))  # float64, so that rounding does not hide the order
    errors = []
    for steps in (40, 80, 160, 320):
        found = heun(Teacher(make_manifest()), x, None, steps)
        errors.append(np.abs(found / solution(x) - 1).max())
    ratios = [before / after for before, after in itertools.pairwise(errors)]
    assert all(3.5 < ratio < 4.5 for ratio in ratios), (errors, ratios)
    assert errors[-1] < 1e-3


def test_heun_is_algorithm_1_of_karras(make_manifest, rng):
    """N levels and then 0: Heun between levels, Euler at the last."""
    x = (T * rng.standard_normal((3, 1, 3, 7))).astype(np.float32)
    levels = [(T ** (1 / 7) + i / 6 * (EPS ** (1 / 7) - T ** (1 / 7))) ** 7 for i in range(7)] + [0.0]
    expected = x.astype(np.float64)
    for now, after in itertools.pairwise(levels):
        slope = expected / now * (1 - S**2 / (S**2 + now**2))
        guess = expected + (after - now) * slope
        if after:
            slope = slope / 2 + guess / after * (1 - S**2 / (S**2 + after**2)) / 2
        expected = expected + (after - now) * slope
    model = Teacher(make_manifest(training=TEACHER))
    kept = x.copy()
    found = heun(model, x, None, 7)
    assert found.dtype == np.float32 and len(model.sigmas) == 13
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(x, kept)


def test_heun_hands_its_labels_to_the_model(make_manifest, rng):
    model = Teacher(make_manifest(num_classes=7))
    heun(model, rng.standard_normal((3, 1, 3, 7)).astype(np.float32), np.array([6, 0, 3]), 2)
    assert model.labels == [6, 0, 3] * 3


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
def test_a_teachers_images_are_heuns_from_the_addressed_noise(make_manifest, micro_batch):
    """The same first noise and labels as a few-step request of that seed has, whatever the micro-batch."""
    model = Teacher(make_manifest(training=TEACHER, num_classes=4))
    chosen = teacher_request(
        model.manifest, Draw(count=7, steps=5, seed=3, start=LAST - 6, labels="random", micro_batch=micro_batch)
    )
    parts = list(teacher_batches(model, chosen))
    index = np.concatenate([part.index for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    assert index.tolist() == list(range(LAST - 6, LAST + 1))
    assert labels.tolist() == noise.random_labels(3, index, 4).tolist()
    x = np.float32(T) * noise.normal(3, index, 0, (1, 3, 7))
    images = np.concatenate([part.images for part in parts])
    np.testing.assert_array_equal(images, to_uint8(heun(model, x, labels, 5)))
    levels = [(T ** (1 / 7) + i / 4 * (EPS ** (1 / 7) - T ** (1 / 7))) ** 7 for i in range(5)]
    assert chosen.sigmas == pytest.approx(levels)


@pytest.mark.parametrize("steps", [1, 1001])
def test_a_teachers_steps_are_bounded(make_manifest, steps):
    with pytest.raises(RequestError, match="2 to 1000 ODE steps"):
        teacher_request(make_manifest(training=TEACHER), Draw(count=1, steps=steps, micro_batch=1))


def test_what_is_no_teacher_needs_no_solver(gaussian):
    with pytest.raises(RequestError, match="no EDM teacher"):
        teacher_request(gaussian.manifest, Draw(count=1, micro_batch=1))


# Sampler files and the levels they print


class Sampler:
    """A sampler graph of the default two levels, which shows how often it drew."""

    micro_batch = 4

    def __init__(self, manifest):
        self.manifest = manifest

    def draw(self, noise, label=None):
        count, (channels, height, width) = noise.shape[1], self.manifest.image_shape
        return np.full((count, height, width, channels), 7, np.uint8)


@pytest.mark.parametrize("sigmas", [(80, 2.51522), [80.0, 2.515218976147159], np.array([80.00001, 2.5152190001])])
def test_a_sampler_takes_its_own_levels_as_they_are_printed(make_manifest, sigmas):
    exact = NoiseRange().levels(2)
    manifest = make_manifest(graph="sampler", sigmas={2: exact})
    assert sampling_request(manifest, Draw(count=3, sigmas=sigmas, micro_batch=4)).sigmas == exact
    assert (sample(Sampler(manifest), count=3, sigmas=sigmas) == 7).all()


@pytest.mark.parametrize("sigmas", [(80, 2.51521), (80,), (80, 2.51522, 1)])
def test_a_sampler_refuses_levels_that_look_different(make_manifest, sigmas):
    manifest = make_manifest(graph="sampler", sigmas={2: NoiseRange().levels(2)})
    with pytest.raises(RequestError, match=r"in 2 steps, at 80, 2\.51522, not at 80") as caught:
        sampling_request(manifest, Draw(count=3, sigmas=sigmas, micro_batch=4))
    own, asked = re.findall(r" at ([^;]*?)(?:, not|;)", str(caught.value))
    assert own != asked
