"""Nothing of ours or of an engine's is written into the home folder but the cache folder, and no engine phones home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cm_runtime.extras import PRIVACY, privacy

ROOT = Path(__file__).parents[1]
VARIABLES = {name for variables in PRIVACY.values() for name in variables()}

QUICK = """
from cm_runtime.cli import main
from cm_runtime.extras import require

def run(*words):
    try:
        main([*words])
    except SystemExit as end:
        assert not end.code, words

run("sample", "--count", "8", "--backend", "auto", "--device", "cpu", "-o", "auto.png")
run("sample", "--count", "8", "--backend", "openvino", "-o", "openvino.png")
run("doctor")
require("matplotlib", "a page")
import matplotlib.font_manager
"""


def home_after(folder: Path, *command: str) -> set[str]:
    """The files that a command, which must succeed, leaves in a new home folder, and warnings that it gives of it."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in {*VARIABLES, "XDG_CACHE_HOME"}}
    environment = kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.relative_to(home).as_posix() for path in home.rglob("*") if not path.is_dir()}


@pytest.mark.slow
@pytest.mark.process
def test_only_the_cache_folder_is_written_in_home(tmp_path: Path) -> None:
    """ONNX Runtime would leave a device id and a database of events, matplotlib a list of fonts."""
    left = home_after(tmp_path, sys.executable, "-c", QUICK)
    assert left  # what auto measured
    assert {name for name in left if not name.startswith(".cache/cm-runtime/")} == set()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_command_writes_in_home(tmp_path: Path) -> None:
    data = str(ROOT / "tests" / "data" / "fashion-mnist")
    few = ("--set", "phase.0.steps=8", "--set", "phase.1.steps=8")
    one = ("--steps", "1", "--batch", "1", "--budget", "1", "--peers", "diffusers,torch,onnx,openvino")
    for words in (
        ("train", "fashion-mnist-tiny", "--data", data, "--out", "runs/tiny", *few),
        ("export", "runs/tiny/ckpt.pt"),
        ("sample", "runs/tiny/ckpt.onnx", "--count", "8"),
        ("sample", "runs/tiny/ckpt.pt", "--count", "8", "--backend", "torch"),
        ("sample", "--count", "8", "--shards", "parquet", "-o", "shards/"),
        ("eval", "runs/tiny/ckpt.onnx", "--reference", data, "--count", "16"),
        ("bench", "run", *one, "-o", "bench.json"),
        ("bench", "report", "bench.json", "-o", "bench.html"),
    ):
        left = home_after(tmp_path, sys.executable, "-m", "cm_runtime", *words)
        assert {name for name in left if not name.startswith(".cache/cm-runtime/")} == set(), words


def test_variables_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    assert privacy("onnxruntime") == {"ORT_DISABLE_TELEMETRY": "1"}
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    assert privacy("onnxruntime") == {}
