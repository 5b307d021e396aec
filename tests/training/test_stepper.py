"""One step: what it computes by hand, and that micro-batches change nothing but memory."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cm_runtime.networks.consistency import ConsistencyModel, ModelConfig, build
from cm_runtime.networks.unet import UNetConfig
from cm_runtime.training.batches import Stream
from cm_runtime.training.config import EdmPhase, Phase, TrainConfig, parse_config
from cm_runtime.training.data.image_set import ImageSet
from cm_runtime.training.distributed import Workers
from cm_runtime.training.losses import loss_of
from cm_runtime.training.second_points import gaussian
from cm_runtime.training.stepper import Stepper, dtype_of, learning_rate_factor, optimizer_of

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
NETWORK = {"channels": 32, "channel_mult": (1,), "res_blocks": 1, "head_channels": 32, "dropout": 0.3}


def config_of(method: str, **keys: Any) -> TrainConfig:
    phase = {"method": method, "steps": 10, "batch": 7, "learning_rate": 0.01, **keys}
    return parse_config(
        {"data": {"source": "toy"}, "network": NETWORK, "init": "some.pt", "phase": [phase]}, "test_step"
    )


def parts(config: TrainConfig, randomised: Any) -> tuple[Stepper, Stream]:
    """A stepper of the first phase, its network not silent, and images for it."""
    phase = config.phase[0]
    network = UNetConfig(**NETWORK, image_size=4, image_channels=1, num_classes=3)
    model = randomised(build(ModelConfig(network=network, precond="edm", sigma_boundary=0.0))).to(dtype_of(phase))
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (30, 1, 4, 4)).astype(np.float32)
    stream = Stream(ImageSet(images, np.arange(30) % 3, 3, "toy"), seed=1, classes=True, flip=True, device=CPU)
    return Stepper(phase, config, model, gaussian(0.5), Workers(0, 1, CPU)), stream


def gradients_of(stepper: Stepper) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in stepper.model.named_parameters() if p.grad is not None}


@pytest.mark.covering(1)
@pytest.mark.process
@pytest.mark.parametrize("method", ["edm", "cd", "ct", "ict", "ect"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6, 7, 100])
def test_micro_batches_add_up_to_the_batch(method: str, micro_batch: int, randomised: Any) -> None:
    found = []
    for size in (None, micro_batch):
        stepper, stream = parts(config_of(method, precision="fp64", micro_batch=size), randomised)
        found.append((*stepper.gradients(3, stream, 25), gradients_of(stepper)))
    (loss, norm, whole), (other_loss, other_norm, summed) = found
    assert other_loss == pytest.approx(loss, rel=1e-12) and other_norm == pytest.approx(norm, rel=1e-12)
    assert whole.keys() == summed.keys() and norm > 0
    for name, gradient in whole.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-12, atol=1e-12 * norm)


def test_gradients_are_those_of_the_mean_loss_and_are_not_kept_from_step_to_step(randomised: Any) -> None:
    config = config_of("edm", precision="fp64")
    stepper, stream = parts(config, randomised)
    stepper.gradients(0, stream, 700)
    loss, norm = stepper.gradients(0, stream, 14)
    model = copy.deepcopy(stepper.model)
    mean = loss_of(config.phase[0], 0.5, None, CPU)(model, model, stream.batch(14, 7, torch.float64), 0).mean()
    wanted = torch.autograd.grad(mean, list(model.parameters()))
    assert loss == pytest.approx(mean.item(), rel=1e-12)
    for (_, found), gradient in zip(gradients_of(stepper).items(), wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-13)
    assert norm == pytest.approx(sum(g.square().sum().item() for g in wanted) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.999, 10.0])
def test_clip_shortens_gradients_and_the_norm_told_is_that_before(randomised: Any, share: float) -> None:
    stepper, stream = parts(config_of("edm", precision="fp64"), randomised)
    _, norm = stepper.gradients(0, stream, 0)
    plain = gradients_of(stepper)
    stepper, stream = parts(config_of("edm", precision="fp64", clip=share * norm), randomised)
    _, told = stepper.gradients(0, stream, 0)
    assert told == norm
    for name, gradient in gradients_of(stepper).items():  # torch adds 1e-6 to the norm it divides by
        torch.testing.assert_close(gradient, plain[name] * min(1.0, share), rtol=1e-5, atol=0)


@pytest.mark.parametrize("optimizer", ["adam", "radam"])
def test_weights_take_the_optimizers_step_by_hand(randomised: Any, optimizer: str) -> None:
    """Adam's first step (arXiv 1412.6980); RAdam's, which is plain descent with momentum (arXiv 1908.03265)."""
    keys = {"optimizer": optimizer, "betas": [0.8, 0.95], "warmup": 4, "precision": "fp64"}
    stepper, stream = parts(config_of("edm", **keys), randomised)
    before = {name: tensor.clone() for name, tensor in stepper.model.state_dict().items()}
    stepper.gradients(0, stream, 0)
    gradients = gradients_of(stepper)
    stepper.update(0)
    for name, after in stepper.model.state_dict().items():
        g = gradients[name]
        step = g / (g.abs() + 1e-8) if optimizer == "adam" else g
        torch.testing.assert_close(after, before[name] - 0.01 / 4 * step, rtol=1e-10, atol=1e-12)
    m = 0.2 * gradients[name]
    stepper.gradients(1, stream, 7)
    g, at = gradients_of(stepper)[name], stepper.model.state_dict()[name].clone()
    stepper.update(1)
    m = (0.8 * m + 0.2 * g) / (1 - 0.8**2)
    v = (0.95 * 0.05 * gradients[name] ** 2 + 0.05 * g**2) / (1 - 0.95**2)
    step = m / (v.sqrt() + 1e-8) if optimizer == "adam" else m
    torch.testing.assert_close(stepper.model.state_dict()[name], at - 0.01 / 2 * step, rtol=1e-10, atol=1e-12)


@pytest.mark.process
@pytest.mark.parametrize("method", ["cd", "ct", "ict"])
@pytest.mark.parametrize("optimizer", ["adam", "radam"])
def test_a_stepper_put_back_goes_on_to_the_bit(randomised: Any, method: str, optimizer: str) -> None:
    def advance(stepper: Stepper, stream: Stream, steps: range) -> None:
        for k in steps:
            stepper.gradients(k, stream, 7 * k)
            stepper.update(k)

    config = config_of(method, optimizer=optimizer)
    whole, stream = parts(config, randomised)
    advance(whole, stream, range(8))
    first, stream = parts(config, randomised)
    advance(first, stream, range(5))
    saved = copy.deepcopy(first.state())
    second, stream = parts(config, lambda model: model.eval())  # of other weights
    second.load(saved)
    advance(second, stream, range(5, 8))
    for part in ("model", "target"):
        for name, tensor in whole.state()[part].items():
            assert torch.equal(second.state()[part][name], tensor)
    assert bool(whole.state()["target"]) == (method != "ict")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("fp64", torch.float64)])
def test_precision_is_that_of_weights_and_what_the_network_sees(
    randomised: Any, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype
) -> None:
    seen = []
    forward = ConsistencyModel.forward

    def watched(self: ConsistencyModel, x: Tensor, *rest: Any) -> Tensor:
        D = forward(self, x, *rest)
        seen.append((x.dtype, D.dtype, self.F.out[2].weight.dtype))
        return D

    monkeypatch.setattr(ConsistencyModel, "forward", watched)
    stepper, stream = parts(config_of("ect", precision=precision), randomised)
    stepper.gradients(9, stream, 0)
    assert seen == [(dtype,) * 3] * 2


def test_bf16_is_autocast_over_float32_weights(randomised: Any) -> None:
    loss, norm = {}, {}
    for precision in ("fp32", "bf16"):
        stepper, stream = parts(config_of("edm", precision=precision), randomised)
        loss[precision], norm[precision] = stepper.gradients(0, stream, 0)
        assert all(p.dtype == torch.float32 for p in stepper.model.parameters())
    assert loss["bf16"] != loss["fp32"] and loss["bf16"] == pytest.approx(loss["fp32"], rel=0.05)
    assert norm["bf16"] == pytest.approx(norm["fp32"], rel=0.1)


def test_optimizers_are_given_their_keys() -> None:
    model = torch.nn.Linear(2, 2)
    for name, kind in (("adam", torch.optim.Adam), ("radam", torch.optim.RAdam)):
        phase: Phase = config_of("edm", optimizer=name, betas=[0.3, 0.6]).phase[0]
        found = optimizer_of(phase, model)  # type: ignore[arg-type]
        assert type(found) is kind and found.defaults["betas"] == (0.3, 0.6) and found.defaults["lr"] == 0.01


@pytest.mark.parametrize(
    ("keys", "factors"),
    [
        ({}, [1.0] * 10),
        ({"warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"decay": 0.5}, [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"decay": 1.0}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"warmup": 2, "decay": 0.4}, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"warmup": 20}, [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5]),
        ({"warmup": 5, "decay": 1.0}, [0.2, 0.36, 0.48, 0.56, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_learning_rate_factor(keys: dict[str, Any], factors: list[float]) -> None:
    phase = EdmPhase(method="edm", steps=10, batch=1, learning_rate=1.0, **keys)
    assert [learning_rate_factor(phase, step) for step in range(10)] == pytest.approx(factors)
