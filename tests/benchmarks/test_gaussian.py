"""benchmarks/gaussian.py: its closed forms against known answers, its verdicts, and training itself held to them."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from cm_runtime import cli
from cm_runtime.checkpoints.native import read_checkpoint
from cm_runtime.training.config import Phase, load_config

ROOT = Path(__file__).resolve().parents[2]
PRESETS = {"edm": ["edm"], "cd": ["cd"], "ct": ["ct"], "ict": ["ict"], "ect": ["edm", "ect"]}


def _import() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_gaussian", ROOT / "benchmarks" / "gaussian.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gaussian = _import()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's rounding depends on its threads, and so small a network gains nothing from them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def last_phase(method: str, *settings: str) -> Phase:
    return load_config(f"gaussian-{method}", settings).phase[-1]


# The closed forms


def test_f_solves_its_differential_equation_and_is_x_at_eps() -> None:
    s, t, h = 0.3, 1.7, 1e-6
    assert gaussian.f_gain(0.002, s) == 1
    # f is constant along dx/dt = (x - D) / t, so d ln f_gain / dt = -(1 - D_gain) / t
    slope = (math.log(gaussian.f_gain(t + h, s)) - math.log(gaussian.f_gain(t - h, s))) / (2 * h)
    assert slope == pytest.approx(-(1 - gaussian.D_gain(t, s)) / t, rel=1e-7)


@pytest.mark.parametrize(
    ("method", "settings", "ratio"),
    [
        ("ct", ["phase.0.s1=17"], 0.836),
        ("ct", ["phase.0.s1=39"], 0.925),
        ("ct", ["phase.0.s1=150"], 0.980),
        ("ict", ["phase.0.s1=200"], 0.985),
        ("cd", ["phase.0.solver=euler", "phase.0.N=18"], 0.836),
        ("cd", ["phase.0.N=18"], 1.065),
        ("cd", ["phase.0.N=40"], 1.011),
        ("ect", ["phase.1.stages=1"], 0.840),
        ("ect", ["phase.1.stages=2"], 0.928),
        ("ect", ["phase.1.stages=1", "phase.1.first_stage=4"], 0.966),
    ],
)
def test_the_discrete_minimiser_at_sigma_80(method: str, settings: list[str], ratio: float) -> None:
    found = gaussian.minimiser_gain(80.0, 0.3, last_phase(method, *settings)) / gaussian.f_gain(80.0, 0.3)
    assert found == pytest.approx(ratio, abs=6e-4)


def test_one_level_is_denoised_and_many_levels_lead_to_f() -> None:
    assert gaussian.minimiser_gain(2.0, 0.3, last_phase("edm")) == gaussian.D_gain(2.0, 0.3)
    for method, setting in (("ct", "phase.0.s1=20000"), ("cd", "phase.0.N=20001")):
        phase = last_phase(method, setting)
        t = gaussian.nearest_level(2.0, phase)
        assert gaussian.minimiser_gain(t, 0.3, phase) == pytest.approx(gaussian.f_gain(t, 0.3), rel=2e-4)


# The verdicts


def test_measuring_tells_the_minimiser_and_nothing_else() -> None:
    phase, s = last_phase("ct", "phase.0.s1=17"), 0.5

    def scaled(a: float) -> Any:
        def f(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return a * gaussian.minimiser_gain(sigma[0].item() * (1 + 1e-6), s, phase) * x

        return gaussian.measure(f, phase, s, coarse=True)

    assert not gaussian.misses(scaled(1.0), coarse=True)
    assert not gaussian.misses(scaled(1.02), coarse=True)
    assert len(gaussian.misses(scaled(1.04), coarse=True)) == 4
    assert any("above 5%" in line for line in gaussian.misses(scaled(1.0), coarse=False))


@pytest.mark.parametrize("method", ["edm", "ect"])
def test_an_error_apart_from_the_gain_is_an_error_too(method: str) -> None:
    phase, s = last_phase(method), 0.3
    gain = gaussian.D_gain if method == "edm" else gaussian.f_gain
    generator = torch.Generator().manual_seed(0)

    def measured(error: float) -> Any:
        def f(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            g = gain(sigma[0].item(), s)
            unit = s if method == "edm" else g * math.sqrt(s**2 + sigma[0].item() ** 2)
            return g * x + error * unit * torch.randn(x.shape, generator=generator)

        return gaussian.measure(f, phase, s, coarse=False)

    assert [at.sigma for at in measured(0)] == [0.5, 2, 10, 80][: 3 if method == "edm" else 4]
    for at in measured(0.02):
        assert at.error == pytest.approx(0.02, rel=0.02)
    assert not gaussian.misses(measured(0.048), coarse=False)
    assert gaussian.misses(measured(0.052), coarse=False)


def test_what_a_grid_never_saw_is_measured_unless_it_is_coarse() -> None:
    phase, asked = last_phase("cd", "phase.0.N=40"), []

    def f(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        asked.append(sigma[0].item())
        return x

    gaussian.measure(f, phase, 0.3, coarse=False)
    assert asked == [0.5, 2.0, 10.0, 80.0]
    gaussian.measure(f, phase, 0.3, coarse=True)
    assert asked[4:] == pytest.approx([0.470, 2.24, 9.72, 80.0], rel=2e-3)


def test_a_gain_nearer_to_f_than_to_the_product_is_a_miss() -> None:
    at = gaussian.Figure(sigma=80.0, error=0.0, gain=0.985, product=0.96)
    assert gaussian.misses([at], coarse=True)
    assert not gaussian.misses([replace(at, gain=0.965)], coarse=True)


@pytest.mark.parametrize("words", [["--jobs", "0"], ["--s", "-1"], ["--only", "sct"]])
def test_a_wrong_option_is_a_matter_of_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gaussian.main(words)
    assert stopped.value.code == 2 and words[0] in capsys.readouterr().err


def test_a_wrong_setting_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gaussian.main(["--jobs", "1", "--only", "edm", "--s", "0.3", "--set", "phase.0.stepz=1"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# Training


@pytest.mark.process
@pytest.mark.parametrize("method", PRESETS)
def test_the_preset_trains_from_the_command_line(method: str, tmp_path: Path) -> None:
    data, out = tmp_path / "gaussian.npz", tmp_path / "out"
    images = 0.5 * np.random.default_rng(0).standard_normal((300, 1, 8, 8)).astype(np.float32)
    assert np.abs(images).max() > 1  # unclipped
    np.savez(data, images=images)
    quick = [word for i in range(len(PRESETS[method])) for word in ("--set", f"phase.{i}.steps=3")]
    assert run_cli("train", f"gaussian-{method}", "--data", data, "--out", out, *quick) == 0
    found = read_checkpoint(out / "ckpt.pt")
    assert found.config.image_shape == (1, 8, 8) and found.training.method == method
    assert [path.name for path in sorted(out.glob("phase-*"))] == [
        f"phase-{i}-{name}.pt" for i, name in enumerate(PRESETS[method])
    ]


def run_cli(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in words])
    return int(stopped.value.code or 0)


def result(name: str, *settings: str) -> Any:
    """A case of the script on N(0, 0.3^2 I) with fewer steps."""
    return gaussian.run(next(case for case in gaussian.CASES if case.name == name), 0.3, settings)


@pytest.mark.slow
@pytest.mark.process
def test_edm_learns_the_denoiser() -> None:
    assert result("edm", "phase.0.steps=500").missed == ()


@pytest.mark.slow
def test_coarse_cd_learns_the_product_over_its_grid_and_not_f() -> None:
    figures = result("cd-euler-18", "phase.0.steps=500").figures
    assert [round(at.product, 2) for at in figures][-1] == 0.84
    for at in figures:
        assert at.gain == pytest.approx(at.product, rel=0.05), figures


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_whole_script_meets_its_requirements(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "benchmarks" / "gaussian.py"), "--json", str(report)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["missed"] == []
    assert {(r["name"], r["s"]) for r in found["results"]} == {(c.name, s) for c in gaussian.CASES for s in (0.3, 0.5)}
