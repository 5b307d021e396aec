"""Every reader's opener: what is no regular file is refused in one line, before a byte of it is read."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cm_runtime import bounded
from cm_runtime.errors import LONGEST, CmRuntimeError, ConfigError, RequestError


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Unix socket by a short name: the kernel takes 107 bytes."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        yield tmp_path / "s"


def refused(path: str | Path, most: int = 100) -> str:
    with pytest.raises(ConfigError) as caught:
        bounded.read_bytes(path, ConfigError, most)
    return str(caught.value)


def test_regular_file_is_read_through_links(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    (tmp_path / "link").symlink_to(file)
    assert bounded.read_bytes(file, ConfigError, 100) == b"x" * 100
    assert bounded.read_text(tmp_path / "link", ConfigError, 100) == "x" * 100
    assert bounded.regular(tmp_path / "link", ConfigError).st_size == 100


def test_what_is_no_file_is_named(tmp_path: Path, listening: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="is a pipe, not"), bounded.opened(tmp_path / "pipe", ConfigError):
        pass
    assert "is a pipe, not" in refused(tmp_path / "pipe")
    assert "is a socket, not" in refused(listening)
    assert "is a device, not" in refused(tmp_path / "zero")
    assert "is a folder, not" in refused(tmp_path)
    assert "leads back to itself" in refused(tmp_path / "loop")
    assert "no such file" in refused(tmp_path / "absent")
    assert "name too long" in refused(tmp_path / ("n" * 300))
    assert "no file can have such a name" in refused(f"{tmp_path}/a\0b")


def test_size_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 101)
    assert "101 bytes" in refused(file)
    assert "over 0 bytes" in refused("/proc/self/status", 0)  # its size is 0, its content is not


def test_text_must_be_utf8(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        bounded.read_text(file, ConfigError, 100)


def test_exists_of_names_that_no_file_can_have(tmp_path: Path) -> None:
    assert bounded.exists(tmp_path)
    assert not bounded.exists(tmp_path / ("n" * 300))
    assert not bounded.exists("a\0b")


def test_line_of_an_error_is_cut_in_its_middle() -> None:
    line = str(RequestError("begin " + "x\n" * 100_000 + " end"))
    assert line.startswith("begin ") and line.endswith(" end") and "[...]" in line
    assert len(line) <= LONGEST + 10 and "\n" not in line
    assert isinstance(RequestError("x"), CmRuntimeError)
