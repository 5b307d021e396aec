"""The objectives against closed forms on Gaussian data, where D, f and their minimisers are known exactly."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cm_runtime.model import ConsistencyModel, ModelConfig, build
from cm_runtime.training.config import EctPhase, EdmPhase
from cm_runtime.training.losses import Loss, ect, ect_r, edm, lognormal, loss_of, pseudo_huber
from cm_runtime.unet import UNetConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SHARED = {"steps": 8, "batch": 4, "learning_rate": 1e-3}


def edm_phase(**keys: float) -> EdmPhase:
    return EdmPhase(method="edm", **SHARED, **keys)  # type: ignore[arg-type]


def ect_phase(**keys: float) -> EctPhase:
    return EctPhase(method="ect", **SHARED, **keys)  # type: ignore[arg-type]


class StandIn(nn.Module):
    """A model with a formula for f, which remembers every call; ``a`` scales f and is its one parameter."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], sigma_data: float = 0.5, a: float = 1.0) -> None:
        super().__init__()
        self.f, self.config = f, SimpleNamespace(sigma_data=sigma_data)
        self.a = nn.Parameter(torch.tensor(a))
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, bool]] = []

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        self.calls.append((x, sigma, label, torch.is_grad_enabled()))
        return self.a * self.f(x, sigma)


def scaled(c: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """f(x, sigma) = c(sigma) x."""
    return lambda x, sigma: c(sigma)[:, None, None, None] * x


def gradients(loss: Loss, model: StandIn, s: float, progress: float, batches: int = 40) -> tuple[float, float]:
    """d loss / d a on Gaussian data N(0, s^2): its mean over fresh batches and the standard error of that mean."""
    torch.manual_seed(0)
    found = []
    for _ in range(batches):
        value = loss(model, s * torch.randn(1024, 1, 2, 2), None, progress)  # type: ignore[arg-type]
        found.append(torch.autograd.grad(value, model.a)[0].item())
        model.calls.clear()
    return float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(batches))


# EDM


@pytest.mark.parametrize("sigma", [0.002, 0.3, 80.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_weight_of_a_denoiser_that_always_answers_black(sigma: float, sigma_data: float) -> None:
    model = StandIn(lambda x, s: torch.zeros_like(x), sigma_data)
    x = torch.full((3, 1, 2, 2), 0.7)
    loss = edm(edm_phase(P_mean=math.log(sigma), P_std=1e-9))(model, x, None, 0.0)  # type: ignore[arg-type]
    expected = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2 * 0.49
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("s", [0.5, 0.2])
def test_edm_loss_of_the_exact_gaussian_denoiser_is_the_integral_of_its_closed_form(s: float) -> None:
    model = StandIn(scaled(lambda t: s**2 / (s**2 + t**2)))
    torch.manual_seed(1)
    x = s * torch.randn(200_000, 1, 2, 2)
    found = edm(edm_phase(P_mean=-1.2, P_std=1.2))(model, x, None, 0.0).item()  # type: ignore[arg-type]
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    t = np.exp(-1.2 + 1.2 * nodes)
    # weight times posterior variance: (t^2 + sd^2)/(t sd)^2 * s^2 t^2/(s^2 + t^2); exactly 1 where s = sd
    per_level = (t**2 + 0.25) * s**2 / (0.25 * (s**2 + t**2))
    assert found == pytest.approx(float(weights @ per_level / weights.sum()), rel=0.01)


def test_edm_is_least_at_the_exact_denoiser() -> None:
    s = 0.3

    def at(a: float) -> tuple[float, float]:
        model = StandIn(scaled(lambda t: s**2 / (s**2 + t**2)), a=a)
        return gradients(edm(edm_phase()), model, s, 0.0)

    (below, below_error), (exact, exact_error), (above, above_error) = at(0.95), at(1.0), at(1.05)
    assert abs(exact) < 4 * exact_error
    assert below < -10 * below_error
    assert above > 10 * above_error


def test_edm_shows_the_model_lognormal_levels_unit_noise_and_the_labels() -> None:
    model = StandIn(lambda x, s: x)
    torch.manual_seed(2)
    x, label = torch.full((50_000, 1, 2, 2), 0.25), torch.arange(50_000)
    edm(edm_phase(P_mean=-0.4, P_std=1.7))(model, x, label, 0.0)  # type: ignore[arg-type]
    noisy, sigma, seen, _ = model.calls[0]
    assert sigma.shape == (50_000,) and sigma.dtype == torch.float32 and seen is label
    log = sigma.double().log()
    assert log.mean().item() == pytest.approx(-0.4, abs=5 * 1.7 / math.sqrt(50_000))
    assert log.std().item() == pytest.approx(1.7, rel=5 / math.sqrt(100_000))
    assert (log < -0.4 + 1.7).double().mean().item() == pytest.approx(0.841345, abs=0.01)
    z = ((noisy - x) / sigma[:, None, None, None]).double()
    assert z.mean().item() == pytest.approx(0, abs=0.015)
    assert z.std().item() == pytest.approx(1, abs=0.01)


def test_lognormal_is_a_function_of_the_generator() -> None:
    torch.manual_seed(5)
    first = lognormal(7, -1.0, 2.0, torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(first, (torch.randn(7) * 2.0 - 1.0).exp())


def test_each_phase_has_its_own_objective() -> None:
    black = StandIn(lambda x, s: torch.zeros_like(x))
    x = torch.full((1, 1, 2, 2), 0.5)  # its norm is 1
    level = {"P_mean": 0.0, "P_std": 1e-9}
    assert loss_of(edm_phase(**level))(black, x, None, 0.0).item() == pytest.approx(5 * 0.25)  # type: ignore[arg-type]
    assert loss_of(ect_phase(**level))(black, x, None, 0.0).item() == pytest.approx(1.0)  # type: ignore[arg-type]


# ECT


@pytest.mark.parametrize(
    ("t", "stage", "r"),
    [
        (1.0, 0, 0.0),
        (1.0, 2, 0.606059),
        (1.0, 3, 0.803029),
        (10.0, 0, 4.998184),
        (10.0, 2, 8.749546),
        (10.0, 3, 9.374773),
    ],
)
def test_ect_r_known_answers(t: float, stage: int, r: float) -> None:
    assert ect_r(torch.tensor([t]), stage, 2.0, 8.0, 1.0).item() == pytest.approx(r, abs=2e-6)


@pytest.mark.parametrize(("q", "k", "b"), [(2.0, 8.0, 1.0), (4.0, 8.0, 1.0), (1.5, 3.0, 2.5)])
def test_ect_r_is_the_printed_formula_and_stays_between_zero_and_t(q: float, k: float, b: float) -> None:
    t = np.exp(np.linspace(-9, 4.4, 257))
    for stage in range(8):
        r = ect_r(torch.from_numpy(t), stage, q, k, b).numpy()
        n = 1 + k / (1 + np.exp(b * t))
        np.testing.assert_allclose(r, np.maximum(0.0, t - t * n / q ** (stage + 1)), rtol=1e-12)
        assert ((r >= 0) & (r < t)).all()


@pytest.mark.parametrize(("progress", "stage"), [(0.0, 0), (0.1249, 0), (0.125, 1), (0.5, 4), (0.9999, 7), (1.0, 7)])
def test_ect_compares_the_same_noise_at_t_and_at_the_r_of_its_stage(progress: float, stage: int) -> None:
    model = StandIn(lambda x, s: x)
    torch.manual_seed(3)
    x, label = torch.rand(512, 1, 2, 2), torch.arange(512)
    ect(ect_phase(stages=8))(model, x, label, progress)  # type: ignore[arg-type]
    (x_r, sigma_r, label_r, target_has_gradient), (x_t, t, label_t, student_has_gradient) = model.calls
    assert label_r is label and label_t is label
    assert (target_has_gradient, student_has_gradient) == (False, True)
    t64 = t.double().numpy()
    r = t64 * (1 - (1 + 8 / (1 + np.exp(t64))) / 2 ** (stage + 1))
    some, none = r > 1e-6, r < -1e-6
    assert some.any() and (none.any() == (stage < 2))
    np.testing.assert_allclose(sigma_r.numpy()[some], r[some], rtol=1e-5)
    z = ((x_t - x) / t[:, None, None, None]).numpy()
    np.testing.assert_allclose((x_r - x).numpy()[some], r[some][:, None, None, None] * z[some], rtol=1e-3, atol=1e-6)
    assert np.isfinite(sigma_r.numpy()).all() and (sigma_r > 0).all()  # the network never sees ln 0


@pytest.mark.parametrize(("c", "d"), [(0.0, 1.0), (0.75, 0.5)])
def test_ect_targets_the_clean_image_where_r_is_zero(c: float, d: float) -> None:
    # at t = 0.5 and stage 0, r is 0; f = 0 is |x| = 1 away from x, and the weight is 1 / (t - 0) = 2
    model = StandIn(lambda x, s: torch.zeros_like(x))
    x = torch.full((5, 1, 2, 2), 0.5)
    loss = ect(ect_phase(P_mean=math.log(0.5), P_std=1e-9, huber_c=c))(model, x, None, 0.0)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(2 * d, rel=1e-6)


def test_ect_averages_over_images() -> None:
    model = StandIn(lambda x, s: torch.zeros_like(x))
    x = torch.stack([torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 1.5)])  # norms 1 and 3
    phase = ect_phase(P_mean=0.0, P_std=1e-9)
    assert ect(phase)(model, x, None, 0.0).item() == pytest.approx(2.0, rel=1e-6)  # type: ignore[arg-type]


def test_ect_is_zero_for_a_consistent_function() -> None:
    # the one image of a data set is f of every noisy version of it
    model = StandIn(lambda x, s: torch.full_like(x, 0.3))
    loss = ect(ect_phase(stages=8))(model, torch.rand(64, 1, 2, 2), None, 0.99)  # type: ignore[arg-type]
    assert loss.item() == 0.0
    assert all((sigma > 0).all() for _, sigma, _, _ in model.calls)


def test_ect_weighs_the_distance_by_one_over_t_minus_r_and_sends_no_gradient_through_the_target() -> None:
    a, c = 0.8, 0.2
    model = StandIn(lambda x, s: x, a=a)
    torch.manual_seed(4)
    loss = ect(ect_phase(stages=8, huber_c=c))(model, torch.rand(32, 1, 2, 2), None, 0.6)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, model.a)
    (x_r, r, _, _), (x_t, t, _, _) = model.calls
    x_r, r, x_t, t = (v.double() for v in (x_r, r, x_t, t))
    distance = (a**2 * (x_t - x_r).square().sum((1, 2, 3)) + c**2).sqrt()
    assert loss.item() == pytest.approx(((distance - c) / (t - r)).mean().item(), rel=1e-4)
    stopped = (a * ((x_t - x_r) * x_t).sum((1, 2, 3)) / distance / (t - r)).mean()
    through = (a * (x_t - x_r).square().sum((1, 2, 3)) / distance / (t - r)).mean()
    assert gradient.item() == pytest.approx(stopped.item(), rel=1e-4)
    assert abs(stopped - through) > 0.1 * abs(stopped)  # so the line above tells one from the other


@pytest.mark.parametrize(("stage", "ratio"), [(2, 0.840), (3, 0.928), (4, 0.966)])
def test_ect_is_least_at_its_known_fixed_point_on_gaussian_data(
    ect_fixed_point: Callable[[Tensor, float, int], Tensor], stage: int, ratio: float
) -> None:
    s = 0.3
    # the published known answer: how far the fixed point is from the true consistency function at sigma 80
    true = math.sqrt((s**2 + 0.002**2) / (s**2 + 80.0**2))
    assert ect_fixed_point(torch.tensor([80.0]), s, stage).item() / true == pytest.approx(ratio, abs=6e-4)
    # a wide pseudo-Huber is a square, whose minimiser is a conditional mean; P_std keeps levels where it matters
    loss = ect(ect_phase(P_mean=-0.5, P_std=1.0, stages=8, huber_c=1e3))
    levels = torch.linspace(-11.5, 6, 20_000, dtype=torch.float64)
    table = ect_fixed_point(levels.exp(), s, stage).numpy()

    def at(a: float) -> tuple[float, float]:
        # the student alone is scaled by a: the target is the fixed point itself
        class Student(StandIn):
            def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
                g = torch.from_numpy(np.interp(sigma.double().log().numpy(), levels.numpy(), table)).float()
                f = g[:, None, None, None] * x
                return self.a * f if torch.is_grad_enabled() else f

        return gradients(loss, Student(lambda x, t: x, a=a), s, (stage + 0.5) / 8)

    (below, below_error), (exact, exact_error), (above, above_error) = at(0.95), at(1.0), at(1.05)
    assert abs(exact) < 4 * exact_error
    assert below < -5 * below_error
    assert above > 5 * above_error


def test_student_and_target_share_their_dropout_masks() -> None:
    class OnlyDropout(StandIn):
        """f is nothing but its mask: 0 or 2, drawn anew at every call."""

        def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
            return self.a * nn.functional.dropout(torch.ones_like(x), 0.5)

    model = OnlyDropout(lambda x, t: x)
    x = torch.rand(16, 1, 4, 4)
    torch.manual_seed(6)
    loss = ect(ect_phase(stages=8))
    assert loss(model, x, None, 0.99).item() == 0.0  # type: ignore[arg-type]
    assert not torch.equal(model(x, x), model(x, x))  # and masks do change from call to call
    torch.manual_seed(7)
    first = model(x, x)
    loss(model, x, None, 0.99)  # type: ignore[arg-type]
    assert not torch.equal(first, model(x, x))


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
    torch.manual_seed(9)
    # q^16 brings r within 1e-4 of t: what is left of the distance is the change of f from r to t
    loss = ect(ect_phase(P_mean=math.log(0.5), P_std=1e-9, q=2.0, stages=16))(model, x, None, 0.999).item()
    share = (1 + 8 / (1 + math.exp(0.5))) / 2**16
    assert apart > 0.05
    assert loss * 0.5 * share < 0.02 * apart


@pytest.mark.parametrize("stages", [8, 20])
def test_ect_stays_finite_in_its_last_stage(stages: int) -> None:
    model = noisy_unet(0.0)
    torch.manual_seed(10)
    loss = ect(ect_phase(stages=stages))(model, torch.rand(16, 1, 8, 8) * 2 - 1, None, 1.0)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert loss.isfinite()
    assert all(g is None or g.isfinite().all() for g in found)


# pseudo-Huber


@pytest.mark.parametrize("c", [0.0, 0.02993, 3.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 5, 7), (7, 3, 32, 32)])
def test_pseudo_huber_in_float64(c: float, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(shape), rng.standard_normal(shape)
    expected = [math.sqrt(sum(v * v for v in (x - y).ravel()) + c * c) - c for x, y in zip(a, b, strict=True)]
    found = pseudo_huber(torch.from_numpy(a), torch.from_numpy(b), c)
    assert found.shape == (shape[0],)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_pseudo_huber_is_a_square_near_zero_and_a_norm_far_away() -> None:
    zero, c = torch.zeros(1, 1, 1, 1, dtype=torch.float64), 0.1
    near, far = zero + 1e-4, zero + 1e4
    assert pseudo_huber(near, zero, c).item() == pytest.approx(1e-8 / (2 * c), rel=1e-5)
    assert pseudo_huber(far, zero, c).item() == pytest.approx(1e4 - c, rel=1e-9)
