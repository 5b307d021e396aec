"""``cm-runtime train`` as a user meets it: other processes, real signals, and one line for everything that is wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import assert_same, left_behind, log_of, pt

from cm_runtime import cli
from cm_runtime.checkpoints.native import read_checkpoint

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}

CONFIG = """
[data]
source = "DATA"
flip = true

[network]
channels = 32
channel_mult = [1]
res_blocks = 1
head_channels = 32
dropout = 0.1

[[phase]]
method = "edm"
steps = 30
batch = 4
learning_rate = 1e-3
ema = [0.9, 0.99]

[[phase]]
method = "ect"
steps = 50
batch = 4
learning_rate = 1e-3
ema = [0.9]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of two phases on 30 real-valued 4x4 images of three classes."""
    rng = np.random.default_rng(0)
    data = tmp_path / "data.npz"
    np.savez(data, images=rng.uniform(-1, 1, (30, 1, 4, 4)).astype(np.float32), labels=np.arange(30) % 3)
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.replace("DATA", str(data)))
    return path


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "cm_runtime", "train", *map(str, words)]


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), env=ENVIRONMENT, capture_output=True, text=True, check=False, **options)


def in_process(*words: object) -> int:
    """The exit status of ``cm-runtime train`` in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *map(str, words)])
    return int(ended.value.code or 0)


# real signals


def stopped(*words: object, out: Path, phase: int) -> str:
    """Starts a run, sends it SIGINT when that phase has logged, and returns the one line it leaves on stderr."""
    process = subprocess.Popen(
        command("--quiet", *words), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 240
        while not ((out / "log.jsonl").exists() and any(line["phase"] == phase for line in log_of(out))):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        text, error = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert text == "" and error.count("\n") == 1
    return error


@pytest.mark.slow
def test_a_run_interrupted_in_both_phases_ends_as_the_one_never_interrupted(config: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    done = run(config, "--out", whole, "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{whole / 'ckpt.pt'}: now cm-runtime export {whole / 'ckpt.pt'}\n"
    for phase in (0, 1):
        line = stopped(config, "--out", out, *["--resume"] * phase, out=out, phase=phase)
        assert f"stopped at phase {phase} step " in line and f"--resume --out {out}" in line
        state = pt(out / "state.pt")
        assert state["phase"] == phase and 10 <= state["step"] <= (30, 50)[phase]
        assert read_checkpoint(out / "ckpt.pt").training.steps == state["step"] + 30 * phase
        assert (out / "phase-0-edm.pt").exists() == (phase == 1)
    assert run(config, "--out", out, "--resume").returncode == 0
    assert_same(left_behind(out), left_behind(whole))


# Trains in a child that is killed after one to three saves and up to 30 ms more, as often as told; then to the end.
LIVES = """
import os, random, signal, sys, time
import torch
from cm_runtime import cli
from cm_runtime.checkpoints.native import read_checkpoint
from cm_runtime.training import loop

config, whole, killed, lives = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
torch.set_num_threads(1)
loop.GRID_IMAGES = 4
chance = random.Random(0)

def saved():
    try:
        return os.stat(f"{killed}/state.pt").st_mtime_ns
    except FileNotFoundError:
        return 0

def start(out, how):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        cli.main(["train", config, "--out", out, how, "--quiet"])
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)

killed_in_time = 0
for life in range(lives):
    before, left, child = saved(), chance.randint(1, 3), start(killed, "--resume" if saved() else "--force")
    ended = 0
    while left and not ended:
        ended = os.waitpid(child, os.WNOHANG)[0]
        left, before = left - (saved() != before), saved()
        time.sleep(0.001)
    if ended:  # a fast machine was done
        break
    time.sleep(chance.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    killed_in_time += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    read_checkpoint(f"{killed}/ckpt.pt")
if killed_in_time < 4:
    sys.exit(f"only {killed_in_time} runs were killed before they ended")
for child in start(killed, "--resume"), start(whole, "--force"):
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit("a run failed")
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_the_one_never_killed(config: Path, tmp_path: Path) -> None:
    short = config.read_text().replace("steps = 30", "steps = 15").replace("steps = 50", "steps = 40")
    config.write_text("save_every = 1\nsample_every = 7\n" + short)
    words = [sys.executable, "-c", LIVES, *map(str, (config, tmp_path / "whole", tmp_path / "killed", 10))]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same(left_behind(tmp_path / "killed"), left_behind(tmp_path / "whole"))


@pytest.mark.process
def test_two_processes_do_not_train_in_one_folder(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(command(config, "--out", out), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    try:
        while not (out / "config.toml").exists():
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        for how in ([], ["--force"]):
            assert in_process(config, "--out", out, *how) == 1
    finally:
        process.kill()
        process.wait()
    assert in_process(config, "--out", out, "--force", "--set", "phase.0.steps=1", "--set", "phase.1.steps=1") == 0


# one line for everything that is wrong


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["no-such-preset"], "fashion-mnist"),
        (["CONFIG", "--data", "no/such/data.npz"], "no/such/data.npz"),
        (["CONFIG", "--data", "no-such-set"], "no-such-set"),
        (["CONFIG", "--set", "garbage"], "garbage"),
        (["CONFIG", "--set", "phase.0.speed=1"], "phase.0.speed"),
        (["CONFIG", "--set", "phase.9.steps=1"], "phase.9.steps"),
        (["CONFIG", "--set", "network.patch=5"], "network.patch"),
        (["CONFIG", "--set", "network.attention=[3]"], "attention"),
        (["CONFIG", "--set", "device=gpu"], "gpu"),
        (["CONFIG", "--set", "device=meta"], "meta"),
        (["CONFIG", "--set", "data.image_size=16"], "image_size"),
        (["CONFIG", "--resume"], "resume"),
        (["CONFIG", "--resume", "--force"], "--resume"),
        (["CONFIG", "--out", "file/below"], "file/below"),
        (["CONFIG", "--out", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    before = everything(tmp_path)
    assert in_process(*[str(config) if word == "CONFIG" else word for word in words]) == 1
    text, error = capsys.readouterr()
    assert text == ""
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error
    assert everything(tmp_path) == before


@pytest.mark.process
@pytest.mark.quick("words1")
@pytest.mark.parametrize(
    "words", [["no-such-preset"], ["CONFIG", "--data", "nowhere.npz"], ["CONFIG", "--set", "garbage"]]
)
def test_another_process_ends_the_same_way(config: Path, tmp_path: Path, words: list[str]) -> None:
    before = everything(tmp_path)
    done = run(*[str(config) if word == "CONFIG" else word for word in words], cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert everything(tmp_path) == before


@pytest.mark.process
def test_a_loss_that_is_not_finite_is_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(config, "--out", tmp_path / "out", "--set", "phase.0.learning_rate=1e30", "--quiet") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not finite at phase 0 step " in error


@pytest.mark.process
def test_debug_shows_the_traceback(config: Path, tmp_path: Path) -> None:
    done = run(config, "--set", "garbage", "--debug", cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" in done.stderr and "garbage" in done.stderr


# what the options do

QUICK = [word for i in (0, 1) for word in ("--set", f"phase.{i}.steps=1")]


@pytest.mark.process
def test_a_run_goes_to_a_folder_named_after_its_configuration(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_process(config, *QUICK, "--threads", 1) == 0
    text, error = capsys.readouterr()
    assert text.startswith("runs/config/ckpt.pt: ")
    plan, *phases = error.splitlines()
    assert plan.startswith("training on 30 images 1x4x4 of data.npz: edm 1 step of 4 images, ect 1 step of 4 images;")
    assert plan.endswith("; on cpu with 1 thread, into runs/config/")
    for line, expected in zip(
        phases,
        (
            "phase 1 of 2: edm, 1 step",
            r"edm: step 1/1, loss [\d.]+, \d+ images/s, 0 s left, saved",
            "phase 2 of 2: ect, 1 step",
            r"ect: step 1/1, loss [\d.]+, \d+ images/s, 0 s left, saved",
        ),
        strict=True,
    ):
        assert re.fullmatch(expected, line)
    names = {path.name for path in (tmp_path / "runs" / "config").iterdir()}
    kept = {"phase-0-edm.pt", "phase-1-ect.pt"}
    files = {"config.toml", "run.json", "state.pt", "ckpt.pt", "log.jsonl"}
    assert names == {".lock", "samples", "tensorboard", *files, *kept}
    assert in_process(config, *QUICK) == 1
    assert in_process(config, *QUICK, "--resume") == 0
    assert in_process(config, *QUICK, "--force") == 0


@pytest.mark.process
def test_the_configuration_that_a_run_writes_starts_the_same_run(config: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert in_process(config, "--out", first, *QUICK, "--set", "seed=3", "--set", "precond=boundary") == 0
    assert in_process(first / "config.toml", "--out", second) == 0
    assert_same(left_behind(second), left_behind(first))


PATHS = ["plain.npz", "sp ace.npz", "it's.npz", 'a "quoted".npz', 'it\'s "both".npz', "back\\slash.npz", "päth.npz"]


@pytest.mark.quick("it's.npz", 'a "quoted".npz')
@pytest.mark.process
@pytest.mark.parametrize("name", PATHS)
def test_data_may_lie_at_any_path(config: Path, tmp_path: Path, name: str) -> None:
    os.rename(tmp_path / "data.npz", tmp_path / name)
    assert in_process(config, "--data", tmp_path / name, "--out", tmp_path / "out", *QUICK) == 0
    assert read_checkpoint(tmp_path / "out" / "ckpt.pt").training.data == name


@pytest.mark.process
def test_data_overrides_the_configuration_and_every_setting(config: Path, tmp_path: Path) -> None:
    other = ["--set", "data.source=/nowhere", "--data", tmp_path / "data.npz"]
    assert in_process(config, "--out", tmp_path / "out", *QUICK, *other) == 0


@pytest.mark.process
def test_the_excerpt_of_real_images_trains_from_the_preset(tmp_path: Path) -> None:
    excerpt = Path(__file__).parents[1] / "data" / "fashion-mnist"
    tiny = ["network.channels=32", "network.res_blocks=1", "network.head_channels=32", "network.attention=[]"]
    quick = [f"phase.{i}.{key}" for i in (0, 1) for key in ("steps=2", "batch=4", "precision=fp32")]
    words = [word for setting in [*tiny, *quick] for word in ("--set", setting)]
    assert in_process("fashion-mnist", "--data", excerpt, "--out", tmp_path / "out", *words) == 0
    found = read_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert found.config.image_shape == (1, 28, 28) and found.config.network.num_classes == 10
    assert [line["images"] for line in log_of(tmp_path / "out")] == [8, 16]


@pytest.mark.slow
def test_a_terminal_sees_a_progress_bar(config: Path, tmp_path: Path) -> None:
    controller, terminal = os.openpty()
    drawn = bytearray()

    def look() -> None:
        """A terminal holds a few kilobytes: one that nobody reads would stop the run."""
        with suppress(OSError):  # how Linux ends what nobody writes any more
            while part := os.read(controller, 1 << 16):
                drawn.extend(part)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        done = subprocess.run(
            command(config, "--out", tmp_path / "out", *QUICK),
            env={**ENVIRONMENT, "TERM": "xterm"},
            stdout=subprocess.PIPE,
            stderr=terminal,
            check=False,
        )
    finally:
        os.close(terminal)
        watcher.join(60)
        os.close(controller)
    assert done.returncode == 0
    assert all(word in drawn for word in (b"edm", b"ect", b"images/s"))
