"""Fine-tuning: runs that start from other tools' checkpoints, an EDM teacher of OpenAI's or a model of diffusers'."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import GREY, IMAGENET, save_pipeline
from run_folders import pt

import cm_runtime as cm
from cm_runtime.checkpoints import openai
from cm_runtime.errors import CheckpointError, CmRuntimeError, TrainingError
from cm_runtime.networks.unet import UNet, UNetConfig
from cm_runtime.training import loop
from cm_runtime.training.config import TrainConfig, parse_config
from cm_runtime.training.data.image_set import ImageSet
from cm_runtime.training.loop import train
from cm_runtime.training.stepper import Stepper

pytestmark = pytest.mark.usefixtures("one_thread", "quick_grids")

NETWORK = UNetConfig(
    image_size=8,
    image_channels=1,
    num_classes=3,
    channels=32,
    channel_mult=(1, 2),
    res_blocks=1,
    head_channels=32,
    resample="resblock",
)


def config(init: Path, method: str, **top: Any) -> TrainConfig:
    phase = {"method": method, "steps": 2, "batch": 3, "learning_rate": 1e-3, "ema": [0.5]}
    return parse_config({"data": {"source": "toy"}, "init": str(init), "phase": [phase], **top}, "imported")


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A flat state dict under the name of a published EDM teacher."""
    torch.manual_seed(0)
    weights = {name: tensor + torch.randn_like(tensor) * 0.02 for name, tensor in UNet(NETWORK).state_dict().items()}
    torch.save(weights, tmp_path / "edm_imagenet64_ema.pt")
    return tmp_path / "edm_imagenet64_ema.pt"


@pytest.mark.process
@pytest.mark.parametrize("method", ["cd", "ect"])
def test_a_run_starts_from_a_teacher_of_openais(
    method: str, teacher: Path, tmp_path: Path, toy_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Any, Any]] = []
    stepper = loop.Stepper

    def remembering(phase: Any, run: Any, model: Any, taught: Any, workers: Any) -> Stepper:
        made.append(({name: t.clone() for name, t in model.state_dict().items()}, taught))
        return stepper(phase, run, model, taught, workers)

    monkeypatch.setattr(loop, "Stepper", remembering)
    told = {"init_head_channels": 32, "init_image_size": 8}
    train(config(teacher, method, precond="boundary", **told), toy_images, tmp_path / "run")
    student, taught = made[0]
    weights = torch.load(teacher, weights_only=True)
    assert all(torch.equal(student[f"F.{name}"], tensor) for name, tensor in weights.items())
    if method == "cd":
        assert taught.config.precond == "edm" and taught.config.sigma_boundary == 0
        assert all(torch.equal(taught.state_dict()[f"F.{name}"], tensor) for name, tensor in weights.items())
    found = cm.load_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert found.config.network == NETWORK and found.config.precond == "boundary"
    assert any(not torch.equal(found.ema["0.5"][f"F.{name}"], tensor) for name, tensor in weights.items())
    written = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert written["network"]["channels"] == 32  # the folder knows the network, whatever becomes of init
    before = pt(tmp_path / "run" / "ckpt.pt")
    train(config(teacher, method, precond="boundary", **told), toy_images, tmp_path / "run", resume=True)
    after = pt(tmp_path / "run" / "ckpt.pt")["ema"]["0.5"]
    assert all(torch.equal(tensor, after[name]) for name, tensor in before["ema"]["0.5"].items())


@pytest.mark.process
def test_a_run_starts_from_a_folder_of_diffusers(tmp_path: Path, toy_images: ImageSet) -> None:
    folder = save_pipeline(tmp_path / "pipe", {**GREY, "sample_size": 8, "num_class_embeds": 3})
    train(config(folder, "ect", precond="boundary"), toy_images, tmp_path / "run")
    found, start = cm.load_checkpoint(tmp_path / "run" / "ckpt.pt"), cm.load_checkpoint(folder)
    assert found.config == start.config
    assert found.training.config["init"] == start.sha256


@pytest.mark.process
def test_what_the_file_does_not_say_is_told(teacher: Path, tmp_path: Path, toy_images: ImageSet) -> None:
    renamed = teacher.rename(tmp_path / "mine.pt")
    told = {"init_head_channels": 32, "init_image_size": 8}
    with pytest.raises(CheckpointError, match="does not say its preconditioning form"):
        train(config(renamed, "ect", **told), toy_images, tmp_path / "run")
    train(config(renamed, "ect", **told, init_precond="edm"), toy_images, tmp_path / "run")
    heads = {**told, "init_precond": "edm", "init_head_channels": 16}
    train(config(renamed, "ect", **heads), toy_images, tmp_path / "heads")
    assert cm.load_checkpoint(tmp_path / "heads" / "ckpt.pt").config.network.head_channels == 16
    with pytest.raises(CmRuntimeError, match="do not split into heads of 24"):
        train(config(renamed, "ect", **{**heads, "init_head_channels": 24}), toy_images, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_another_network_than_the_images_need_is_refused_by_name(tmp_path: Path, toy_images: ImageSet) -> None:
    folder = save_pipeline(tmp_path / "pipe", IMAGENET)
    with pytest.raises(TrainingError, match="pipe is of another network: image_size 16, not 8"):
        train(config(folder, "ect"), toy_images, tmp_path / "run")


@pytest.mark.parametrize("preset", ["imagenet64-cd", "imagenet64-ect", "lsun256-cd", "lsun256-ect"])
def test_presets_have_the_networks_of_the_published_teachers(preset: str) -> None:
    """So `cm-runtime train imagenet64-cd --set init=edm_imagenet64_ema.pt` starts; dropout has no weights."""
    from cm_runtime.training.config import load_config

    network = load_config(preset).network
    assert network is not None
    ends = {"imagenet64": {"image_size": 64, "num_classes": 1000}, "lsun256": {"image_size": 256}}[preset.split("-")[0]]
    config = UNetConfig(**network.model_dump(), image_channels=3, **ends)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in UNet(config).state_dict().items()}
    parameters = {"imagenet64": 295_899_267, "lsun256": 526_304_771}[preset.split("-")[0]]
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters
    assert openai.infer(shapes).model_dump() | {"dropout": network.dropout} == config.model_dump()
