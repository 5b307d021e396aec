"""The command of `make gpu-check` itself on a CPU: real processes, killed on the way, and Inductor's real caches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cm_runtime.bench.networks import random_checkpoint
from cm_runtime.checkpoints.native import save_checkpoint

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, make_config: Any) -> Path:
    path = tmp_path_factory.mktemp("networks") / "tiny.pt"
    save_checkpoint(random_checkpoint(make_config()), path)
    return path


def start(path: Path, tiny: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "-o", str(path), "--device", "cpu", *more]
    words += ["--networks", str(tiny), "--batches", "1", "3", "7", "--precision", "fp32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def results(path: Path) -> dict[str, Any]:
    findings = json.loads(path.read_text())["findings"] if path.exists() else {}
    return {name: entry["result"] for name, entry in findings.items() if "result" in entry}


def test_calls_that_are_killed_complete_one_result(tmp_path: Path, tiny: Path) -> None:
    """Killed at once when a finding is there, twice; then left to its end."""
    path = tmp_path / "gpu.json"
    parts = ("--part", "onnxruntime", "bandwidth")
    before: dict[str, Any] = {}
    for _ in range(2):
        call, end = start(path, tiny, *parts), time.monotonic() + 600
        while len(results(path)) == len(before) and call.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        call.send_signal(signal.SIGKILL)
        call.communicate()
        time.sleep(1)
        after = results(path)
        assert after.items() >= before.items() and after.keys() > before.keys()
        before = after
    call = start(path, tiny, *parts, "--budget", "1500")
    out, err = call.communicate()
    assert call.returncode == 0, out + err
    after = results(path)
    assert after.items() >= before.items()
    assert {f"onnxruntime tiny, fp32, batch {n}" for n in (1, 3, 7)} == set(after)
    assert "- skipped: bandwidth: missing: GPU" in out


CHILD = """
import sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from gpu.contenders import Plain, Setting
source, caches = map(Path, sys.argv[1:])
plain = Plain(Setting(source, "fp32", 2, "cpu", caches, caches), is_compiled=True)
plain.draw()
plain.keep()
print(counters["inductor"]["fxgraph_cache_miss"])
print(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])
"""


def test_what_torch_compile_made_is_not_made_again(tmp_path: Path, tiny: Path) -> None:
    """In another process with an empty cache of its own, as on another machine."""
    counts = []
    for number in range(2):
        paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
        folders = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"inductor{number}"), "PYTHONPATH": paths}
        words = [sys.executable, "-c", CHILD, str(tiny), str(tmp_path / "caches")]
        done = subprocess.run(words, env=os.environ | folders, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        counts.append([int(word) for word in done.stdout.split()])
    (misses, hits), (misses_again, hits_again) = counts
    assert misses > 0 and hits == 0
    assert misses_again == 0 and hits_again > 0
    assert (tmp_path / "caches" / "inductor-tiny-fp32-2.bin").stat().st_size > 1000
