"""cm_runtime/files/atomic.py: files appear whole or not at all, whatever goes wrong and whoever else is writing."""

import ctypes
import hashlib
import multiprocessing
import os
import resource
import stat
import threading

import kills
import pytest

from cm_runtime.errors import OutputError
from cm_runtime.files.atomic import check_output, check_writable, folder_written, sha256, write

as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere, so permissions refuse nothing")


@pytest.mark.parametrize("size", [0, 1, 3, 7, 255, 1 << 20])
def test_what_the_block_writes_is_the_file(tmp_path, size):
    content = bytes(i % 251 for i in range(size))
    with write(tmp_path / "out.bin") as temporary:
        temporary.write_bytes(content)
    assert (tmp_path / "out.bin").read_bytes() == content
    assert os.listdir(tmp_path) == ["out.bin"]


def test_nothing_has_the_final_name_before_the_block_ends(tmp_path):
    target = tmp_path / "out.bin"
    with write(target) as temporary:
        temporary.write_bytes(b"half")
        assert not target.exists()
        assert temporary.parent.parent == tmp_path  # the same file system, so that the move is one step
    assert target.exists()


@pytest.mark.parametrize("name", ["x.png", "model.onnx", "a.b.npz", "plain"])
def test_the_names_ending_is_kept_for_writers_that_go_by_it(tmp_path, name):
    with write(tmp_path / name) as temporary:
        assert temporary.suffix == (tmp_path / name).suffix and temporary != tmp_path / name
        temporary.touch()
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("failure", [RuntimeError("crash"), KeyboardInterrupt(), SystemExit(3)])
def test_a_crash_in_the_block_leaves_nothing_and_is_passed_on(tmp_path, failure):
    with pytest.raises(type(failure)) as caught, write(tmp_path / "out.bin") as temporary:
        temporary.write_bytes(b"half")
        raise failure
    assert caught.value is failure
    assert os.listdir(tmp_path) == []


def test_a_crash_in_the_block_keeps_the_old_content(tmp_path):
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), write(target) as temporary:
        temporary.write_bytes(b"half of the new")
        raise RuntimeError
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["out.bin"]


def test_a_full_disk_is_one_line_and_keeps_the_old_content(tmp_path):
    """A limit on the size of files stands in for the disk."""
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written: File too large") as caught, write(target) as made:
            made.write_bytes(bytes(1 << 17))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and str(target) in str(caught.value)
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["out.bin"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"), write(tmp_path / "out.bin"):
        pass
    assert os.listdir(tmp_path) == []


def test_force_replaces_and_its_absence_refuses_at_once(tmp_path):
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    with pytest.raises(OutputError, match="exists; replace it with --force"), write(target, force=False):
        pytest.fail("the block must not run: it may take hours")
    assert target.read_bytes() == b"old"
    with write(target, force=True) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"
    with write(tmp_path / "other.bin", force=False) as temporary:
        temporary.write_bytes(b"new")
    assert sorted(os.listdir(tmp_path)) == ["other.bin", "out.bin"]


def test_without_force_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out.bin"
    with pytest.raises(OutputError, match="exists"), write(target, force=False) as temporary:
        temporary.write_bytes(b"mine")
        target.write_bytes(b"theirs")
    assert target.read_bytes() == b"theirs" and os.listdir(tmp_path) == ["out.bin"]


@pytest.mark.parametrize(("force", "move"), [(True, "replace"), (False, "link")])
def test_a_files_bytes_are_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, force, move):
    fsync, place, events = os.fsync, getattr(os, move), []

    def record_sync(descriptor):
        events.append(("sync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        fsync(descriptor)

    def record_move(source, target):
        events.append((move, os.stat(source).st_ino, os.stat(source).st_size))
        place(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, move, record_move)
    with write(tmp_path / "out.bin", force=force) as temporary:
        temporary.write_bytes(b"all of it")
    inode = (tmp_path / "out.bin").stat().st_ino
    assert events == [("sync", inode, 9), (move, inode, 9)]


def test_a_folders_files_are_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    states = []
    monkeypatch.setattr(os, "sync", lambda: states.append(kills.contents(tmp_path)))
    _write_folder(tmp_path / "m", "new")
    (before,) = states
    assert {"a", "b"} <= {path.rpartition("/")[2] for path in before}
    assert not [path for path in before if path.startswith("m/")]


def _write(target, letter, barrier):
    barrier.wait()
    for _ in range(15):
        with write(target) as temporary, temporary.open("wb") as file:
            for _ in range(64):
                file.write(letter * 1024)


def test_two_writers_at_once_never_mix(tmp_path):
    target = tmp_path / "out.bin"
    barrier = threading.Barrier(2)
    writers = [threading.Thread(target=_write, args=(target, letter, barrier)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if target.exists():
            seen.add(target.read_bytes())
    seen.add(target.read_bytes())
    for writer in writers:
        writer.join()
    assert seen <= {b"a" * 65536, b"b" * 65536}
    assert os.listdir(tmp_path) == ["out.bin"]


def _write_and_hang(target, ready):
    with write(target) as temporary:
        temporary.write_bytes(b"half")
        ready.set()
        threading.Event().wait()


@pytest.mark.process
def test_a_killed_writer_leaves_the_final_name_alone(tmp_path):
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_write_and_hang, args=(target, ready))
    process.start()
    assert ready.wait(20)
    process.kill()
    process.join()
    assert target.read_bytes() == b"old"
    with write(target) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"


def _write_folder(target, word, existing="replaced"):
    with folder_written(target, existing) as folder:
        (folder / "inside").mkdir()
        for name in ("a", "inside/b"):
            (folder / name).write_text(word)


@pytest.mark.process
@pytest.mark.parametrize("is_exchanged", [True, False])
def test_a_folder_is_replaced_by_a_whole_one_at_every_moment_or_comes_back(tmp_path, monkeypatch, is_exchanged):
    """Where the file system cannot swap two folders, there may be none for a moment; the next run restores it."""
    if not is_exchanged:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: None)
    before = tmp_path / "before"
    before.mkdir()
    _write_folder(before / "m", "old")
    states = {word: {"m/a": word, "m/inside/b": word} for word in (b"old", b"new")}
    gone = 0
    for folder in kills.folders(before, lambda folder: _write_folder(folder / "m", "new"), tmp_path):
        seen = {name: content for name, content in kills.contents(folder).items() if name.startswith("m/")}
        gone += not seen
        assert seen in states.values() or (not seen and not is_exchanged)
        assert kills.runs(lambda folder: _write_folder(folder / "m", "other", "kept"), folder)
        assert kills.contents(folder) in states.values()  # the one there was, restored if need be, is kept
        assert os.listdir(folder) == ["m"]
    assert gone == (0 if is_exchanged else 1)


def test_a_folder_whose_successor_cannot_take_its_place_comes_back_at_once(tmp_path, monkeypatch):
    _write_folder(tmp_path / "m", "old")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: None)
    rename = type(tmp_path).rename

    def fail(self, target):
        if self.name == "draft":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", fail)
    with pytest.raises(OutputError, match="m cannot be written: No space left on device"):
        _write_folder(tmp_path / "m", "new")
    assert kills.contents(tmp_path) == {"m/a": b"old", "m/inside/b": b"old"}


def test_a_folder_that_must_not_be_replaced_is_not(tmp_path):
    _write_folder(tmp_path / "m", "old")
    with pytest.raises(OutputError, match="m cannot be written: Directory not empty"):
        _write_folder(tmp_path / "m", "new", "refused")
    assert kills.contents(tmp_path) == {"m/a": b"old", "m/inside/b": b"old"}


@pytest.mark.process
def test_a_kill_at_any_moment_leaves_a_file_whole_and_its_litter_to_the_next(tmp_path, name="x.npz"):
    def rewrite(folder, word=b"new"):
        with write(folder / name) as temporary:
            temporary.write_bytes(word)

    before = tmp_path / "before"
    before.mkdir()
    rewrite(before, b"old")
    for folder in kills.folders(before, rewrite, tmp_path):
        assert (folder / name).read_bytes() in (b"old", b"new")
        assert kills.runs(rewrite, folder)
        assert kills.contents(folder) == {name: b"new"} and os.listdir(folder) == [name]


@pytest.mark.parametrize(
    ("name", "needs_force"),
    [(f"x.{ending}", False) for ending in ("png", "npz", "gif", "webp", "html")]
    + [(f"x.{ending}", True) for ending in ("onnx", "engine", "json", "pt", "data")],
)
def test_the_one_rule_of_what_is_replaced_without_force(tmp_path, name, needs_force):
    check_output(tmp_path / name)
    (tmp_path / name).touch()
    check_output(tmp_path / name, force=True)
    if needs_force:
        with pytest.raises(OutputError, match="exists; replace it with --force"):
            check_output(tmp_path / name)
    else:
        check_output(tmp_path / name)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("force", [True, False])
def test_the_files_mode_follows_the_umask(tmp_path, umask, mode, force):
    before = os.umask(umask)
    try:
        with write(tmp_path / "out.bin", force=force) as temporary:
            temporary.write_bytes(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.bin").stat().st_mode) == mode


def test_a_link_is_replaced_and_what_it_names_is_kept(tmp_path):
    (tmp_path / "old.bin").write_bytes(b"old")
    (tmp_path / "link.bin").symlink_to("old.bin")
    with write(tmp_path / "link.bin") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "old.bin").read_bytes() == b"old"
    assert (tmp_path / "link.bin").read_bytes() == b"new"


def test_relative_names_are_taken_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with write("out.bin") as temporary:
        temporary.write_bytes(b"x")
    assert os.listdir(tmp_path) == ["out.bin"]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("missing/out.bin", "there is no folder .*missing"),
        ("", "is a folder; give the name of a file"),
        ("folder", "is a folder; give the name of a file"),
        ("file/out.bin", "there is no folder .*file"),
        ("x" * 300, "cannot be written"),
        ("x" * 300 + "/out.bin", "cannot be written"),
    ],
    ids=["missing folder", "the folder itself", "a folder", "a file for a folder", "too long", "a folder too long"],
)
def test_impossible_targets_are_refused_before_any_work(tmp_path, name, complaint):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=complaint) as caught:
        check_writable(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(OutputError, match=complaint), write(tmp_path / name):
        pytest.fail("the block must not run")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_the_longest_name_a_file_may_have_can_be_written(tmp_path):
    target = tmp_path / ("x" * 251 + ".bin")
    with write(target) as temporary:
        temporary.write_bytes(b"x")
    assert target.exists()


@as_root
def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(OutputError, match="no permission to write in"):
        check_writable(tmp_path / "locked" / "out.bin")


def test_checking_writes_nothing(tmp_path):
    check_writable(tmp_path / "out.bin", force=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "digest"),
    [  # FIPS 180-2's examples
        (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    ],
    ids=["empty", "abc", "a million a"],
)
def test_sha256_has_its_published_digests(tmp_path, content, digest):
    (tmp_path / "x").write_bytes(content)
    assert sha256(tmp_path / "x") == digest == hashlib.sha256(content).hexdigest()
