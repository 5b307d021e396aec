"""Averages against the recursion written out in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from cm_runtime.training.ema import Averages

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
