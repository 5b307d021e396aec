"""benchmarks/imported.py: what it measures is real, and nothing is timed that was not just found equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import imported  # type: ignore[import-not-found]

import cm_runtime as cm
from cm_runtime.checkpoints.diffusers_options import network_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder that a run leaves, and its figures."""
    work = tmp_path_factory.mktemp("imported")
    words = ["--network", "tiny", "--batch", "1", "3", "--steps", "1", "2", "--rounds", "2", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        for module in (
            "pipelines.consistency_models.pipeline_consistency_models",
            "schedulers.scheduling_consistency_models",
        ):
            name = f"diffusers.{module}"
            patch.setattr(imported._package(name), "randn_tensor", imported._package(name).randn_tensor)
        status = imported.main([*words, "--work", str(work), "--json", str(work / "figures.json")])
    figures = json.loads((work / "figures.json").read_text())
    assert status == (0 if all(case["ratio"] >= 1 for case in figures["cases"]) else 1)
    return work, figures


def test_every_case_has_its_times_and_its_agreement(measured: tuple[Path, dict[str, Any]]) -> None:
    _, figures = measured
    assert [(case["batch"], case["steps"]) for case in figures["cases"]] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    for case in figures["cases"]:
        assert 0 < case["max_abs"] <= 1e-3
        ratios = [there / here for here, there in zip(case["seconds"]["ours"], case["seconds"]["theirs"], strict=True)]
        assert len(ratios) == 2 and case["ratio"] == pytest.approx(sum(ratios) / 2)
        assert case["ratio_range"] == [min(ratios), max(ratios)]
    assert figures["processor"] and figures["diffusers"]


def test_commands_are_measured_from_outside(measured: tuple[Path, dict[str, Any]]) -> None:
    work, figures = measured
    assert list(figures["commands"]) == ["export", "sample --steps 2 --batch 1", "sample --steps 2 --batch 3"]
    export, small, _ = figures["commands"].values()
    assert export["peak_bytes"] > 2 * small["peak_bytes"] > 2 * 30e6  # torch is in one and not in the other
    assert all(0 < cost["seconds"] < 120 for cost in (export, small))
    assert cm.load(work / "model.onnx").manifest.image_shape == (3, 16, 16)


def test_images_that_differ_are_not_timed(measured: tuple[Path, dict[str, Any]]) -> None:
    work, _ = measured
    with pytest.raises(SystemExit, match=r"the images are .* apart; nothing is timed"):
        imported.compare(cm.load(work / "model.onnx"), lambda z, _: np.zeros((1, 16, 16, 3)), 1, 1, 2)


def test_a_command_that_fails_ends_the_run() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        imported.command("export", "nothing.pt")


@pytest.mark.parametrize(("name", "parameters"), [("imagenet64", 295_899_267), ("lsun256", 526_304_771)])
def test_the_networks_are_the_published_ones(name: str, parameters: int) -> None:
    import torch

    from cm_runtime.networks.unet import UNet

    with torch.device("meta"):
        network = UNet(network_of(imported.NETWORKS[name]))
    assert sum(tensor.numel() for tensor in network.parameters()) == parameters
