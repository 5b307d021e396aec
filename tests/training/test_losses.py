"""The objectives against closed forms on Gaussian data, where D, f and their minimisers are known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cm_runtime import noise
from cm_runtime.networks.consistency import ConsistencyModel, ModelConfig, build
from cm_runtime.networks.dropout import Dropout
from cm_runtime.networks.unet import UNetConfig
from cm_runtime.schedule import NoiseRange
from cm_runtime.training.config import CdPhase, CtPhase, EctPhase, EdmPhase, IctPhase, Phase
from cm_runtime.training.losses import Batch, Loss, loss_of
from cm_runtime.training.noise import Draws
from cm_runtime.training.second_points import Denoise, gaussian

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SHARED: dict[str, Any] = {"steps": 10_000, "batch": 4, "learning_rate": 1e-3}


def edm(sigma_data: float = 0.5, **keys: Any) -> Loss:
    return loss_of(EdmPhase(method="edm", **SHARED, **keys), sigma_data, None, CPU)


def ect(**keys: Any) -> Loss:
    return loss_of(EctPhase(method="ect", **SHARED, **keys), 0.5, None, CPU)


def batch_of(x: Tensor, label: Tensor | None = None, seed: int = 0, first: int = 0) -> Batch:
    return Batch(x, label, Draws(seed, torch.arange(first, first + len(x))))


class StandIn(nn.Module):
    """A model with a formula for f, which remembers every call; ``a`` scales f and is its one parameter."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], a: float = 1.0) -> None:
        super().__init__()
        self.f = f
        self.a = nn.Parameter(torch.tensor(a))
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool]] = []

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        self.calls.append((x, sigma, label, key, torch.is_grad_enabled()))
        return self.a * self.f(x, sigma)


def black() -> StandIn:
    return StandIn(lambda x, s: torch.zeros_like(x))


def scaled(c: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """f(x, sigma) = c(sigma) x."""
    return lambda x, sigma: c(sigma)[:, None, None, None] * x


def gradients(
    loss: Loss, student: StandIn, target: StandIn, s: float, k: int = 0, batches: int = 40
) -> tuple[float, float]:
    """d loss / d a on Gaussian data N(0, s^2): its mean over fresh batches and the standard error of that mean."""
    torch.manual_seed(0)
    found = []
    for i in range(batches):
        batch = batch_of(s * torch.randn(1024, 1, 2, 2), first=1024 * i)
        value = loss(student, target, batch, k).mean()
        found.append(torch.autograd.grad(value, student.a)[0].item())
        student.calls.clear()
        target.calls.clear()
    return float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(batches))


def assert_least_at_one(at: Callable[[float], tuple[float, float]]) -> None:
    """``at``: a factor of f -> the slope of the loss there and its error."""
    (below, below_error), (exact, exact_error), (above, above_error) = at(0.95), at(1.0), at(1.05)
    assert abs(exact) < 4 * exact_error
    assert below < -5 * below_error
    assert above > 5 * above_error


# EDM


@pytest.mark.parametrize("sigma", [0.002, 0.3, 80.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_weight_of_a_denoiser_that_always_answers_black(sigma: float, sigma_data: float) -> None:
    x = torch.full((3, 1, 2, 2), 0.7)
    loss = edm(sigma_data, P_mean=math.log(sigma), P_std=1e-9)(black(), black(), batch_of(x), 0)
    expected = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2 * 0.49
    assert loss.shape == (3,)
    assert loss.tolist() == pytest.approx([expected] * 3, rel=1e-5)


@pytest.mark.parametrize("s", [0.5, 0.2])
def test_edm_loss_of_the_exact_gaussian_denoiser_is_the_integral_of_its_closed_form(s: float) -> None:
    model = StandIn(scaled(lambda t: s**2 / (s**2 + t**2)))
    torch.manual_seed(1)
    x = s * torch.randn(200_000, 1, 2, 2)
    found = edm(P_mean=-1.2, P_std=1.2)(model, model, batch_of(x), 0).mean().item()
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    t = np.exp(-1.2 + 1.2 * nodes)
    # weight times posterior variance: (t^2 + sd^2)/(t sd)^2 * s^2 t^2/(s^2 + t^2); exactly 1 where s = sd
    per_level = (t**2 + 0.25) * s**2 / (0.25 * (s**2 + t**2))
    assert found == pytest.approx(float(weights @ per_level / weights.sum()), rel=0.01)


@pytest.mark.process
def test_edm_is_least_at_the_exact_denoiser() -> None:
    s = 0.3

    def at(a: float) -> tuple[float, float]:
        model = StandIn(scaled(lambda t: s**2 / (s**2 + t**2)), a=a)
        return gradients(edm(), model, model, s)

    assert_least_at_one(at)


def test_edm_shows_the_model_lognormal_levels_unit_noise_and_the_labels() -> None:
    model = StandIn(lambda x, s: x)
    x, label = torch.full((50_000, 1, 2, 2), 0.25), torch.arange(50_000)
    edm(P_mean=-0.4, P_std=1.7)(model, model, batch_of(x, label), 0)
    noisy, sigma, seen, _, _ = model.calls[0]
    assert sigma.shape == (50_000,) and sigma.dtype == torch.float32 and seen is label
    log = sigma.double().log()
    assert log.mean().item() == pytest.approx(-0.4, abs=5 * 1.7 / math.sqrt(50_000))
    assert log.std().item() == pytest.approx(1.7, rel=5 / math.sqrt(100_000))
    assert (log < -0.4 + 1.7).double().mean().item() == pytest.approx(0.841345, abs=0.01)
    z = ((noisy - x) / sigma[:, None, None, None]).double()
    assert z.mean().item() == pytest.approx(0, abs=0.015)
    assert z.std().item() == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(z.mean((1, 2, 3)).numpy(), log.numpy())[0, 1]) < 0.025


@pytest.mark.parametrize("objective", [edm, ect])
def test_noise_levels_and_keys_are_those_of_cm_runtime_noise_at_the_images_places(
    objective: Callable[..., Loss],
) -> None:
    model = StandIn(lambda x, s: x)
    x, first, seed = torch.zeros(5, 3, 2, 2), (1 << 32) - 2, 11
    objective(P_mean=-1.0, P_std=2.0)(model, model, batch_of(x, seed=seed, first=first), 9_999)
    noisy, sigma, _, key, _ = model.calls[-1]  # the student's
    places = np.arange(first, first + 5)
    level = np.exp(2.0 * noise.normal(seed, places, 0xFFFF0001, ())[:, None, None, None] - 1.0)
    np.testing.assert_allclose(sigma.numpy(), level.ravel(), rtol=1e-5)
    np.testing.assert_allclose(noisy.numpy(), level * noise.normal(seed, places, 0xFFFF0000, (3, 2, 2)), rtol=1e-4)
    assert key is not None
    assert (key.numpy() == noise.words(seed, places, 0xFFFF0003, 1)[:, 0, :2]).all()


def test_each_phase_has_its_own_objective() -> None:
    x = torch.full((1, 1, 2, 2), 0.5)  # its norm is 1
    level = {"P_mean": 0.0, "P_std": 1e-9}
    assert edm(**level)(black(), black(), batch_of(x), 0).item() == pytest.approx(5 * 0.25)
    offset = 0.00054 * 2  # the pseudo-Huber constant of four pixels
    expected = math.hypot(1, offset) - offset
    assert ect(**level)(black(), black(), batch_of(x), 0).item() == pytest.approx(expected)


# ECT


@pytest.mark.parametrize(("k", "stage"), [(0, 0), (1249, 0), (1250, 1), (5000, 4), (9999, 7)])
def test_ect_compares_the_same_noise_at_t_and_at_the_r_of_its_stage(k: int, stage: int) -> None:
    student, target = StandIn(lambda x, s: x), StandIn(lambda x, s: x)
    torch.manual_seed(3)
    x, label = torch.rand(512, 1, 2, 2), torch.arange(512)
    ect(stages=8)(student, target, batch_of(x, label), k)
    [(x_t, t, label_t, key_t, student_has_gradient)] = student.calls
    [(x_r, sigma_r, label_r, key_r, target_has_gradient)] = target.calls
    assert label_r is label and label_t is label
    assert key_t is not None and key_r is not None and torch.equal(key_t, key_r)
    assert (target_has_gradient, student_has_gradient) == (False, True)
    t64 = t.double().numpy()
    r = t64 * (1 - (1 + 8 / (1 + np.exp(t64))) / 2 ** (stage + 1))
    some, none = r > 1e-6, r < -1e-6
    assert some.any() and (none.any() == (stage < 2))
    np.testing.assert_allclose(sigma_r.numpy()[some], r[some], rtol=1e-5)
    z = ((x_t - x) / t[:, None, None, None]).numpy()
    np.testing.assert_allclose((x_r - x).numpy()[some], r[some][:, None, None, None] * z[some], rtol=1e-3, atol=1e-6)
    assert np.isfinite(sigma_r.numpy()).all() and (sigma_r > 0).all()  # the network never sees ln 0


@pytest.mark.parametrize(("c", "d"), [(1e-6, 1.0), (0.75, 0.5)])
def test_ect_targets_the_clean_image_where_r_is_zero(c: float, d: float) -> None:
    # at t = 0.5 and stage 0, r is 0; f = 0 is |x| = 1 away from x, and the weight is 1 / (t - 0) = 2
    x = torch.full((5, 1, 2, 2), 0.5)
    far = StandIn(lambda x, s: torch.full_like(x, 7.0))  # what a target says there is not heard
    loss = ect(P_mean=math.log(0.5), P_std=1e-9, huber_c=c)(black(), far, batch_of(x), 0)
    assert loss.tolist() == pytest.approx([2 * d] * 5, rel=1e-5)


def test_every_image_has_its_own_loss() -> None:
    x = torch.stack([torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 1.5)])  # norms 1 and 3
    loss = ect(P_mean=0.0, P_std=1e-9, huber_c=1e-6)(black(), black(), batch_of(x), 0)
    assert loss.tolist() == pytest.approx([1.0, 3.0], rel=1e-5)


def test_ect_is_zero_for_a_consistent_function() -> None:
    # the one image of a data set is f of every noisy version of it
    model = StandIn(lambda x, s: torch.full_like(x, 0.3))
    loss = ect(stages=8)(model, model, batch_of(torch.rand(64, 1, 2, 2)), 9_900)
    assert (loss == 0).all()
    assert all((sigma > 0).all() for _, sigma, *_ in model.calls)


def test_ect_weighs_the_distance_by_one_over_t_minus_r_and_sends_no_gradient_through_the_target() -> None:
    a, c = 0.8, 0.2
    model = StandIn(lambda x, s: x, a=a)
    torch.manual_seed(4)
    losses = ect(stages=8, huber_c=c)(model, model, batch_of(torch.rand(32, 1, 2, 2)), 6_000)
    (gradient,) = torch.autograd.grad(losses.mean(), model.a)
    (x_r, r, *_), (x_t, t, *_) = model.calls
    x_r, r, x_t, t = (v.double() for v in (x_r, r, x_t, t))
    distance = (a**2 * (x_t - x_r).square().sum((1, 2, 3)) + c**2).sqrt()
    np.testing.assert_allclose(losses.detach().numpy(), ((distance - c) / (t - r)).numpy(), rtol=1e-3)
    stopped = (a * ((x_t - x_r) * x_t).sum((1, 2, 3)) / distance / (t - r)).mean()
    through = (a * (x_t - x_r).square().sum((1, 2, 3)) / distance / (t - r)).mean()
    assert gradient.item() == pytest.approx(stopped.item(), rel=1e-4)
    assert abs(stopped - through) > 0.1 * abs(stopped)  # so the line above tells one from the other


def on_table(levels: np.ndarray, g: np.ndarray) -> Callable[[Tensor, Tensor], Tensor]:
    """f(x, sigma) = g(sigma) x, interpolated over ln sigma."""

    def c(sigma: Tensor) -> Tensor:
        return torch.from_numpy(np.interp(sigma.double().log().numpy(), np.log(levels), g)).to(sigma.dtype)

    return scaled(c)


@pytest.mark.process
@pytest.mark.parametrize(("stage", "ratio"), [(2, 0.840), (3, 0.928), (4, 0.966)])
def test_ect_is_least_at_its_known_fixed_point_on_gaussian_data(
    ect_fixed_point: Callable[[Tensor, float, int], Tensor], stage: int, ratio: float
) -> None:
    s = 0.3
    # the published known answer: how far the fixed point is from the true consistency function at sigma 80
    true = math.sqrt((s**2 + 0.002**2) / (s**2 + 80.0**2))
    assert ect_fixed_point(torch.tensor([80.0]), s, stage).item() / true == pytest.approx(ratio, abs=6e-4)
    # a wide pseudo-Huber is a square, whose minimiser is a conditional mean; P_std keeps levels where it matters
    loss = ect(P_mean=-0.5, P_std=1.0, stages=8, huber_c=1e3)
    levels = np.exp(np.linspace(-11.5, 6, 20_000))
    f = on_table(levels, ect_fixed_point(torch.from_numpy(levels), s, stage).numpy())
    # the student alone is scaled: the target is the fixed point itself
    assert_least_at_one(lambda a: gradients(loss, StandIn(f, a=a), StandIn(f), s, k=1250 * stage + 600))


# The discrete methods


def true_f(t: float, s: float) -> float:
    """The consistency function of N(0, s^2): x is multiplied by it."""
    return math.sqrt((s**2 + 0.002**2) / (s**2 + t**2))


def fixed_point(grid: np.ndarray, step: Callable[[float, float], float]) -> np.ndarray:
    """g at every level of an ascending grid where g(t_{n+1}) = g(t_n) step(t_{n+1}, t_n), and g = 1 at the first."""
    g = [1.0]
    for r, t in pairwise(grid):
        g.append(g[-1] * step(t, r))
    return np.array(g)


def mean_step(s: float) -> Callable[[float, float], float]:
    """E[x + r z | x + t z] in units of x + t z; the Euler step of the exact denoiser is the same."""
    return lambda t, r: (s**2 + t * r) / (s**2 + t**2)


def heun_step(s: float) -> Callable[[float, float], float]:
    """One Heun step of dx/dt = x t / (s^2 + t^2), the probability flow of N(0, s^2)."""

    def step(t: float, r: float) -> float:
        slope = t / (s**2 + t**2)
        euler = 1 + (r - t) * slope
        return 1 + (r - t) * (slope + euler * r / (s**2 + r**2)) / 2

    return step


def discrete(method: str, N: int, s: float, **keys: Any) -> tuple[Loss, int]:
    """An objective on a grid of N points, and a step at which it has that grid."""
    phase: Phase
    teacher: Denoise | None = None
    k = 0
    match method:
        case "heun" | "euler":
            phase, teacher = CdPhase(method="cd", N=N, solver=method, **SHARED, **keys), gaussian(s)  # type: ignore[arg-type]
        case "ct":
            phase = CtPhase(method="ct", s0=N - 1, s1=N - 1, **SHARED, **keys)
            k = phase.steps - 1  # N(K) = s1 + 1
        case _:
            phase = IctPhase(method="ict", s0=N - 1, s1=N - 1, **SHARED, **keys)
    return loss_of(phase, 0.5, teacher, CPU), k


@pytest.mark.process
@pytest.mark.parametrize(
    ("method", "N", "ratio"),
    [
        ("ct", 18, 0.836),
        ("ct", 40, 0.925),
        ("ict", 18, 0.836),
        ("euler", 18, 0.836),
        ("euler", 40, 0.925),
        ("heun", 18, 1.065),
        ("heun", 40, 1.011),
    ],
)
def test_the_discrete_methods_are_least_at_their_known_fixed_points(method: str, N: int, ratio: float) -> None:
    s = 0.3
    grid = NoiseRange().karras(N)[::-1]
    g = fixed_point(grid, (heun_step if method == "heun" else mean_step)(s))
    assert g[-1] / true_f(80.0, s) == pytest.approx(ratio, abs=6e-4)
    f = on_table(grid, g)
    # iCT's weight 1 / (t - r) and a wide pseudo-Huber, which is a square
    loss, k = discrete(method, N, s, **({"huber_c": 1e3, "P_mean": -0.5, "P_std": 1.0} if method == "ict" else {}))
    if method in ("heun", "euler"):
        # what a teacher's ODE step says of x_t is no random number: the fixed point has no loss at all
        x = s * torch.randn(512, 1, 2, 2, dtype=torch.float64)
        grid_loss = loss(StandIn(f), StandIn(f), batch_of(x), k)
        assert grid_loss.max() < 1e-10
        assert loss(StandIn(f, a=1.01), StandIn(f), batch_of(x), k).mean() > 1e3 * grid_loss.mean()
    else:
        assert_least_at_one(lambda a: gradients(loss, StandIn(f, a=a), StandIn(f), s, k=k))


@pytest.mark.parametrize("method", ["heun", "euler", "ct", "ict"])
def test_the_target_is_another_network_without_gradient_on_the_point_below(method: str) -> None:
    student, target = StandIn(lambda x, s: x), StandIn(lambda x, s: x)
    x, label = torch.rand(64, 1, 2, 2), torch.arange(64)
    loss, k = discrete(method, 18, 0.3)
    loss(student, target, batch_of(x, label), k)
    [(_, t, label_t, key_t, student_has_gradient)] = student.calls
    [(_, r, label_r, key_r, target_has_gradient)] = target.calls
    assert label_t is label and label_r is label
    assert key_t is not None and key_r is not None and torch.equal(key_t, key_r)
    assert (target_has_gradient, student_has_gradient) == (False, True)
    grid = NoiseRange().karras(18)[::-1].astype(np.float32)
    at = np.searchsorted(grid, t.numpy())
    assert (grid[at] == t.numpy()).all() and (grid[at - 1] == r.numpy()).all()


@pytest.mark.parametrize(("weighting", "method"), [("one", "ct"), ("gap", "ct"), ("one", "ict"), ("gap", "ict")])
def test_the_weighting_is_one_or_one_over_the_gap(weighting: str, method: str) -> None:
    student, target = StandIn(lambda x, s: x), black()
    loss, k = discrete(method, 18, 0.3, weighting=weighting, distance="l2")
    x = torch.rand(64, 1, 2, 2)
    losses = loss(student, target, batch_of(x), k)
    (x_t, t, *_), (_, r, *_) = student.calls[0], target.calls[0]
    gap = 1 / (t - r) if weighting == "gap" else torch.ones(64)
    np.testing.assert_allclose(losses.detach().numpy(), (gap * x_t.square().mean((1, 2, 3))).numpy(), rtol=1e-5)


def test_a_teacher_sees_the_labels_and_neither_gradient_nor_dropout() -> None:
    teacher = StandIn(scaled(lambda t: 0.09 / (0.09 + t**2)))
    phase = CdPhase(method="cd", **SHARED)
    student = StandIn(lambda x, s: x)
    label = torch.arange(8)
    loss_of(phase, 0.5, teacher, CPU)(student, student, batch_of(torch.rand(8, 1, 2, 2), label), 0)
    assert len(teacher.calls) == 2  # Heun
    assert all(call[2] is label and call[3] is None and not call[4] for call in teacher.calls)


def test_losses_in_float64_stay_in_float64() -> None:
    x = torch.rand(7, 1, 2, 2, dtype=torch.float64)
    for loss, k in (discrete("heun", 18, 0.3), discrete("ict", 11, 0.3), (ect(), 9_000), (edm(), 0)):
        model = StandIn(lambda x, s: x * 0.9, a=1.0).double()
        assert loss(model, model, batch_of(x), k).dtype == torch.float64
        assert all(call[0].dtype == call[1].dtype == torch.float64 for call in model.calls)


# Dropout


def test_student_and_target_share_their_dropout_masks() -> None:
    class OnlyDropout(StandIn):
        """f is nothing but its mask: 0 or 2."""

        def __init__(self) -> None:
            super().__init__(lambda x, t: x)
            self.dropout = Dropout(0.5, 0)
            self.masks: list[Tensor] = []

        def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None, key: Tensor | None = None) -> Tensor:
            self.masks.append(self.dropout(torch.ones_like(x), key))
            return self.a * self.masks[-1]

    student, target = OnlyDropout().train(), OnlyDropout().train()
    x = torch.rand(16, 1, 4, 4)
    assert (ect(stages=8)(student, target, batch_of(x), 9_900) == 0).all()
    assert 0 < student.masks[0].mean() < 2
    ect(stages=8)(student, target, batch_of(x, first=16), 9_900)  # other places
    assert not torch.equal(student.masks[0], student.masks[1])
    # whichever images are beside it, an image has its mask
    ect(stages=8)(student, target, batch_of(x[:3], first=5), 9_900)
    assert torch.equal(student.masks[2], student.masks[0][5:8])


def noisy_unet(dropout: float) -> ConsistencyModel:
    """A tiny network with every weight drawn at random, so that nothing in it is silent."""
    network = UNetConfig(
        channels=32,
        channel_mult=(1, 2),
        res_blocks=1,
        head_channels=32,
        dropout=dropout,
        image_size=8,
        image_channels=1,
    )
    torch.manual_seed(8)
    model = build(ModelConfig(network=network, precond="edm", sigma_boundary=0.0))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model.train()


def test_dropout_in_the_real_network_is_shared_too() -> None:
    model = noisy_unet(0.5)
    x = torch.rand(8, 1, 8, 8)
    sigma = torch.full((8,), 0.5)
    apart = (model(x, sigma) - model(x, sigma)).square().sum((1, 2, 3)).sqrt().mean().item()
    # q^16 brings r within 1e-4 of t: what is left of the distance is the change of f from r to t
    loss = ect(P_mean=math.log(0.5), P_std=1e-9, q=2.0, stages=16, huber_c=1e-6)
    found = loss(model, model, batch_of(x), 9_990).mean().item()
    share = (1 + 8 / (1 + math.exp(0.5))) / 2**16
    assert apart > 0.05
    assert found * 0.5 * share < 0.02 * apart


@pytest.mark.parametrize("stages", [8, 20])
def test_ect_stays_finite_in_its_last_stage(stages: int) -> None:
    model = noisy_unet(0.0)
    torch.manual_seed(10)
    loss = ect(stages=stages)(model, model, batch_of(torch.rand(16, 1, 8, 8) * 2 - 1), 9_999)
    found = torch.autograd.grad(loss.sum(), list(model.parameters()), allow_unused=True)
    assert loss.isfinite().all()
    assert all(g is None or g.isfinite().all() for g in found)
