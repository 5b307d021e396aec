"""The command line in this process, and the exported files that these tests share; see tests/exports.py."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import exports

from cm_runtime.cli import main


@pytest.fixture(scope="session")
def boundary(tmp_path_factory: pytest.TempPathFactory) -> exports.Files:
    return exports.Files("boundary", tmp_path_factory)


@pytest.fixture(scope="session")
def grey(tmp_path_factory: pytest.TempPathFactory) -> exports.Files:
    """One channel, no classes."""
    return exports.Files("edm", tmp_path_factory)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs the command line in this process, in an empty folder; anything but SystemExit is the test's failure."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in arguments])
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return run
