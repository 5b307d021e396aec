"""What `make gpu-check` asks of CUDA, by the real bindings on the stand-in for its driver."""

from __future__ import annotations

import pytest
from driver import run_on_driver

pytestmark = pytest.mark.process
pytest.importorskip("cuda.bindings")

BENCHMARKS = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path("benchmarks").absolute()))
"""


def test_the_gpu_is_there_and_its_kernels_are_timed_between_guards() -> None:
    outcome = run_on_driver(
        BENCHMARKS
        + """
from gpu import bandwidth, survey
from cm_runtime.kernels.launches import Images
print(survey.find_gpu()["name"])
bandwidth.ROUNDS, bandwidth.REPEATS = 2, 3
work = bandwidth.step_work
bandwidth.step_work = lambda device, buffers, images: work(device, buffers, images._replace(height=5, width=3))
for type in ("fp32", "fp16"):
    rows = bandwidth.time_steps(type, 3)
    print(len(rows), all(row["ms"] >= 0 for row in rows.values()))
bandwidth.norm_shapes = lambda network: {(64, 4): 3, (96, 1): 2}
print(*bandwidth.time_norms("fp16", "any", 3))
"""
    )
    assert outcome.out.splitlines()[1:] == ["5 True", "5 True", "64x4x4 96x1x1 all of an evaluation"]
