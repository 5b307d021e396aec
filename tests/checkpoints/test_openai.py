"""OpenAI's flat state dicts: the architecture read off them, the same f as diffusers has of the same tensors."""

from __future__ import annotations

import io
import pickle
import re
import resource
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import IMAGENET, LSUN, SCRIPT, Bomb, f_of, unet2d
from torch import Tensor

import cm_runtime as cm
from cm_runtime.checkpoints import openai
from cm_runtime.checkpoints.diffusers_tensors import to_theirs
from cm_runtime.checkpoints.native import save_checkpoint
from cm_runtime.checkpoints.published import MODELS
from cm_runtime.cli import main
from cm_runtime.errors import CmRuntimeError, RequestError
from cm_runtime.networks.unet import UNet, UNetConfig

PUBLISHED = {
    "imagenet64": UNetConfig(
        image_size=64,
        image_channels=3,
        num_classes=1000,
        channels=192,
        channel_mult=(1, 2, 3, 4),
        res_blocks=3,
        attention=(32, 16, 8),
        resample="resblock",
    ),
    "lsun256": UNetConfig(
        image_size=256,
        image_channels=3,
        channels=256,
        channel_mult=(1, 1, 2, 2, 4, 4),
        res_blocks=2,
        attention=(32, 16, 8),
        scale_shift=False,
        resample="resblock",
    ),
}
TINY = UNetConfig(
    image_size=32,
    image_channels=3,
    num_classes=7,
    channels=32,
    channel_mult=(1, 2, 3),
    res_blocks=1,
    attention=(16, 8),
    head_channels=16,
    resample="resblock",
)


def weights_of(config: UNetConfig, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with the names and shapes that the network has in OpenAI's code (tests/networks), all heard."""
    torch.manual_seed(seed)
    return {name: tensor + torch.randn_like(tensor) * 0.02 for name, tensor in UNet(config).state_dict().items()}


def saved(folder: Path, weights: Any, name: str = "model.pt") -> Path:
    torch.save(weights, folder / name)
    return folder / name


def refusal(path: Path, **told: Any) -> str:
    with pytest.raises(CmRuntimeError) as refused:
        cm.load_checkpoint(path, **told)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- the architecture -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tensors"), [("imagenet64", 541), ("lsun256", 566)])
def test_the_published_networks_are_read_off_their_shapes(name: str, tensors: int) -> None:
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in UNet(PUBLISHED[name]).state_dict().items()}
    assert len(shapes) == tensors
    assert openai.infer(shapes) == PUBLISHED[name]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 0, "scale_shift": False},
        {"attention": ()},
        {"attention": (32,), "head_channels": 32},
        {"middle_attention": False, "res_blocks": 3},
        {"resample": "conv", "image_channels": 1},
        {"resample": "conv", "attention": (32, 16, 8), "channel_mult": (2, 1, 1)},
        {"channel_mult": (1,), "image_size": 8, "attention": (), "resample": "conv"},
        {"channel_mult": (1, 1, 2, 2), "image_size": 64, "attention": (64, 8)},
    ],
    ids=str,
)
def test_other_networks_are_read_off_their_shapes(changes: dict[str, Any]) -> None:
    config = UNetConfig(**{**TINY.model_dump(), **changes})
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in UNet(config).state_dict().items()}
    found = openai.infer(shapes, config.head_channels)
    if len(config.channel_mult) == 1:  # nothing is resampled
        found = found.model_copy(update={"resample": config.resample})
    assert found == config


@pytest.mark.process
def test_what_shapes_do_not_tell_is_told(tmp_path: Path) -> None:
    path = saved(tmp_path, weights_of(TINY))
    told = {"precond": "boundary", "head_channels": 32}
    assert cm.load_checkpoint(path, precond="boundary", head_channels=16).config.network == TINY
    assert cm.load_checkpoint(path, **told).config.network.head_channels == 32
    larger = cm.load_checkpoint(path, **told, image_size=64).config.network
    assert (larger.image_size, larger.attention) == (64, (32, 16))
    assert "do not split into heads of 24" in refusal(path, precond="boundary", head_channels=24)
    assert "head_channels: " in refusal(path, precond="boundary", head_channels=0)
    assert "image_size: " in refusal(path, **told, image_size=0)
    assert "image_size 30 must be a multiple of 4" in refusal(path, **told, image_size=30)


# --- the form, and what the published names say -----------------------------------------------------------------------


@pytest.mark.process
def test_the_form_is_decided_by_the_name_or_told_and_never_guessed(tmp_path: Path) -> None:
    weights = weights_of(TINY)
    unnamed = saved(tmp_path, weights, "model.pt")
    line = refusal(unnamed, head_channels=16)
    assert "does not say its preconditioning form: export it with --precond boundary" in line and "--model-name" in line
    for form, boundary in (("boundary", 0.002), ("edm", 0.0), ("piecewise", 0.002)):
        config = cm.load_checkpoint(unnamed, precond=form, head_channels=16).config
        assert (config.precond, config.sigma_boundary) == (form, boundary)
        assert (config.sigma_min, config.sigma_max, config.sigma_data) == (0.002, 80.0, 0.5)
    for name, known in MODELS.items():
        path = saved(tmp_path, weights, f"{name}.pt")
        checkpoint = cm.load_checkpoint(path, head_channels=16)
        assert checkpoint.config.precond == ("edm" if name.startswith("edm") else "boundary")
        assert checkpoint.manifest().is_teacher == name.startswith("edm")
        renamed = cm.load_checkpoint(unnamed, head_channels=16, model_name=name)
        assert (renamed.config, renamed.sigmas, renamed.training) == (
            checkpoint.config,
            checkpoint.sigmas,
            checkpoint.training,
        )
        wrong = "boundary" if known.precond == "edm" else "edm"
        assert f"has the {known.precond} form, not {wrong}" in refusal(path, precond=wrong, head_channels=16)
    assert "there is no published model 'cd_imagenet64'" in refusal(unnamed, model_name="cd_imagenet64")
    similar = saved(tmp_path, weights, "cd_imagenet64_l2_mine.pt")
    assert "does not say its preconditioning form" in refusal(similar, head_channels=16)


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "sigma"),
    [
        ("cd_imagenet64_l2", 1.382368),
        ("cd_imagenet64_lpips", 1.382368),
        ("ct_imagenet64", 1.912844),
        ("cd_bedroom256_l2", 3.519699),
        ("cd_bedroom256_lpips", 4.365562),
        ("ct_bedroom256", 3.991219),
        ("cd_cat256_l2", 3.519699),
        ("cd_cat256_lpips", 4.365562),
        ("ct_cat256", 5.248503),
    ],
)
def test_two_steps_take_the_published_level(name: str, sigma: float, tmp_path: Path) -> None:
    checkpoint = cm.load_checkpoint(saved(tmp_path, weights_of(TINY), f"{name}.pt"), head_channels=16)
    assert checkpoint.manifest().sigmas == {2: (80.0, pytest.approx(sigma, rel=1e-6))}
    save_checkpoint(checkpoint, tmp_path / "ours.pt")
    again = cm.load_checkpoint(tmp_path / "ours.pt")
    assert (again.manifest().sigmas, again.config) == (checkpoint.manifest().sigmas, checkpoint.config)


# --- the same f -------------------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("name", ["imagenet", "lsun", "convolutions"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_f_is_what_diffusers_computes_from_the_same_tensors(name: str, suffix: str, tmp_path: Path) -> None:
    """diffusers' own model takes the converted tensors strictly, and must then agree."""
    from diffusers import CMStochasticIterativeScheduler
    from safetensors.torch import save_file

    theirs_config = {"imagenet": IMAGENET, "lsun": LSUN, "convolutions": {**SCRIPT, "sample_size": 16}}[name]
    config = {
        "imagenet": {**TINY.model_dump(), "image_size": 16, "attention": (8, 4)},
        "lsun": {
            **TINY.model_dump(),
            "image_size": 16,
            "attention": (8, 4),
            "channel_mult": (1, 1, 2),
            "res_blocks": 2,
            "scale_shift": False,
            "num_classes": 0,
        },
        "convolutions": {
            **TINY.model_dump(),
            "image_size": 16,
            "attention": (8,),
            "channel_mult": (1, 2),
            "res_blocks": 2,
            "scale_shift": False,
            "num_classes": 0,
            "head_channels": 8,
            "resample": "conv",
        },
    }[name]
    network = UNetConfig(**config)
    weights = weights_of(network)
    path = tmp_path / f"cd_imagenet64_l2{suffix}"
    torch.save(weights, path) if suffix == ".pt" else save_file(weights, path)
    checkpoint = cm.load_checkpoint(path, head_channels=network.head_channels, image_size=16)
    assert checkpoint.config.network == network
    ours, theirs, scheduler = checkpoint.model(), unet2d(theirs_config), CMStochasticIterativeScheduler()
    theirs.load_state_dict(to_theirs(weights, network), strict=True)
    label = torch.tensor([0, 6, 3]) if network.num_classes else None
    for sigma in (0.002, 0.0021, 0.1, 1.382368, 80.0):
        x = torch.randn(3, 3, 16, 16) * (sigma**2 + 0.25) ** 0.5
        with torch.no_grad():
            found = ours(x, torch.full((3,), sigma), label)
        torch.testing.assert_close(found, f_of(theirs, scheduler, x, sigma, label), rtol=0, atol=1e-5)


def test_half_precision_torsos_are_read(tmp_path: Path) -> None:
    """OpenAI's fp16 halves the torso's convolutions alone; f is computed in float32."""
    weights = weights_of(TINY)
    halved = {
        name: tensor.half() if tensor.dim() == 4 and "block" in name and name != "input_blocks.0.0.weight" else tensor
        for name, tensor in weights.items()
    }
    assert {tensor.dtype for tensor in halved.values()} == {torch.float16, torch.float32}
    path = saved(tmp_path, halved)
    model = cm.load_checkpoint(path, precond="boundary", head_channels=16).model()
    assert all(
        torch.equal(tensor, halved[name.removeprefix("F.")].float()) for name, tensor in model.state_dict().items()
    )


@pytest.mark.process
def test_round_trip_through_diffusers_is_bit_identical(tmp_path: Path) -> None:
    path = saved(tmp_path, weights_of(TINY), "ct_imagenet64.pt")
    before = cm.load_checkpoint(path, head_channels=16)
    cm.export.diffusers(before, tmp_path / "ct_imagenet64")
    after = cm.load_checkpoint(tmp_path / "ct_imagenet64")
    assert (after.config, after.sigmas) == (before.config, before.sigmas)
    assert after.training.config["num_train_timesteps"] == 201
    assert list(after.ema["imported"]) != [] and all(
        torch.equal(after.ema["imported"][name], tensor) for name, tensor in before.ema["imported"].items()
    )


# --- files that are wrong ---------------------------------------------------------------------------------------------


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if name not in names}


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a latent diffusion checkpoint": (
        lambda w: {"state_dict": {f"model.diffusion_model.{name}": tensor for name, tensor in w.items()}},
        "neither a cm-runtime checkpoint nor a state dict of OpenAI's: its state_dict is a dict",
    ),
    "its state dict alone": (
        lambda w: {f"model.diffusion_model.{name}": tensor for name, tensor in w.items()},
        "it has no time_embed.0.weight, but model.diffusion_model.",
    ),
    "a text encoder": (
        lambda w: {"text_model.embeddings.token_embedding.weight": torch.zeros(7, 3)},
        "but text_model.embeddings.token_embedding.weight",
    ),
    "three keys": (lambda w: {"a": 1, "b": 2, "c": 3}, "its a is a int, where tensors by name should be"),
    "three tensors": (lambda w: dict.fromkeys("abc", torch.zeros(3)), "it has no time_embed.0.weight, but a"),
    "nothing": (lambda w: {}, "but nothing at all"),
    "a list": (lambda w: list(w.values()), "it holds a list"),
    "a tensor": (lambda w: torch.zeros(3), "it holds a Tensor"),
    "a missing tensor": (without("out.2.bias"), "missing out.2.bias"),
    "a missing block": (without("output_blocks.0.0.in_layers.0.weight"), "output_blocks.0.0.in_layers.0.weight"),
    "a missing middle": (without("middle_block.0.in_layers.0.weight"), "missing middle_block.0.in_layers.0.weight"),
    "an extra tensor": (lambda w: {**w, "input_blocks.9.9.weight": torch.zeros(3)}, "unexpected input_blocks.9.9"),
    "a misshapen tensor": (
        lambda w: {**w, "time_embed.2.weight": torch.zeros(128, 127)},
        "time_embed.2.weight is (128, 127) and should be (128, 128)",
    ),
    "a flat convolution": (
        lambda w: {**w, "input_blocks.0.0.weight": torch.zeros(32)},
        "input_blocks.0.0.weight is (32,), where 4 dimensions should be",
    ),
    "an embedding without width": (
        lambda w: {**w, "label_emb.weight": torch.zeros(3)},
        "label_emb.weight is (3,), where 2 dimensions should be",
    ),
    "no channels": (lambda w: {**w, "time_embed.0.weight": torch.zeros(3, 0)}, "it has no output_blocks"),
    "learned variances": (
        lambda w: {**w, "out.2.weight": torch.zeros(6, 32, 3, 3), "out.2.bias": torch.zeros(6)},
        "out.2.weight is (6, 32, 3, 3) and should be (3, 32, 3, 3)",
    ),
    "a guided-diffusion network": (
        lambda w: {name: t[..., 0] if "qkv.weight" in name else t for name, t in w.items()},
        "this is a guided-diffusion network, which orders its attention heads otherwise",
    ),
    "a level of odd width": (
        lambda w: {**w, "output_blocks.0.0.out_layers.3.weight": torch.zeros(80, 80, 3, 3)},
        "its levels have [32, 64, 80] channels, and 80 is no multiple of 32",
    ),
    "unequal levels": (
        lambda w: {**w, "output_blocks.4.1.in_layers.0.weight": torch.zeros(3)},
        "its 6 output blocks, resampled after [1, 3, 4], are no equal levels",
    ),
    "not a number": (
        lambda w: {**w, "out.2.bias": torch.tensor([0.0, float("nan"), 1.0])},
        "out.2.bias is not finite",
    ),
    "whole numbers": (lambda w: {**w, "out.2.bias": torch.zeros(3, dtype=torch.int64)}, "out.2.bias is not a dense"),
}


@pytest.mark.process
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, complaint = WRONG[name]
    path = saved(tmp_path, make(weights_of(TINY)), "cd_imagenet64_l2.pt")
    line = refusal(path, head_channels=16)
    assert complaint in line and str(path) in line
    assert run("export", path, "--head-channels", 16) == 1
    assert capsys.readouterr().err == f"error: {line}\n"
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


@pytest.mark.process
def test_damaged_and_hostile_files_are_one_line(tmp_path: Path) -> None:
    path = saved(tmp_path, weights_of(TINY), "cd_imagenet64_l2.pt")
    whole, canary = path.read_bytes(), tmp_path / "executed"
    cm.load_checkpoint(path, head_channels=16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            with new.open(entry.filename, "w", force_zip64=True) as file:
                file.write(old.read(entry))
        with new.open("cd_imagenet64_l2/data/999", "w", force_zip64=True) as file:
            for _ in range(32):
                file.write(bytes(10 << 20))  # as little of 10 GB would be left as of this
    assert re.search(r"it claims 3\d{8} bytes of content", refusal(tmp_path / "bomb.pt"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    path.write_bytes(whole[: len(whole) // 2])
    assert "is not a torch checkpoint, or is damaged" in refusal(path)
    for content in (pickle.dumps(Bomb(canary)), pickle.dumps({"time_embed.0.weight": Bomb(canary)})):
        path.write_bytes(content)
        assert "is a pickle that could run code" in refusal(path)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"time_embed.0.weight": Bomb(canary)}, buffer)
    path.write_bytes(buffer.getvalue())
    assert "is a pickle that could run code" in refusal(path)
    assert not canary.exists()
    assert "no such file" in refusal(tmp_path / "none.pt")


@pytest.mark.process
def test_our_own_checkpoints_say_everything_themselves(tmp_path: Path) -> None:
    checkpoint = cm.load_checkpoint(saved(tmp_path, weights_of(TINY)), precond="edm", head_channels=16)
    save_checkpoint(checkpoint, tmp_path / "ours.pt")
    told = {"precond": "edm", "head_channels": 16, "image_size": 32, "model_name": "ct_cat256"}
    for option, value in told.items():
        with pytest.raises(RequestError, match=f"leave --{option.replace('_', '-')} out"):
            cm.load_checkpoint(tmp_path / "ours.pt", **{option: value})
    assert cm.load_checkpoint(tmp_path / "ours.pt").config == checkpoint.config


# --- what diffusers cannot express ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "model", "complaint"),
    [
        ({"patch": 2, "attention": (16, 8), "image_size": 64}, {}, "cannot unshuffle pixels, as patch 2 does"),
        ({"channel_mult": (2, 1, 1)}, {}, "this network's channel_mult begins with 2"),
        ({}, {"precond": "edm", "sigma_boundary": 0.0}, "has the boundary form alone, and this model the edm form"),
        ({}, {"precond": "piecewise"}, "and this model the piecewise form"),
        ({}, {"sigma_boundary": 0.01}, "has its boundary at sigma_min, and this model's are 0.01 and 0.002"),
        (
            {"channels": 24, "head_channels": 24},
            {},
            r"one norm_num_groups, and this network's normalisations have \[8, 16\]",
        ),
    ],
    ids=str,
)
def test_what_diffusers_cannot_express_is_refused_with_the_reason(
    network: dict[str, Any], model: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    from cm_runtime.checkpoints.native import Checkpoint
    from cm_runtime.errors import CheckpointError
    from cm_runtime.manifest import TrainingSummary
    from cm_runtime.networks.consistency import ModelConfig, build

    shape = UNetConfig(**{**TINY.model_dump(), **network})
    config = ModelConfig(**{"network": shape, "precond": "boundary", "sigma_boundary": 0.002, **model})
    weights = build(config).state_dict()
    checkpoint = Checkpoint(config, "0.9", {"0.9": weights}, TrainingSummary(method="ct", data="toy"))
    with pytest.raises(CheckpointError, match=complaint):
        cm.export.diffusers(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- the commands -----------------------------------------------------------------------------------------------------


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_a_published_file_is_exported_without_a_word_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`cm-runtime export cd_imagenet64_l2.pt` for a network whose heads have 64 channels, as all published ones."""
    config = UNetConfig(**{**TINY.model_dump(), "channels": 64, "head_channels": 64, "channel_mult": (1, 1, 1)})
    path = saved(tmp_path, weights_of(config), "cd_imagenet64_l2.pt")
    assert run("export", path) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'cd_imagenet64_l2.onnx'}" in out
    model = cm.load(tmp_path / "cd_imagenet64_l2.onnx")
    assert model.manifest.sigmas[2][1] == pytest.approx(1.382368)
    images = cm.sample(model, count=3, steps=2)
    assert images.shape == (3, 32, 32, 3)
    assert (images == cm.sample(model, count=3, sigmas=model.manifest.sigmas[2])).all()


@pytest.mark.process
def test_a_teacher_is_exported_and_not_sampled_in_a_few_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, weights_of(TINY), "edm_imagenet64_ema.pt")
    assert run("export", path, "--head-channels", 16) == 0
    capsys.readouterr()
    assert run("sample", tmp_path / "edm_imagenet64_ema.onnx", "--batch", 3) == 1
    assert "EDM teacher" in capsys.readouterr().err
