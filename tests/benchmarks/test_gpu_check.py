"""What of `make gpu-check` needs no GPU: that it ends in time, keeps what it has, and times nothing that is wrong."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_check


class Drawer:
    """Images of one grey level, after a while."""

    def __init__(self, grey: int, seconds: float = 0.001, fails: bool = False) -> None:
        self.grey, self.seconds, self.fails = grey, seconds, fails

    def draw(self, batch: int, steps: int) -> Any:
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            with suppress(Exception):  # as a compiler may
                time.sleep(0.001)
        if self.fails:
            raise RuntimeError("no kernel image\nis available")
        return np.full((batch, 2, 2, 3), self.grey, np.uint8)


@pytest.mark.process
def test_what_is_wrong_fails_or_is_late_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LONGEST", 0.2)
    drawers = {
        "torch": Drawer(100),
        "close": Drawer(103, 0.004),
        "wrong": Drawer(120),
        "half fp16": Drawer(120),
        "broken": Drawer(100, fails=True),
        "compiler": Drawer(100, seconds=60),
    }
    end = time.monotonic() + 6
    found = gpu_check.race(drawers, 3, 2, lambda: end - time.monotonic())
    assert time.monotonic() < end + 1
    assert found["ms"].keys() == {"torch", "close", "half fp16"}
    assert found["not timed"]["wrong"] == "20 grey levels from eager torch"
    assert found["not timed"]["broken"] == "RuntimeError: no kernel image"
    assert found["not timed"]["compiler"].startswith("not ready after ")
    middle, low, high = found["ms"]["close"]
    assert 4 <= low <= middle <= high
    assert found["rounds"] >= 5


def test_without_eager_torch_nothing_can_be_compared() -> None:
    with pytest.raises(RuntimeError, match="drew none: RuntimeError: no kernel image"):
        gpu_check.race({"torch": Drawer(1, fails=True)}, 1, 2, lambda: 60)


def test_what_is_found_is_written_at_once_and_failures_do_not_stop_it(tmp_path: Path) -> None:
    report = gpu_check.Report(60, tmp_path / "results" / "gpu.json")
    report.part("first", 1, lambda: {"summary": 1})
    assert json.loads((tmp_path / "results" / "gpu.json").read_text())["first"] == {"summary": 1}
    report.part("second", 1, lambda: 1 / 0)
    report.part("third", 100, lambda: pytest.fail("there is no time for it"))
    result = json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert result["failed"] == {"second": "ZeroDivisionError: division by zero"}
    report.keep()
    result = json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert result["skipped"]["third"].endswith("it takes 100")


def test_in_host_mode_it_ends_well_and_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    assert gpu_check.main(["-o", str(path), "--parts", "bandwidth", "sampling", "sanitizer"]) == 0
    result = json.loads(path.read_text())
    assert result["gpu"] is None
    assert {"bandwidth", "sampling", "sanitizer"} <= result["skipped"].keys()
    assert "no GPU: host mode" in capsys.readouterr().out
    assert gpu_check.main(["--show", str(path)]) == 0


def test_the_table_has_what_was_found() -> None:
    result = {
        "gpu": {"name": "H", "capability": "9.0", "driver": 13000},
        "kernels": {"where": "gpu", "summary": "9 passed"},
        "engines": {"ort": {"grey": 1, "differ": 0.25}, "tensorrt": {"skipped": "no tensorrt"}},
        "bandwidth": {"fp32": {"copy": {"megabytes": 64, "ms": 0.1, "GB/s": 3000, "of copy": [1, 1, 1]}}},
        "cifar32 contenders": {"contenders": ["torch"], "missing": {"onnx": "no CUDA provider"}},
        "sampling cifar32, batch 1": {
            "ms": {"torch": [3.0, 2.9, 3.1]},
            "outside": {"torch": 0.015},
            "grey": {},
            "not timed": {"torch.compile": "not ready after 9 s"},
            "rounds": 5,
        },
        "skipped": {"sanitizer": "it is not installed"},
        "failed": {"ops": "RuntimeError: 1 failed"},
        "packages": {},
    }
    said = gpu_check.table(result)
    for text in (
        "H, compute capability 9.0",
        "kernels (gpu): 9 passed",
        "ort: 1 grey levels at most",
        "tensorrt: no tensorrt",
        "| copy | 64 | 0.1 | 3000 | 1.00 [1.00, 1.00] |",
        "cifar32 contenders: no onnx: no CUDA provider",
        "| torch | 3.0 [2.9, 3.1] | 1.5% |",
        "torch.compile: not ready after 9 s",
        "skipped: sanitizer: it is not installed",
        "FAILED: ops: RuntimeError: 1 failed",
    ):
        assert text in said
