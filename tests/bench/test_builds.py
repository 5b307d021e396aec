"""What --against may name."""

from __future__ import annotations

import io
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from exports import ROOT

from cm_runtime import backends
from cm_runtime.bench.builds import base_build, this_build
from cm_runtime.errors import RequestError

pytestmark = pytest.mark.process  # processes of git


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_this_build() -> None:
    found = this_build()
    assert found.root == ROOT and found.model is None
    assert found.commit.removesuffix("+") == git("rev-parse", "HEAD")


@pytest.mark.parametrize("name", ["HEAD", "HEAD~0"])
def test_a_revision(work: Path, name: str) -> None:
    """The tree of that commit, links included, and nothing left in the repository."""
    before = git("worktree", "list")
    found = base_build(name, work)
    assert found.commit == git("rev-parse", "HEAD") and found.root == work / "base"
    assert (found.root / "cm_runtime" / "export" / "graphs.py").is_file()
    assert (found.root / "cm_runtime" / "sampling.py").read_text() == git("show", "HEAD:cm_runtime/sampling.py") + "\n"
    assert git("worktree", "list") == before


def test_a_source_tree(work: Path, tmp_path: Path) -> None:
    (tmp_path / "tree" / "cm_runtime").mkdir(parents=True)
    (tmp_path / "tree" / "cm_runtime" / "__init__.py").touch()
    found = base_build(str(tmp_path / "tree"), work)
    assert found.root == tmp_path / "tree" and found.commit == ""  # no checkout of its own
    assert base_build(str(ROOT), work).commit == this_build().commit


def test_a_wheel(work: Path, tmp_path: Path) -> None:
    path = tmp_path / "cm_runtime-9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("cm_runtime/__init__.py", "__version__ = '9'\n")
        wheel.writestr("../outside.py", "")
    found = base_build(str(path), work)
    assert (found.root / "cm_runtime" / "__init__.py").read_text() == "__version__ = '9'\n"
    assert found.commit == path.name and not (work / "outside.py").exists()


def test_a_model_file(work: Path) -> None:
    found = base_build(str(backends.DEFAULT_MODEL), work)
    assert found.root == ROOT and found.model == backends.DEFAULT_MODEL


@pytest.mark.parametrize("name", ["", "--all", "HEAD:README.md", "no-such-revision", "README.md", "x.whl", "x.onnx"])
def test_nothing_of_the_kind(work: Path, name: str) -> None:
    with pytest.raises(RequestError, match="is no model file, wheel or source tree, nor a git revision"):
        base_build(name, work)


@pytest.mark.parametrize(("content", "wrong"), [(b"no zip", "is no wheel"), (None, "holds no cm_runtime")])
def test_a_wheel_that_is_none(work: Path, tmp_path: Path, content: bytes | None, wrong: str) -> None:
    path = tmp_path / "x.whl"
    if content is None:
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("other/__init__.py", "")
    else:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=wrong):
        base_build(str(path), work)


def _zip(*entries: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in entries:
            wheel.writestr(name, content)
    return file.getvalue()


PACKAGE = _zip(("cm_runtime/__init__.py", b"x = 1" * 100))
CENTRAL = PACKAGE.find(b"PK\x01\x02")  # its entry of the directory


def _changed(at: int, value: bytes) -> bytes:
    return PACKAGE[: CENTRAL + at] + value + PACKAGE[CENTRAL + at + len(value) :]


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (_changed(6, b"\x78"), "damaged: zip file version 12"),
        (_changed(8, b"\1"), "damaged: .* is encrypted"),
        (_changed(10, b"\x63"), "damaged: That compression method is not supported"),
        (_changed(16, b"\1\2\3\4"), "damaged: Bad CRC-32"),
        (_changed(24, b"\xff\xff\xff\x7f"), "unpacks to more than a build"),
        (PACKAGE[:40] + b"\xff" * 8 + PACKAGE[48:], "damaged"),
        (PACKAGE[: len(PACKAGE) // 2], "damaged: File is not a zip file"),
        (PACKAGE[:-1], "damaged"),
        (b"", "damaged"),
        (_zip(("cm_runtime", b""), ("cm_runtime/__init__.py", b"")), None),
        (_zip(("cm_runtime/__init__.py", b""), ("cm_runtime/__init__.py/x.py", b"")), "damaged"),
        (_zip(("cm_runtime/" + "x" * 300, b"")), "damaged: .*name too long"),
        (_zip(("../cm_runtime/__init__.py", b"")), "holds no cm_runtime"),
        (_zip(("cm_runtime/../../x.py", b""), ("cm_runtime/__init__.py", b"")), None),
        (_zip(("x.data/purelib/cm_runtime/__init__.py", b"")), "holds no cm_runtime"),
        (_zip(*((f"cm_runtime/{n}", b"") for n in range(10_001))), "unpacks to more than a build"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # and no times of archives
)
def test_wheels_of_all_kinds(work: Path, tmp_path: Path, content: bytes, wrong: str | None) -> None:
    path = tmp_path / "x.whl"
    path.write_bytes(content)
    if wrong is None:
        assert (base_build(str(path), work).root / "cm_runtime" / "__init__.py").is_file()
    else:
        with pytest.raises(RequestError, match=wrong) as caught:
            base_build(str(path), work)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not [each for each in tmp_path.rglob("x.py") if not each.is_relative_to(work / "base")]


@pytest.mark.parametrize("name", ["pipe.whl", "x" * 300, "x" * 300 + ".whl", "a\0b", "a\0b.whl"])
def test_names_of_no_wheel(work: Path, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe.whl")
    with pytest.raises(RequestError, match=r"is a pipe|is no model file"):
        base_build(str(tmp_path / name), work)
