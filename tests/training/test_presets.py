"""Every preset: its size on the meta device, two steps of it made small, and the values that others published."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cm_runtime.checkpoints.native import read_checkpoint
from cm_runtime.errors import CheckpointError
from cm_runtime.networks.consistency import build
from cm_runtime.training import distances, lpips
from cm_runtime.training.config import PRESETS, TrainConfig, load_config, parse_config, preset_names
from cm_runtime.training.data.image_set import ImageSet
from cm_runtime.training.loop import model_config_of, train

# (image shape, classes of the data, parameters): the last two counts are of the published checkpoints
# cd_imagenet64_l2.pt and cd_bedroom256_l2.pt (openai/consistency_models)
SIZES = {
    "fashion-mnist": ((1, 28, 28), 10, 4_308_548),
    "cifar10": ((3, 32, 32), 10, 38_307_203),
    "imagenet64": ((3, 64, 64), 1000, 295_899_267),
    "lsun256": ((3, 256, 256), 0, 526_304_771),
}
SMALL = {"fashion-mnist": 28, "cifar10": 16, "imagenet64": 16, "lsun256": 64}
METHODS = ("edm", "cd", "ct", "ict", "ect")
NAMES = [f"{data}-{method}" for data in SIZES for method in METHODS]

CM = {"optimizer": "radam", "betas": (0.9, 0.999), "warmup": 0, "decay": 0.0, "clip": None, "weighting": "one"}
LPIPS = {"distance": "lpips"}
ICT = {
    **{"optimizer": "radam", "s0": 10, "s1": 1280, "P_mean": -1.1, "P_std": 2.0, "distance": "huber"},
    **{"huber_c": None, "weighting": "gap", "learning_rate": 1e-4},
}
ECT = {"P_mean": -1.1, "P_std": 2.0, "k": 8.0, "b": 1.0, "batch": 128, "first_stage": 0}
EMAS = (0.9999432189950708, 0.9999, 0.999)
LSUN_EMAS = (0.9999432189950708, 0.99994, 0.9999)

# name -> (dropout, keys of the phase, where they are published)
PUBLISHED: dict[str, tuple[float, dict[str, Any], str]] = {
    "cifar10-edm": (
        0.13,
        {"optimizer": "adam", "learning_rate": 1e-3, "batch": 512, "P_mean": -1.2, "P_std": 1.2},
        "arXiv 2206.00364, table 7; NVlabs/edm train.py",
    ),
    "cifar10-cd": (
        0.0,
        {**CM, **LPIPS, "learning_rate": 4e-4, "batch": 512, "N": 18, "mu": 0.0, "solver": "heun", "steps": 800_000}
        | {"ema": (0.9999,)},
        "arXiv 2303.01469, table 3; openai/consistency_models_cifar10 configs/cifar10_ve_cd.py, launch.sh",
    ),
    "cifar10-ct": (
        0.0,
        {**CM, **LPIPS, "learning_rate": 4e-4, "batch": 512, "s0": 2, "s1": 150, "mu0": 0.9, "steps": 800_000}
        | {"ema": (0.9999,)},
        "arXiv 2303.01469, table 3; openai/consistency_models_cifar10 configs/cifar10_ve_ct_adaptive.py, launch.sh",
    ),
    "cifar10-ict": (
        0.3,
        {**ICT, "batch": 1024, "steps": 400_000, "ema": (0.99993,)},
        "arXiv 2310.14189, section 3 and appendix",
    ),
    "cifar10-ect": (
        0.2,
        {**ECT, "optimizer": "radam", "learning_rate": 1e-4, "q": 2.0, "steps": 200_000, "stages": 8}
        | {"ema": (0.9999,)},
        "arXiv 2406.14548; locuslab/ect run_ecm.sh, ct_train.py: 25.6 million images, a stage each 250 x 12800",
    ),
    "imagenet64-edm": (
        0.1,
        {"optimizer": "radam", "learning_rate": 1e-4, "batch": 4096, "ema": EMAS, "P_mean": -1.2, "P_std": 1.2},
        "openai/consistency_models scripts/launch.sh; arXiv 2206.00364, table 7",
    ),
    "imagenet64-cd": (
        0.0,
        {**CM, **LPIPS, "learning_rate": 8e-6, "batch": 2048, "N": 40, "mu": 0.95, "solver": "heun"}
        | {"steps": 600_000, "ema": EMAS},
        "arXiv 2303.01469, table 3; openai/consistency_models scripts/launch.sh",
    ),
    "imagenet64-ct": (
        0.0,
        {**CM, **LPIPS, "learning_rate": 1e-4, "batch": 2048, "s0": 2, "s1": 200, "mu0": 0.95}
        | {"steps": 800_000, "ema": EMAS},
        "openai/consistency_models scripts/launch.sh",
    ),
    "imagenet64-ict": (
        0.2,
        {**ICT, "batch": 4096, "steps": 800_000, "ema": (0.99997,)},
        "arXiv 2310.14189, section 3 and appendix",
    ),
    "imagenet64-ect": (
        0.1,
        {**ECT, "optimizer": "adam", "q": 4.0, "steps": 100_000},
        "arXiv 2406.14548; locuslab/ect run_imgnet_ecm.sh: 12.8 million images",
    ),
    "lsun256-edm": (
        0.1,
        {"optimizer": "radam", "learning_rate": 1e-4, "batch": 256, "ema": EMAS, "P_mean": -1.2, "P_std": 1.2},
        "openai/consistency_models scripts/launch.sh; arXiv 2206.00364, table 7",
    ),
    "lsun256-cd": (
        0.0,
        {**CM, **LPIPS, "learning_rate": 1e-5, "batch": 256, "N": 40, "mu": 0.95, "solver": "heun"}
        | {"steps": 600_000, "ema": LSUN_EMAS},
        "arXiv 2303.01469, table 3; openai/consistency_models scripts/launch.sh",
    ),
    "lsun256-ct": (
        0.0,
        {**CM, **LPIPS, "learning_rate": 5e-5, "batch": 256, "s0": 2, "s1": 150, "mu0": 0.95}
        | {"steps": 1_000_000, "ema": LSUN_EMAS},
        "openai/consistency_models scripts/launch.sh",
    ),
}


def data_of(name: str, size: int | None = None, count: int = 4) -> ImageSet:
    """Random pictures of the preset's kind."""
    (channels, height, _), classes, _ = SIZES[name.rpartition("-")[0]]
    shape = (count, channels, size or height, size or height)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return ImageSet(images, np.arange(count) % classes if classes else None, classes, name)


def small(name: str, size: int, init: Path | None) -> TrainConfig:
    """The preset with few channels, for pictures of that size, everything else its own."""
    tree = tomllib.loads((PRESETS / f"{name}.toml").read_text())
    network = tree["network"]
    (_, full, _), _, _ = SIZES[name.rpartition("-")[0]]
    attention = [at * size // full for at in network["attention"]]
    mults = [min(mult, 2) for mult in network["channel_mult"]]
    network |= {"channels": 8, "head_channels": 8, "attention": attention, "channel_mult": mults, "res_blocks": 1}
    for phase in tree["phase"]:
        phase |= {"steps": 2, "batch": 4, "warmup": min(phase.get("warmup", 0), 1)}
        if "micro_batch" in phase:
            phase["micro_batch"] = 2
    if init is not None:
        tree["init"] = str(init)
    return parse_config({**tree, "device": "cpu", "tensorboard": False}, name)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """No pictures drawn at the end; LPIPS' place taken by l2."""
    from cm_runtime.training import loop

    monkeypatch.setattr(loop._Run, "_grid", lambda *_: None)
    monkeypatch.setattr(lpips, "load_lpips", lambda paths, device: distances.l2)


def test_there_are_these_presets() -> None:
    gaussian = {f"gaussian-{method}" for method in METHODS}  # trained in tests/benchmarks/test_gaussian.py
    assert set(preset_names()) == {*NAMES, *gaussian, "fashion-mnist", "fashion-mnist-refined", "fashion-mnist-tiny"}


@pytest.mark.parametrize(
    ("name", "parameters", "tuned"),
    [("fashion-mnist", 4_308_548, 1), ("fashion-mnist-refined", 4_308_548, 6), ("fashion-mnist-tiny", 707_716, 1)],
)
def test_presets_of_several_phases(name: str, parameters: int, tuned: int) -> None:
    config = load_config(name)
    model = build(model_config_of(config, data_of("fashion-mnist-edm", count=1)), "meta")
    assert [phase.method for phase in config.phase] == ["edm", *["ect"] * tuned]
    assert sum(weight.numel() for weight in model.parameters()) == parameters


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_at_full_size(name: str) -> None:
    config = load_config(name)
    data, _, method = name.rpartition("-")
    model = build(model_config_of(config, data_of(name, count=1)), "meta")
    shape, _, parameters = SIZES[data]
    assert [phase.method for phase in config.phase] == [method]
    assert model.config.image_shape == shape
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert model.config.network.num_classes == {"fashion-mnist": 10, "imagenet64": 1000}.get(data, 0)
    assert config.init == (f"runs/{data}-edm/ckpt.pt" if method in ("cd", "ect") else None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    dropout, keys, source = PUBLISHED[name]
    config = load_config(name)
    phase = config.phase[0].model_dump()
    assert {key: phase[key] for key in keys} == keys, source
    assert config.network.dropout == dropout, source
    assert config.sigma_data == 0.5


def test_spans_published_in_images() -> None:
    # arXiv 2206.00364, table 7: 200 million images, the rate rises over 10 million, half-life 0.5 million
    phase = load_config("cifar10-edm").phase[0]
    assert phase.steps * phase.batch == pytest.approx(200e6)
    assert phase.warmup * phase.batch == pytest.approx(10e6, rel=1e-4)
    assert phase.ema == pytest.approx((0.5 ** (512 / 500e3),), abs=1e-6)


@pytest.mark.process
@pytest.mark.quick("fashion-mnist")
@pytest.mark.parametrize("data", [*list(SIZES)[:3], pytest.param("lsun256", marks=pytest.mark.slow)])
def test_two_steps_of_each_made_small(data: str, tmp_path: Path) -> None:
    size = SMALL[data]
    pictures = data_of(f"{data}-edm", size)
    for method in METHODS:
        name = f"{data}-{method}"
        config = small(name, size, tmp_path / "edm" / "ckpt.pt" if method in ("cd", "ect") else None)
        found = read_checkpoint(train(config, pictures, tmp_path / method))
        assert found.training.method == method and found.training.steps == 2
        assert found.default_ema == f"{config.phase[0].ema[0]:g}"
        assert all(bool(torch.isfinite(weight).all()) for weight in found.ema[found.default_ema].values())


@pytest.mark.parametrize("name", ["cifar10-cd", "fashion-mnist-ect"])
def test_an_absent_start_is_one_clear_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(name, ["device=cpu"])
    with pytest.raises(CheckpointError, match=rf"runs/{name.rpartition('-')[0]}-edm/ckpt\.pt") as caught:
        train(config, data_of(name), tmp_path / "out")
    assert "\n" not in str(caught.value)
