"""``cm-runtime --untrusted``: bounds of the child, and its end in a line."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from cm_runtime.cli import sandbox
from cm_runtime.errors import EngineError


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for Python: a shell that runs the last word of the command line."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\nfor word; do :; done\neval "$word"\n', encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setattr(sandbox.sys, "executable", str(path))
    return path


@pytest.mark.process
def test_the_child_has_bounds_and_its_own_output(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sandbox.run(["ulimit -v; ulimit -c; echo $CUDA_VISIBLE_DEVICES; exit 3"], 1.5, 10) == 3
    assert capfd.readouterr().out.split() == [str(int(1.5 * 2**20)), "0", "-1"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "seconds", "line"),
    [
        ("kill -SEGV $$", 10, "the command was ended by SIGSEGV"),
        ("kill -KILL $$", 10, "the command was ended by SIGKILL"),
        ("sleep 60", 0.2, "the command was ended after 0.2 s, its --time-limit"),
    ],
)
def test_its_death_is_a_line(script: Path, words: str, seconds: float, line: str) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(EngineError, match=line):
        sandbox.run([words], None, seconds)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.process
def test_it_may_clean_up_when_its_time_is_over(script: Path, tmp_path: Path) -> None:
    words = f"trap 'rm {tmp_path}/litter; exit' TERM; touch {tmp_path}/litter; sleep 60 & wait"
    with pytest.raises(EngineError, match="its --time-limit"):
        sandbox.run([words], None, 1)
    assert not (tmp_path / "litter").exists()


@pytest.mark.process
def test_it_ends_with_its_parent(script: Path, tmp_path: Path) -> None:
    """Whatever ends that: nobody else would hold it to its time."""
    parent = os.fork()
    if parent == 0:
        sandbox.run([f"echo $$ > {tmp_path}/pid; exec sleep 60"], None, 60)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    child = Path("/proc", (tmp_path / "pid").read_text().strip())
    deadline = time.monotonic() + 10
    while child.exists() and (child / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.process
def test_what_the_child_has_said_is_not_said_again(script: Path) -> None:
    assert type(sandbox.run(["exit 130"], None, 10)) is sandbox.Spoken
    assert type(sandbox.run(["kill -INT $$"], None, 10)) is int


@pytest.mark.process
def test_ctrl_c_reaches_it(script: Path) -> None:
    """And all that it started."""
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    assert sandbox.run(["exec sleep 60"], None, 30) == 130
