"""cm_runtime/networks/consistency.py: f against the paper's formula with published coefficients."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cm_runtime.errors import ConfigError
from cm_runtime.networks.consistency import build

# sigma, c_skip, c_out, c_in, c_noise: the boundary form of arXiv 2303.01469, sigma_data 0.5, boundary 0.002.
TABLE = [
    (80.0, 3.906293e-5, 0.4999777, 0.01249976, 1095.50666),
    (1.3823680, 0.1159869, 0.4695084, 0.6802656, 80.949485),
    (0.002, 1.0, 0.0, 1.999984, -1553.65202),
]


def images(rng, n=3, size=8, channels=3):
    return torch.from_numpy(rng.standard_normal((n, channels, size, size))).float()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"sigma {row[0]}")
@pytest.mark.parametrize("classes", [0, 7])
def test_f_is_the_formula_with_the_published_coefficients(row, classes, rng, make_config, randomised):
    sigma, c_skip, c_out, c_in, c_noise = row
    model = randomised(build(make_config(num_classes=classes)))
    x = images(rng) * max(sigma, 0.5)
    label = torch.tensor([0, 6, 3]) if classes else None
    with torch.no_grad():
        F = model.F((c_in * x.double()).float(), torch.full((3,), c_noise), label).double()
        found = model(x, torch.full((3,), sigma), label)
    assert found.dtype == torch.float32 and found.shape == x.shape
    assert F.abs().max() > 0.05
    expected = c_skip * x.double() + c_out * F
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_at_the_boundary_f_is_exactly_the_identity(n, rng, make_config, randomised):
    model = randomised(build(make_config()))
    x = 2 * images(rng, n)
    with torch.no_grad():
        assert torch.equal(model(x, torch.full((n,), 0.002)), x)


def test_the_edm_form_is_equation_7_of_karras(rng, make_config, randomised):
    model = randomised(build(make_config(f={"precond": "edm", "sigma_boundary": 0})))
    x, sigma = images(rng), 1.5
    variance = sigma**2 + 0.25
    with torch.no_grad():
        F = model.F(x / variance**0.5, torch.full((3,), 250 * float(np.log(sigma)))).double()
        found = model(x, torch.full((3,), sigma)).double()
    expected = 0.25 / variance * x.double() + sigma * 0.5 / variance**0.5 * F
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_the_piecewise_form_is_x_at_the_boundary_and_F_above(rng, make_config, randomised):
    model = randomised(build(make_config(f={"precond": "piecewise", "sigma_boundary": 0.01})))
    x = images(rng)
    levels = torch.tensor([0.002, 0.01, 1.5])
    with torch.no_grad():
        found = model(x, levels)
        F = model.F(x[2:] / 2.5**0.5, torch.tensor([250 * float(np.log(1.5))]))
    assert torch.equal(found[:2], x[:2])
    torch.testing.assert_close(found[2:], F, atol=2e-5, rtol=2e-5)


def test_each_image_has_its_own_sigma_and_label(rng, make_config, randomised):
    model = randomised(build(make_config(num_classes=7, attention=(8,))))
    x, sigma, label = images(rng, 7), torch.tensor([0.002, 0.01, 0.3, 1.4, 5, 20, 80]), torch.arange(7)
    with torch.no_grad():
        together = model(x, sigma, label)
        for i in range(7):
            alone = model(x[i : i + 1], sigma[i : i + 1], label[i : i + 1])
            torch.testing.assert_close(alone, together[i : i + 1], atol=1e-4, rtol=1e-4)
        assert (model(x, sigma, label.flip(0)) - together)[1:3].abs().max() > 1e-4


def test_f_never_clamps(rng, make_config, randomised):
    model = randomised(build(make_config()))
    x = images(rng)
    with torch.no_grad():
        assert model(10 * x, torch.full((3,), 0.01)).abs().max() > 5
        before = model(x, torch.full((3,), 1.4)).double()
        for weight in model.F.out[2].parameters():
            weight *= 100  # F is linear in its last layer, however large it grows
        after = model(x, torch.full((3,), 1.4)).double()
    skip = 0.25 / (1.398**2 + 0.25) * x.double()
    assert (after - skip).abs().max() > 5
    torch.testing.assert_close(after - skip, 100 * (before - skip), atol=1e-4, rtol=1e-3)


def test_f_stays_float32_around_a_half_precision_network(rng, make_config, randomised):
    """Coefficients and the skip-scale keep x whole: near the boundary f(x) = x to float32, not to half, precision."""
    model = randomised(build(make_config()))
    x = images(rng)
    with torch.no_grad():
        found = model.skip_scale(x, torch.ones_like(x).half(), torch.full((3,), 0.0021))
    assert found.dtype == torch.float32
    expected = x.double() * 0.25 / (0.25 + 1e-8) + 0.5 * 1e-4 / (0.0021**2 + 0.25) ** 0.5
    torch.testing.assert_close(found.double(), expected, atol=3e-7, rtol=3e-7)


@pytest.mark.parametrize(
    "changes",
    [{"sigma_data": 0.7}, {"sigma_boundary": 0.1}, {"precond": "piecewise"}, {"precond": "edm", "sigma_boundary": 0}],
    ids=str,
)
def test_every_choice_of_the_form_changes_f(changes, rng, make_config, randomised):
    plain, other = randomised(build(make_config())), randomised(build(make_config(f=changes)))
    x, sigma = images(rng), torch.full((3,), 0.3)
    with torch.no_grad():
        assert (plain(x, sigma) - other(x, sigma)).abs().max() > 1e-4


def test_image_shape_is_channels_first(make_config):
    assert make_config(image_channels=1, image_size=12).image_shape == (1, 12, 12)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"precond": "vp"}, "precond"),
        ({"sigma_data": 0}, "sigma_data"),
        ({"sigma_data": float("nan")}, "sigma_data"),
        ({"sigma_data": float("inf")}, "sigma_data"),
        ({"sigma_boundary": -1}, "sigma_boundary"),
        ({"sigma_min": 0}, "sigma_min"),
        ({"sigma_max": -1}, "sigma_max"),
        ({"sigma_max": float("inf")}, "sigma_max"),
        ({"rho": 0}, "rho"),
        ({"sigma_min": 81.0}, "sigma_min"),
        ({"tau": 1}, "tau"),
    ],
    ids=str,
)
def test_impossible_models_are_refused_by_name(changes, complaint, make_config):
    with pytest.raises(ValidationError, match=complaint):
        make_config(f=changes)


@pytest.mark.parametrize(
    "changes", [{"sigma_boundary": 0.0}, {"precond": "edm"}, {"precond": "piecewise", "sigma_boundary": 0}]
)
def test_a_form_and_a_boundary_that_do_not_belong_together_are_refused(changes, make_config):
    """By the config or, at the latest, by the model."""
    with pytest.raises((ValidationError, ConfigError), match="boundary"):
        build(make_config(f=changes), "meta")
