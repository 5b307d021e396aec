"""Averages against the recursion written out in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from cm_runtime.training.config import CdPhase, CtPhase, EctPhase, EdmPhase, IctPhase
from cm_runtime.training.ema import Averages, Target, mu_of

pytestmark = pytest.mark.usefixtures("one_thread")

RATES = [0.0, 0.5, 0.9, 0.999]


class Walk(nn.Module):
    """Weights that wander at random, among them one of a single element and one in an inner module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 7)
        self.single = nn.Parameter(torch.zeros(1))
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self) -> dict[str, np.ndarray]:
        for weight in self.parameters():
            weight += torch.randn(weight.shape, generator=self.generator)
        return self.values()

    def values(self) -> dict[str, np.ndarray]:
        return {name: weight.detach().double().numpy().copy() for name, weight in self.named_parameters()}


def expected(history: list[dict[str, np.ndarray]], rate: float) -> dict[str, np.ndarray]:
    """history[0] the weights before step 0, history[k + 1] those after step k."""
    average = history[0]
    for step, weights in enumerate(history[1:]):
        keep = min(rate, (1 + step) / (10 + step))
        average = {name: keep * average[name] + (1 - keep) * weights[name] for name in average}
    return average


@pytest.mark.parametrize("steps", [1, 2, 7, 300])
def test_every_rate_is_the_recursion(steps: int) -> None:
    model = Walk()
    averages, history = Averages(model, RATES), [model.values()]
    for step in range(steps):
        history.append(model.step())
        averages.update(step)
    assert list(averages.state()) == ["0", "0.5", "0.9", "0.999"]
    for rate in RATES:
        found, wanted = averages.state()[f"{rate:g}"], expected(history, rate)
        assert list(found) == list(model.state_dict())
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name].double().numpy(), value, rtol=1e-5, atol=1e-5)


def test_the_first_update_keeps_a_tenth() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    averages = Averages(model, [0.999])
    nn.init.constant_(model.weight, 1.0)
    averages.update(0)
    assert averages.state()["0.999"]["weight"].item() == pytest.approx(0.9)


def test_averages_change_at_an_update_and_only_then() -> None:
    model = Walk()
    averages = Averages(model, [0.9])
    before = {name: tensor.clone() for name, tensor in averages.state()["0.9"].items()}
    model.step()
    assert all(torch.equal(averages.state()["0.9"][name], tensor) for name, tensor in before.items())
    averages.update(0)
    assert not any(torch.equal(averages.state()["0.9"][name], tensor) for name, tensor in before.items())
    averages.state()["0.9"]["single"].fill_(7.0)  # they are no views of the model
    assert model.single.item() != 7.0


def test_loading_a_state_goes_on_as_if_nothing_had_happened() -> None:
    def advance(averages: Averages, model: Walk, steps: range) -> None:
        for step in steps:
            model.step()
            averages.update(step)

    whole = Walk()
    through = Averages(whole, RATES)
    advance(through, whole, range(20))

    model = Walk()
    averages = Averages(model, RATES)
    advance(averages, model, range(11))
    saved = {rate: {k: v.clone() for k, v in weights.items()} for rate, weights in averages.state().items()}
    fresh = Averages(model, RATES)
    fresh.load(saved)
    advance(fresh, model, range(11, 20))
    for rate, weights in through.state().items():
        for name, tensor in weights.items():
            assert torch.equal(fresh.state()[rate][name], tensor)


def test_loading_copies_the_state() -> None:
    model = Walk()
    averages = Averages(model, [0.9])
    saved = {"0.9": {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}}
    averages.load(saved)
    model.step()
    averages.update(100)
    assert all((tensor == 1).all() for tensor in saved["0.9"].values())
    assert not (averages.state()["0.9"]["single"] == 1).all()


def test_averages_are_stored_in_the_type_asked_for_and_their_own_stay() -> None:
    model = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    averages = Averages(model, [0.5, 0.9])
    for dtype in (torch.float16, torch.float32):
        weights = averages.weights(dtype)
        assert list(weights) == ["0.5", "0.9"]
        for name, tensor in weights["0.9"].items():
            assert tensor.dtype == dtype and tensor.is_contiguous()
            assert torch.equal(tensor, averages.state()["0.9"][name].to(dtype))
    assert all(tensor.dtype == torch.float32 for tensor in averages.state()["0.9"].values())


@pytest.mark.parametrize(
    ("value", "half", "single"),
    [(1.0, True, True), (7e4, False, True), (float("inf"), False, False), (float("nan"), False, False)],
)
def test_finite_is_asked_of_the_weights_as_they_will_be_stored(value: float, half: bool, single: bool) -> None:
    model = Walk()
    averages = Averages(model, [0.5, 0.9])
    averages.state()["0.9"]["inner.weight"][2, 1] = value
    assert (averages.is_finite(torch.float16), averages.is_finite(torch.float32)) == (half, single)


# targets

SHARED = {"steps": 1000, "batch": 1, "learning_rate": 1.0}


def test_a_target_is_the_recursion_of_its_mu() -> None:
    def mu(k: int) -> float:
        return 0.5 + 0.04 * k

    model = Walk()
    target, wanted = Target(model, mu), model.values()
    assert target.network is not model and not any(p.requires_grad for p in target.network.parameters())
    for k in range(10):
        weights = model.step()
        target.update(k)
        wanted = {name: mu(k) * wanted[name] + (1 - mu(k)) * weights[name] for name in wanted}
        for name, tensor in target.network.state_dict().items():
            np.testing.assert_allclose(tensor.double().numpy(), wanted[name], rtol=1e-5, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_mu_the_target_is_the_student_itself() -> None:
    model = Walk()
    target = Target(model, None)
    assert target.network is model and target.state() == {}
    before = model.values()
    target.update(0)
    target.load({})
    assert all((model.values()[name] == value).all() for name, value in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_target_put_back_goes_on_as_if_nothing_had_happened() -> None:
    model = Walk()
    target = Target(model, lambda k: 0.9)
    model.step()
    target.update(0)
    saved = {name: tensor.clone() for name, tensor in target.state().items()}
    other = Target(model, lambda k: 0.9)
    other.load(saved)
    model.step()
    for one in (target, other):
        one.update(1)
    assert all(torch.equal(target.state()[name], tensor) for name, tensor in other.state().items())
    assert not any(torch.equal(saved[name], tensor) for name, tensor in other.state().items())


def test_every_phase_has_the_mu_of_its_paper() -> None:
    cd = mu_of(CdPhase(method="cd", mu=0.95, **SHARED))
    assert cd is not None and {cd(0), cd(500), cd(999)} == {0.95}
    # s0 2, s1 200, mu0 .95: the published values at 0, K/2 and K
    ct = mu_of(CtPhase(method="ct", s1=200, mu0=0.95, **{**SHARED, "steps": 800_000}))
    assert ct is not None
    assert [ct(0), ct(1), ct(400_000)] == pytest.approx([0.9025, 0.95, 0.999278], abs=5e-7)
    for phase in (
        CdPhase(method="cd", mu=0.0, **SHARED),
        CtPhase(method="ct", mu0=0.0, **SHARED),
        IctPhase(method="ict", **SHARED),
        EctPhase(method="ect", **SHARED),
        EdmPhase(method="edm", **SHARED),
    ):
        assert mu_of(phase) is None
