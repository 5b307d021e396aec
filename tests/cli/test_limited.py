"""``cm-runtime --untrusted``: bounds of the child, and its end in a line."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from cm_runtime.cli import limited
from cm_runtime.errors import EngineError


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for Python: a shell that runs the last word of the command line."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\nfor word; do :; done\neval "$word"\n', encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setattr(limited.sys, "executable", str(path))
    return path


def test_the_child_has_bounds_and_its_own_output(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert limited.run(["ulimit -v; ulimit -c; echo $CUDA_VISIBLE_DEVICES; exit 3"], 1.5, 10) == 3
    assert capfd.readouterr().out.split() == [str(int(1.5 * 2**20)), "0", "-1"]


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
        limited.run([words], None, seconds)
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_reaches_it(script: Path) -> None:
    """And all that it started."""
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    assert limited.run(["exec sleep 60"], None, 30) == 130
