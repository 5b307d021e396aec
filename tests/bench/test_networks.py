"""bench/networks.py: the standing networks are the published sizes, and no layer of them is silent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cm_runtime.bench import networks
from cm_runtime.checkpoints.load import load_checkpoint
from cm_runtime.checkpoints.native import read_checkpoint
from cm_runtime.errors import OutputError, RequestError
from cm_runtime.networks.consistency import build
from cm_runtime.training.config import load_config


@pytest.mark.parametrize(("name", "parameters"), [("cifar32", 38_307_203), ("imagenet64", 295_899_267)])
def test_their_parameters_are_counted(name: str, parameters: int) -> None:
    config = networks.config(name)
    model = build(config, "meta")
    assert sum(tensor.numel() for tensor in model.parameters()) == parameters
    assert (config.precond, config.sigma_boundary, config.sigma_min) == ("boundary", 0.002, 0.002)


@pytest.mark.parametrize(("name", "preset"), [("cifar32", "cifar10-cd"), ("imagenet64", "imagenet64-cd")])
def test_they_are_those_that_the_presets_train(name: str, preset: str) -> None:
    shape = load_config(preset).network
    assert shape is not None
    network = networks.config(name).network
    assert network.model_dump(include=set(shape.model_dump())) == shape.model_dump()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """cifar32 of the same depth with few channels."""
    few = {**networks.NETWORKS["cifar32"], "channels": 32, "head_channels": 32}
    monkeypatch.setitem(networks.NETWORKS, "cifar32", few)


def test_a_network_is_made_once_and_found_again(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = networks.standing_checkpoint("cifar32", tmp_path / "cache" / "here")
    assert [each.name for each in path.parent.iterdir()] == ["cifar32-seed0-1.pt"]
    before = path.stat()
    monkeypatch.setattr(networks, "random_checkpoint", pytest.fail)
    assert networks.standing_checkpoint("cifar32", path.parent) == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.process
def test_the_seed_decides_the_weights(small: None, tmp_path: Path) -> None:
    one, other = (networks.standing_checkpoint("cifar32", tmp_path / name) for name in "ab")
    assert one.read_bytes() == other.read_bytes()
    weights, others = (networks.random_checkpoint(networks.config("cifar32"), seed).ema["0"] for seed in (0, 1))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read_checkpoint(one).ema["0"].items())
    assert not any(torch.equal(tensor, others[name]) for name, tensor in weights.items())


@pytest.mark.process
def test_no_layer_is_silent_and_outputs_are_of_order_one(small: None, tmp_path: Path) -> None:
    model = load_checkpoint(networks.standing_checkpoint("cifar32", tmp_path)).model()
    generator = torch.Generator().manual_seed(0)
    for tensor in model.parameters():
        assert 0.02 < tensor.std() < 1 and (tensor != 0).all()
    for sigma in (80.0, 2.5, 0.1):
        x = torch.randn(2, 3, 32, 32, generator=generator) * (sigma**2 + 0.25) ** 0.5
        F = model.network(x, torch.full((2,), sigma))
        assert 0.3 < F.std() < 2
        assert (F[0] - F[1]).std() > 0.1
    for tensor in model.parameters():  # each has a share in the outputs
        tensor.requires_grad_(True)
    model(x, torch.full((2,), 2.5)).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in model.parameters())


def test_what_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no standing network 'cifar'; they are cifar32, imagenet64"):
        networks.standing_checkpoint("cifar", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made"):
        networks.standing_checkpoint("cifar32", tmp_path / "file")
