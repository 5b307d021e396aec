"""cm_runtime/files/workspaces.py: the next of their kind sweeps what the dead leave, and nothing of the living."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import kills
import pytest

from cm_runtime.files.atomic import write
from cm_runtime.files.workspaces import scratch, sweep, workspace


def half(folder: Path) -> None:
    """Dies by SIGKILL in the middle of a file."""
    with write(folder / "x.npz") as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def litter(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".cm-*"))


@pytest.fixture
def left(tmp_path: Path) -> str:
    with pytest.raises(AssertionError, match="exit status -9"):
        kills.runs(half, tmp_path)
    (name,) = litter(tmp_path)
    return name


@pytest.mark.process
def test_the_next_writer_of_the_kind_sweeps_and_others_do_not(tmp_path: Path, left: str) -> None:
    with write(tmp_path / "y.onnx") as temporary:
        temporary.touch()
    assert litter(tmp_path) == [left]
    with write(tmp_path / "y.npz") as temporary:
        assert litter(tmp_path) == [temporary.parent.name]
        temporary.touch()
    assert litter(tmp_path) == [] and {path.name for path in tmp_path.iterdir()} == {"y.onnx", "y.npz"}


@pytest.mark.process
def test_what_a_living_process_writes_is_never_swept(tmp_path: Path) -> None:
    with write(tmp_path / "x.npz") as temporary:
        temporary.write_bytes(b"mine")
        assert kills.runs(lambda folder: sweep(folder), tmp_path)
        sweep(tmp_path)  # another thread of this process
        assert temporary.read_bytes() == b"mine"
    assert (tmp_path / "x.npz").read_bytes() == b"mine" and litter(tmp_path) == []


def test_only_workspaces_are_swept(tmp_path: Path) -> None:
    """No file, no folder of another name, and nothing behind a link."""
    (tmp_path / "precious").mkdir()
    (tmp_path / ".cm-01234567").symlink_to("precious")
    (tmp_path / ".cm-89abcdef.npz").write_bytes(b"a file")
    (tmp_path / ".cm-notes").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lock").symlink_to("../precious/lock")
    (tmp_path / "other").rename(tmp_path / ".cm-00000000")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_workspace_whose_lock_was_never_made_is_dead(tmp_path: Path) -> None:
    (tmp_path / ".cm-01234567.npz").mkdir()
    sweep(tmp_path, (".onnx",))
    assert litter(tmp_path) == [".cm-01234567.npz"]
    sweep(tmp_path, (".npz",))
    assert litter(tmp_path) == []


@pytest.mark.process
def test_where_no_locks_work_files_are_written_and_nothing_is_swept(
    tmp_path: Path, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with write(tmp_path / "x.npz") as temporary:
        temporary.touch()
    assert litter(tmp_path) == [left] and (tmp_path / "x.npz").exists()


def test_what_was_moved_aside_comes_back_unless_it_was_replaced(tmp_path: Path) -> None:
    for name in (".cm-01234567", ".cm-89abcdef"):
        (tmp_path / name / "replaced" / f"of{name}").mkdir(parents=True)
    (tmp_path / "of.cm-89abcdef").mkdir()
    (tmp_path / "of.cm-89abcdef" / "new").touch()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "of.cm-01234567", "of.cm-89abcdef"]


@pytest.mark.process
def test_scratch_folders_of_the_dead_go_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def dies(_: Path) -> None:
        with scratch("cm-bench") as folder:
            (folder / "x").touch()
            os._exit(kills.KILLED)

    assert not kills.runs(dies, tmp_path)
    assert len(list(tmp_path.glob("cm-bench-*"))) == 1
    with scratch("cm-bench") as folder:
        assert list(tmp_path.iterdir()) == [folder]
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def test_a_workspace_that_a_sweep_takes_at_its_birth_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between mkdir and lock, a process that sweeps takes it for a dead one's."""
    make, seen = Path.mkdir, []

    def mkdir(self: Path, *arguments: int, **options: int) -> None:
        make(self, *arguments, **options)
        seen.append(self)
        if len(seen) == 1:
            sweep(tmp_path)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with workspace(tmp_path) as folder:
        assert folder == seen[1] and folder.is_dir() and len(seen) == 2
    assert litter(tmp_path) == []


def test_a_workspace_that_a_sweep_takes_before_it_is_locked_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and lock, a process that sweeps has the lock, and removes the folder with the file."""
    open_file, paths = os.open, []

    def open_then_sweep(path: Path, *arguments: int, **options: int | None) -> int:
        descriptor = open_file(path, *arguments, **options)
        paths.append(path)
        if len(paths) == 1:
            sweep(tmp_path)
        return descriptor

    monkeypatch.setattr(os, "open", open_then_sweep)
    with workspace(tmp_path) as folder:
        assert folder.is_dir() and folder != paths[0].parent and litter(tmp_path) == [folder.name]
    assert litter(tmp_path) == []
