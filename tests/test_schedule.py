"""cm_runtime/schedule.py against the papers' formulas in decimal and integer arithmetic, and published values."""

from decimal import Decimal, localcontext

import numpy as np
import pytest

from cm_runtime.errors import RequestError
from cm_runtime.schedule import (
    NoiseRange,
    level_text,
    same_levels,
)

INFINITE = float("inf")
NAN = float("nan")


def decimal_grid(N: int, low: str, high: str, rho: int) -> list[float]:
    """arXiv 2206.00364 eq. 5 with 50 digits."""
    with localcontext() as context:
        context.prec = 50
        bottom, top = (Decimal(end) ** (Decimal(1) / rho) for end in (low, high))
        return [float((top + Decimal(i) / (N - 1) * (bottom - top)) ** rho) for i in range(N)]


@pytest.mark.parametrize("N", [2, 3, 7, 18, 40, 255])
def test_grid_is_the_papers_formula(N):
    sigmas = NoiseRange().karras(N)
    assert sigmas.shape == (N,) and sigmas.dtype == np.float64
    np.testing.assert_allclose(sigmas, decimal_grid(N, "0.002", "80", 7), rtol=1e-13)


@pytest.mark.parametrize(("low", "high", "rho"), [("0.01", "50", 3), ("0.5", "1", 1), ("0.002", "0.003", 7)])
def test_grid_of_other_ends_and_exponents(low, high, rho):
    np.testing.assert_allclose(
        NoiseRange(float(low), float(high), rho).karras(7), decimal_grid(7, low, high, rho), 1e-13
    )


def test_grid_holds_the_published_level_and_its_exact_ends():
    sigmas = NoiseRange().karras(40)
    assert sigmas[22] == pytest.approx(1.382368, abs=5e-7)
    assert (sigmas[0], sigmas[-1]) == (80.0, 0.002)
    assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("sigma_max", [3.0, 10.0, 1000.0])
def test_grid_begins_and_ends_exactly_where_the_seventh_root_rounds(sigma_max):
    sigmas = NoiseRange(sigma_max=sigma_max).karras(7)
    assert (sigmas[0], sigmas[-1]) == (sigma_max, 0.002)


@pytest.mark.parametrize("N", [1, 0, -3])
def test_grid_refuses_fewer_than_two_points(N):
    with pytest.raises(RequestError, match=f"at least 2 points, not {N}"):
        NoiseRange().karras(N)


@pytest.mark.parametrize("ends", [(0, 80), (-1, 80), (80, 80), (81, 80), (NAN, 80), (0.002, NAN), (0.002, INFINITE)])
def test_grid_refuses_impossible_ends(ends):
    with pytest.raises(RequestError, match="0 < sigma_min < sigma_max"):
        NoiseRange(*ends).karras(7)


def test_steps_without_tuning_are_a_grid_less_its_last_point():
    assert NoiseRange().levels(1) == (80.0,)
    assert NoiseRange().levels(2) == pytest.approx((80.0, 2.5152), abs=5e-5)
    assert NoiseRange().levels(7) == pytest.approx(decimal_grid(8, "0.002", "80", 7)[:-1])
    assert len(NoiseRange().levels(1000)) == 1000


def test_steps_take_the_tuned_levels_of_their_number_only():
    tuned = {2: (80.0, 1.382368)}
    assert NoiseRange().levels(2, tuned) == (80.0, 1.382368)
    assert NoiseRange().levels(3, tuned) == NoiseRange().levels(3)


def test_steps_follow_the_models_range():
    assert NoiseRange(0.01, 50.0, 3).levels(3) == pytest.approx(decimal_grid(4, "0.01", "50", 3)[:-1])


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(RequestError, match=f"from 1 to 1000, not {steps}"):
        NoiseRange().levels(steps)


def test_good_sigmas_come_back_as_floats():
    assert NoiseRange().check([80, 3, 1]) == (80.0, 3.0, 1.0)
    assert NoiseRange().check(np.array([80, 0.821], np.float32)) == pytest.approx((80, 0.821), rel=1e-6)
    assert NoiseRange(0.5, 1.0).check([1.0]) == (1.0,)


def test_a_first_sigma_equal_but_for_rounding_becomes_sigma_max():
    assert NoiseRange().check([80.00001, 1]) == (80.0, 1.0)


@pytest.mark.parametrize("sigma_max", [80.0, 79.123456, 1.0000051, 123456.51])
def test_a_first_sigma_may_be_sigma_max_as_it_is_printed(sigma_max: float):
    assert NoiseRange(sigma_max=sigma_max).check([float(level_text([sigma_max])), 0.9]) == (sigma_max, 0.9)


def test_levels_are_the_same_if_they_look_the_same():
    exact = NoiseRange().levels(2)
    assert level_text(exact) == "80, 2.51522" and exact[1] == pytest.approx(2.515218976147159, rel=1e-12)
    assert same_levels((80, 2.51522), exact) and same_levels(exact, exact) and same_levels((80, 2.5152190001), exact)
    for other in [(80, 2.51521), (80,), (80, 2.51522, 0.1), (80, NAN)]:
        assert not same_levels(other, exact)


@pytest.mark.parametrize(
    ("sigmas", "complaint"),
    [
        ([], "empty"),
        ([79.9, 1], "first sigma must be .* 80, not 79.9"),
        ([1, 80], "first sigma"),
        ([NAN], "first sigma"),
        ([INFINITE, 1], "first sigma"),
        ([80, 80], "descend strictly; 80.0 follows 80.0"),
        ([80, 1.4, 1.4000000001], r"descend strictly; 1.4000000001 follows 1.4$"),
        ([80, 1, 2], "descend strictly; 2.0 follows 1.0"),
        ([80, NAN, 1], "descend strictly; nan follows 80.0"),
        ([80, 1, NAN], "descend strictly; nan follows 1.0"),
        ([80, 0.002], "above the model's sigma_min 0.002, not 0.002"),
        ([80, 0.00199999999], "above the model's sigma_min 0.002, not 0.00199999999"),
        ([80, 0], "above the model's sigma_min"),
        ([80, -1], "above the model's sigma_min"),
        ([80, -INFINITE], "above the model's sigma_min"),
    ],
)
def test_bad_sigmas_are_refused_in_one_line(sigmas, complaint):
    with pytest.raises(RequestError, match=complaint) as caught:
        NoiseRange().check(sigmas)
    assert "\n" not in str(caught.value)


# The step conventions of other tools

PUBLISHED = [(22, 40, 1.382368), (106, 201, 1.912844), (17, 40, 4.365562), (18, 40, 3.519699)]
PUBLISHED += [(67, 151, 3.991219), (62, 151, 5.248503)]


@pytest.mark.parametrize(("index", "N", "sigma"), PUBLISHED)
def test_published_two_step_samplers_in_both_conventions(index, N, sigma):
    """openai/consistency_models, scripts/launch.sh: --ts 0,index,N-1 --steps N."""
    assert NoiseRange().from_ts([0, index, N - 1], N) == pytest.approx((80, sigma), abs=5e-7)
    assert NoiseRange().from_timesteps([index, 0], N) == NoiseRange().from_ts([0, index, N - 1], N)


@pytest.mark.process
@pytest.mark.parametrize(
    ("N", "timesteps"),
    [
        (2, [0]),
        (3, [1, 0]),
        (18, [16, 9, 3, 0]),
        (40, [22, 0]),
        (40, [0]),
        (40, [*range(38, -1, -1)]),
        (151, [62, 0]),
        (201, [106, 0]),
        (1_000_000, [999_998, 1, 0]),
    ],
)
def test_timesteps_mean_what_they_mean_in_diffusers(N, timesteps):
    from diffusers import CMStochasticIterativeScheduler

    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=N)
    scheduler.set_timesteps(timesteps=timesteps)
    *levels, last = scheduler.sigmas.tolist()
    assert last == pytest.approx(0.002)
    assert NoiseRange().from_timesteps(timesteps, N) == pytest.approx(levels, rel=1e-6)
    assert NoiseRange().from_ts([*timesteps[::-1], N - 1], N) == pytest.approx(levels, rel=1e-6)


@pytest.mark.parametrize(("low", "high", "rho"), [("0.01", "50", 3), ("0.002", "80", 5)])
def test_both_conventions_count_in_the_grid_of_the_models_range(low, high, rho):
    grid = decimal_grid(11, low, high, rho)
    scale = float(low), float(high), rho
    assert NoiseRange(*scale).from_ts([0, 3, 7, 10], 11) == pytest.approx((grid[0], grid[3], grid[7]))
    assert NoiseRange(*scale).from_timesteps([7, 3, 0], 11) == pytest.approx((grid[0], grid[3], grid[7]))


def test_what_both_conventions_give_is_what_a_sampler_takes():
    levels = NoiseRange().from_ts(np.arange(1_000_000, dtype=np.int32)[::999], 1_000_000)
    assert len(levels) == 1001 and NoiseRange().check(levels) == levels
    assert {type(s) for s in levels} == {float}


@pytest.mark.parametrize(
    ("ts", "N", "complaint"),
    [
        ([], 40, "at least two indices, 0 and the grid's last, 39; not 0"),
        ([0], 40, "at least two indices, 0 and the grid's last, 39; not 1"),
        ([0, 22], 40, "must end at 39, .* ending at 22 would leave noise in the images"),
        ([0, 22, 39], 201, "must end at 200, .* ending at 39 would leave noise"),
        ([1, 22, 39], 40, "must start at 0, .* sigma_max 80; not 1"),
        ([22, 0], 40, "must ascend; descending indices, .* --timesteps"),
        ([39, 22, 0], 40, "must ascend; descending indices, .* --timesteps"),
        ([0, 22, 22, 39], 40, "ascend strictly; 22 follows 22"),
        ([0, 30, 22, 39], 40, "ascend strictly; 22 follows 30"),
        ([0, 0], 40, "ascend strictly; 0 follows 0"),
        ([0, 22, 40], 40, "grid of 40 points must be from 0 to 39, not 40"),
        ([-1, 22, 39], 40, "from 0 to 39, not -1"),
        ([0, 22.0, 39], 40, "whole numbers"),
        ([0, 39], 1, "grid must be from 2 to 1000000 points, not 1"),
        ([0, 39], -40, "grid must be from 2 to 1000000 points, not -40"),
        ([0, 39], 1_000_001, "grid must be from 2 to 1000000 points, not 1000001"),
    ],
)
def test_bad_ts_are_refused_in_one_line(ts, N, complaint):
    with pytest.raises(RequestError, match=f"ts .*{complaint}|^{complaint}") as caught:
        NoiseRange().from_ts(ts, N)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("timesteps", "N", "complaint"),
    [
        ([], 40, "empty"),
        ([22], 40, "must end at 0, .* sigma_max 80; not 22"),
        ([22, 1], 40, "must end at 0, .* sigma_max 80; not 1"),
        ([39, 22, 0], 40, "must leave out 39, .* sigma_min 0.002, where f is the identity"),
        ([39], 40, "must leave out 39"),
        ([1, 0], 2, "must leave out 1,"),
        ([0, 22], 40, "must descend; ascending indices, up to 39, are what --ts takes"),
        ([0, 22, 39], 40, "must descend; ascending indices, up to 39, are what --ts takes"),
        ([22, 22, 0], 40, "descend strictly; 22 follows 22"),
        ([22, 30, 0], 40, "descend strictly; 30 follows 22"),
        ([40, 0], 40, "grid of 40 points must be from 0 to 39, not 40"),
        ([22, 0, -1], 40, "from 0 to 39, not -1"),
        (["22", 0], 40, "whole numbers"),
        ([0], 0, "grid must be from 2 to 1000000 points, not 0"),
        ([0], 1_000_001, "grid must be from 2 to 1000000 points, not 1000001"),
    ],
)
def test_bad_timesteps_are_refused_in_one_line(timesteps, N, complaint):
    with pytest.raises(RequestError, match=f"timesteps .*{complaint}|^{complaint}") as caught:
        NoiseRange().from_timesteps(timesteps, N)
    assert "\n" not in str(caught.value)
