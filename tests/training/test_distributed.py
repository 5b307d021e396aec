"""Runs of several torchrun workers (gloo, CPU) against the same run of one."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_folders import log_of, pt

from cm_runtime import cli
from cm_runtime.errors import EngineError, TrainingError
from cm_runtime.training import distributed, loop
from cm_runtime.training.distributed import Workers, is_lead, join_workers

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

pytestmark = pytest.mark.usefixtures("quick_grids")

# Every kind of loss in 20 steps: EMA targets by both schedules, a float16 teacher, batches that do not divide evenly.
# A phase starts from the float16 file of the one before, which rounds a small divergence away: ALONE has none.
CONFIG = """
save_every = 4
sample_every = 1000
weights = "float16"
seed = 5

[data]
source = "DATA"
flip = true

[network]
channels = 32
channel_mult = [1]
res_blocks = 1
head_channels = 32
dropout = 0.3
"""
SHARED = "batch = 7\nlearning_rate = 1e-3\nema = [0.9]\nprecision = 'PRECISION'\n"
PHASES = f"""
[[phase]]
method = "edm"
steps = 6
micro_batch = 2
clip = 1.0
{SHARED}
[[phase]]
method = "cd"
steps = 4
N = 5
mu = 0.8
optimizer = "adam"
{SHARED}
[[phase]]
method = "ct"
steps = 4
s1 = 10
mu0 = 0.5
micro_batch = 3
distance = "l1"
{SHARED}
[[phase]]
method = "ict"
steps = 3
s0 = 2
s1 = 8
{SHARED}
[[phase]]
method = "ect"
steps = 3
stages = 3
micro_batch = 1
{SHARED}
"""

ALONE = {
    "edm": "micro_batch = 2\nclip = 1.0",
    "cd": "teacher = 'gaussian'\nN = 5\nmu = 0.8\noptimizer = 'adam'",
    "ct": "s1 = 10\nmu0 = 0.5\nmicro_batch = 3\ndistance = 'l1'",
}


def write_config(folder: Path, precision: str, phases: str = PHASES) -> Path:
    """A run on 30 real-valued 4x4 images of three classes."""
    rng = np.random.default_rng(0)
    data = folder / "data.npz"
    np.savez(data, images=rng.uniform(-1, 1, (30, 1, 4, 4)).astype(np.float32), labels=np.arange(30) % 3)
    path = folder / f"{precision}.toml"
    path.write_text((CONFIG + phases).replace("DATA", str(data)).replace("PRECISION", precision))
    return path


def two(*words: object) -> list[str]:
    """The command that is ``cm-runtime train`` in two workers."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cm_runtime", "train"]
    return [sys.executable, *launch, *map(str, words)]


def train_two(config: Path, out: Path) -> None:
    words = two(config, "--out", out)
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("now cm-runtime export") == 1  # one of them speaks


def train_one(config: Path, out: Path, *words: str) -> None:
    """In this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(config), "--out", str(out), *words])
    assert not ended.value.code


def farthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def in_double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config fp64.toml and its run by one worker, "one"."""
    folder = tmp_path_factory.mktemp("workers")
    train_one(write_config(folder, "fp64"), folder / "one")
    return folder


def assert_equal_runs(found: Path, wanted: Path, *, weights: float, losses: float) -> None:
    states = [pt(path / "state.pt") for path in (found, wanted)]
    assert farthest(states[0]["model"], states[1]["model"]) <= weights
    assert farthest(states[0]["ema"]["0.9"], states[1]["ema"]["0.9"]) <= weights
    assert [state["images"] for state in states] == [140, 140]
    lines = log_of(found), log_of(wanted)
    keys = ("phase", "step", "images", "learning_rate")
    assert [[line[key] for key in keys] for line in lines[0]] == [[line[key] for key in keys] for line in lines[1]]
    assert len(lines[0]) == 5
    for a, b in zip(*lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=losses, abs=losses)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=10 * losses)


@pytest.mark.slow
@pytest.mark.parametrize("method", ALONE)
def test_two_workers_equal_one_after_20_steps(method: str, tmp_path: Path) -> None:
    """Noise, levels, masks, flips and the order of the data are addressed by place, never by rank."""
    phase = f"[[phase]]\nmethod = '{method}'\nsteps = 20\n{ALONE[method]}\n{SHARED}"
    config = write_config(tmp_path, "fp64", phase)
    train_one(config, tmp_path / "one")
    train_two(config, tmp_path / "two")
    one, two_ = (pt(tmp_path / name / "state.pt") for name in ("one", "two"))
    assert one["step"] == two_["step"] == 20
    assert farthest(one["model"], two_["model"]) <= 1e-9
    assert farthest(one["ema"]["0.9"], two_["ema"]["0.9"]) <= 1e-9
    assert (method == "edm") == (one["target"] == {})
    assert not one["target"] or farthest(one["target"], two_["target"]) <= 1e-9
    losses = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("one", "two")]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.process
def test_two_workers_equal_one_through_every_method(in_double: Path) -> None:
    train_two(in_double / "fp64.toml", in_double / "two")
    assert_equal_runs(in_double / "two", in_double / "one", weights=1e-9, losses=1e-9)
    assert [session["workers"] for session in json.loads((in_double / "two" / "run.json").read_text())] == [2]


@pytest.mark.slow
def test_two_workers_have_the_losses_of_one_in_float32(tmp_path: Path) -> None:
    config = write_config(tmp_path, "fp32")
    train_one(config, tmp_path / "one")
    train_two(config, tmp_path / "two")
    # Adam takes full steps along gradients that are nothing but rounding, so weights are compared in float64 only
    assert_equal_runs(tmp_path / "two", tmp_path / "one", weights=math.inf, losses=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_workers_after_a_stop_signal(in_double: Path) -> None:
    config, out = in_double / "fp64.toml", in_double / "stopped"
    words = two(config, "--out", out, "--set", "save_every=1")
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (out / "state.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)  # torchrun hands it to the workers
        text, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0 and text == ""
    assert error.count("stopped at phase") == 1 and f"--resume --out {out}" in error, error
    state = pt(out / "state.pt")
    assert state["images"] < 140
    train_one(config, out, "--resume")
    assert_equal_runs(out, in_double / "one", weights=1e-9, losses=1e-9)
    sessions = json.loads((out / "run.json").read_text())
    assert [session["workers"] for session in sessions] == [2, 1]
    assert [session["from_images"] for session in sessions] == [0, state["images"]]


ENDING = """
import atexit, sys
from pathlib import Path
from cm_runtime import cli

def threads():
    print("ends with", sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")))

atexit.register(threads)
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_no_thread_of_gloos_is_left_to_abort_when_python_ends(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ENDING)
    phase = f"[[phase]]\nmethod = 'edm'\nsteps = 2\n{SHARED}"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    words = [sys.executable, *launch, "train", write_config(tmp_path, "fp32", phase), "--out", tmp_path / "run"]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = re.findall(r"ends with (\[.*?\])", done.stdout)
    assert len(ends) == 2 and "gloo" not in " ".join(ends)


# in this process


def test_a_batch_of_fewer_images_than_workers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "join_workers", lambda device: nullcontext(Workers(0, 2, torch.device("cpu"))))
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["train", str(write_config(tmp_path, "fp64")), "--out", str(tmp_path / "out"), "--set", "phase.3.batch=1"]
        )
    assert ended.value.code == 1
    assert "phase.3.batch 1 is less than the 2 workers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("count", "world"), [(7, 2), (1, 1), (8, 3), (255, 4), (3, 3), (1024, 8)])
def test_shares_are_a_batch_in_order_and_differ_by_one_at_most(count: int, world: int) -> None:
    shares = [Workers(rank, world, torch.device("cpu")).share(count) for rank in range(world)]
    assert list(itertools.chain(*shares)) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_worker_needs_nobody() -> None:
    alone = Workers(0, 1, torch.device("cpu"))
    model = torch.nn.Linear(1, 1)
    assert alone.lead and alone.parallel(model) is model
    assert alone.total(1.5, 2.0) == [1.5, 2.0] and alone.from_lead(lambda: "x") == "x"
    assert alone.any(True) and not alone.any(False)


def test_the_lead_is_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, lead in ((None, True), ("0", True), ("1", False)):
        monkeypatch.delenv("RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        assert is_lead() is lead


def test_workers_that_cannot_meet_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TrainingError, match="the 2 workers cannot meet") as caught, join_workers("cpu"):
        pass
    assert "\n" not in str(caught.value)


def test_on_gpus_every_worker_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    asked: list[str] = []

    def device(name: str) -> torch.device:
        asked.append(name)
        if name == "cuda:1":
            raise EngineError("there is no cuda:1")
        return torch.device("cuda:0")

    monkeypatch.setattr(distributed, "find_device", device)
    refused: Callable[[], Any] = join_workers("auto").__enter__
    with pytest.raises(EngineError, match="cuda:1"):
        refused()
    assert asked == ["auto", "cuda:1"]
