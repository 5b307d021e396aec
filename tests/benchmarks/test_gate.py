"""Planted slow-downs are in the copy that is measured, and what the gate must find of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gate  # type: ignore[import-not-found]
import independent  # type: ignore[import-not-found]

DRAW = """
import time
import numpy as np
from cm_runtime import sample
from cm_runtime.manifest import Manifest

class Slow:
    manifest = Manifest(graph="denoiser", image_shape=(1, 3, 7), num_classes=0, precond="edm", sigma_boundary=0)
    micro_batch = 8
    def denoise(self, x, sigma, label=None):
        time.sleep(0.1)
        return np.zeros_like(x)

began = time.perf_counter()
sample(Slow(), count=1, steps=1)
print(time.perf_counter() - began)
"""


@pytest.mark.process
@pytest.mark.parametrize(("percent", "low", "high"), [(0, 0.1, 0.14), (50, 0.15, 0.21)])
def test_a_copy_takes_so_much_longer(tmp_path: Path, percent: float, low: float, high: float) -> None:
    root = gate.plant(tmp_path, percent)
    calls = [sys.executable, "-P", "-c", DRAW]
    environment = os.environ | {"PYTHONPATH": str(root)}
    times = [float(subprocess.run(calls, env=environment, capture_output=True, check=True).stdout) for _ in range(3)]
    assert low <= min(times) <= high


@pytest.mark.parametrize(
    ("verdicts", "is_met"),
    [
        ({0: ["PASS"] * 20, 3: ["PASS"] * 20, 10: ["REGRESSION"] * 20}, True),
        ({0: ["INCONCLUSIVE"] * 20, 10: ["REGRESSION"] * 19 + ["INCONCLUSIVE"]}, True),
        ({10: ["REGRESSION"] * 18 + ["INCONCLUSIVE"] * 2}, False),
        ({0: ["PASS"] * 19 + ["REGRESSION"], 10: ["REGRESSION"] * 20}, False),
        ({3: ["PASS"] * 19 + ["REGRESSION"], 10: ["REGRESSION"] * 20}, False),
    ],
)
def test_what_is_required(verdicts: dict[float, list[str]], is_met: bool) -> None:
    assert gate.meets_requirement(verdicts) == is_met


@pytest.mark.slow
def test_a_large_slow_down_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.main(["--runs", "1", "--percent", "0", "60", "--budget", "3", "--json", str(tmp_path / "x.json")]) == 0
    assert "60%: 0 PASS, 1 REGRESSION" in capsys.readouterr().out and (tmp_path / "x.json").exists()


@pytest.mark.slow
def test_the_independent_loop(capsys: pytest.CaptureFixture[str]) -> None:
    assert independent.main(["--batch", "3", "--rounds", "2", "--seconds", "1"]) in (0, 1)
    assert "batch 3, network: bench run" in capsys.readouterr().out
