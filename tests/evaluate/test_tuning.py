"""The search on objectives whose minimum is known, and a model whose best level has a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import extractors
import numpy as np
import pytest
from onnx import TensorProto

from cm_runtime.errors import RequestError
from cm_runtime.evaluate.extractor import Extractor
from cm_runtime.evaluate.metrics import Observation
from cm_runtime.evaluate.objective import FirstStep, FrechetObjective
from cm_runtime.evaluate.statistics import Statistics
from cm_runtime.evaluate.tuning import search
from cm_runtime.generation.stream import sample
from cm_runtime.manifest import Manifest
from cm_runtime.request import Draw
from cm_runtime.schedule import NoiseRange

Levels = tuple[float, ...]


def bowl(*optimum: float) -> Callable[[Levels], float]:
    """Squared distance in log sigma from the middle levels ``optimum``."""
    return lambda levels: sum(math.log(s / best) ** 2 for s, best in zip(levels[1:], optimum, strict=True))


@pytest.mark.parametrize("optimum", [0.1, 0.585348, 1.382368, 5.248503, 30.0])
def test_two_steps_end_at_the_minimum(optimum: float) -> None:
    """Published optima among them; within 5%, in few evaluations."""
    found = search(bowl(optimum), 2)
    assert found.sigmas[0] == 80 and found.sigmas[1] == pytest.approx(optimum, rel=0.05)
    assert found.value == bowl(optimum)(found.sigmas)
    assert found.default == pytest.approx((80, NoiseRange().karras(3)[1]))
    assert found.evaluations <= 18


@pytest.mark.parametrize("optimum", [(5.0, 0.7), (24.4, 1.2), (10.0, 2.0)])
def test_three_steps_end_near_the_minimum(optimum: tuple[float, ...]) -> None:
    found = search(bowl(*optimum), 3)
    assert found.sigmas[1:] == pytest.approx(optimum, rel=0.15)
    assert found.value < 0.1 * found.default_value


def test_four_steps_begin_where_three_ended() -> None:
    objective = bowl(12.0, 2.0, 0.4)
    found = search(objective, 4, {3: (80.0, 12.0, 2.0)})
    assert found.sigmas[1:] == pytest.approx((12.0, 2.0, 0.4), rel=0.25)
    from_default = search(objective, 4)
    assert from_default.sigmas != found.sigmas


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_it_is_never_worse_than_the_default_or_than_what_was_tuned(steps: int) -> None:
    """An objective that is small at one point and rough elsewhere, as a search cannot follow."""
    default = tuple(float(f"{s:.6g}") for s in NoiseRange().karras(steps + 1)[:-1])
    known = {steps: tuple(float(f"{s:.3g}") for s in np.geomspace(80, 0.3, steps))}

    def rough(levels: Levels) -> float:
        return 0.0 if levels == sweet else 1 + math.sin(1e4 * sum(levels)) ** 2

    for sweet in (default, known[steps]):
        assert search(rough, steps, known).sigmas == sweet


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_every_candidate_is_one_a_sampler_takes(steps: int) -> None:
    """Strictly descending between sigma_max and sigma_min, each asked for once."""
    seen = []

    def greedy(levels: Levels) -> float:
        seen.append(levels)
        return sum(levels[1:])  # towards sigma_min

    search(greedy, steps, None, NoiseRange(0.1, 2.0))
    assert len(set(seen)) == len(seen)
    for levels in seen:
        assert levels[0] == 2.0 and levels[-1] > 0.1
        assert all(a > b for a, b in pairwise(levels))


@pytest.mark.parametrize("steps", [1, 5])
def test_other_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(RequestError, match="2, 3 or 4 steps"):
        search(bowl(1.0), steps)


BEST = 1.3


@dataclass
class Scaler:
    """A model of pixels N(0, 0.3^2) whose samples have that spread when the second level is BEST, and only then.

    The second step's input has variance 0.3^2 + t^2 - sigma_min^2; it is scaled to the spread 0.3 (1 + 0.3 ln(t/BEST)),
    so the Frechet distance of ten pixels is 10 (0.3 * 0.3 ln(t/BEST))^2.
    """

    manifest: Manifest
    micro_batch: int = 64
    asked: list[float] = field(default_factory=list)

    def denoise(self, x: Any, sigma: Any, label: Any = None) -> Any:
        self.asked.append(float(sigma))
        if sigma == 80:
            return np.float32(0.3 / 80) * x
        spread = math.sqrt(0.3**2 + sigma**2 - 0.002**2)
        return np.float32(0.3 * (1 + 0.3 * math.log(sigma / BEST)) / spread) * x


@pytest.fixture
def make(tmp_path: Path, make_manifest: Any) -> Callable[..., FrechetObjective]:
    """The objective of a model, its features pixels in [-1, 1], against the closed form of its data."""
    path = extractors.linear(tmp_path / "e.onnx", ("N", 2, 5, 1), kind=TensorProto.FLOAT)
    data = Observation(Statistics(np.zeros(10), 0.3**2 * np.eye(10)))
    plain = {"count": 1000, "seed": 0, "labels": None, "micro_batch": 100}

    def made(model: Any = None, track: Any = lambda parts, _: parts, **changes: Any) -> FrechetObjective:
        model = model or Scaler(make_manifest(image_shape=(1, 2, 5)))
        extractor = Extractor(path, value_range="-1:1", threads=1)
        draw = Draw(**{**plain, **changes})  # type: ignore[arg-type]
        return FrechetObjective(model, extractor, data, draw, track)

    return made


@pytest.mark.parametrize("level", [0.2, 1.3, 3.0])
def test_the_objective_is_the_closed_form_of_the_models_samples(make: Any, level: float) -> None:
    expected = 10 * (0.3 * 0.3 * math.log(level / BEST)) ** 2
    assert make(count=5000)((80.0, level)) == pytest.approx(expected, rel=0.1, abs=2e-3)


def test_the_models_best_level_is_found(make: Any) -> None:
    found = search(make(), 2)
    assert found.sigmas[1] == pytest.approx(BEST, rel=0.15)
    assert found.value < 0.1 * found.default_value


def test_the_objective_is_a_function_of_levels_seed_and_count(make: Any) -> None:
    value = make()((80.0, 1.0))
    assert make()((80.0, 1.0)) == value
    assert make(micro_batch=7)((80.0, 1.0)) == pytest.approx(value, rel=1e-6)
    assert make(seed=1)((80.0, 1.0)) != value
    assert make(count=999)((80.0, 1.0)) != value


def test_batches_are_shown(make: Any) -> None:
    shown = []

    def show(parts: Any, sigmas: Levels) -> Any:
        shown.append(sigmas)
        return parts

    make(track=show)((80.0, 1.0))
    assert shown == [(80.0, 1.0)]


def test_the_first_step_is_remembered_and_the_same_to_the_bit(make_manifest: Any) -> None:
    plain, counted = (Scaler(make_manifest(image_shape=(1, 2, 5))) for _ in range(2))
    memory = FirstStep(counted)
    for level in (0.5, 5.0):
        expected = sample(plain, 20, sigmas=(80.0, level), micro_batch=7, output="float32")
        assert np.array_equal(sample(memory, 20, sigmas=(80.0, level), micro_batch=7, output="float32"), expected)
    assert counted.asked.count(80.0) == 3 and plain.asked.count(80.0) == 6
    assert counted.asked.count(0.5) == counted.asked.count(5.0) == 3


def test_what_is_remembered_tells_noise_and_labels_apart_and_is_bounded(make_manifest: Any) -> None:
    class Labelled(Scaler):
        def denoise(self, x: Any, sigma: Any, label: Any = None) -> Any:
            return super().denoise(x, sigma) + np.float32(label)[:, None, None, None]

    model = Labelled(make_manifest(image_shape=(1, 2, 5), num_classes=3))
    memory = FirstStep(model, memory=2 * 40)
    for label in (0, 1, 2):
        for seed in (0, 1):
            given = {"seed": seed, "labels": label, "sigmas": (80.0,), "output": "float32"}
            assert np.array_equal(sample(memory, 1, **given), sample(model, 1, **given))
    before = len(model.asked)
    for label in (0, 1, 2):  # two images of 40 bytes were kept
        sample(memory, 1, labels=label, sigmas=(80.0,))
    assert len(model.asked) - before == 2
