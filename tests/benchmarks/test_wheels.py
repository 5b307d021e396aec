"""Wheels that travel in bundles: no bundle is too large, and what is installed is what was gathered."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import wheels


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A package of 3 MB that no compression makes smaller."""
    path = tmp_path / "carried-1.0-py3-none-any.whl"
    content = np.random.default_rng(0).bytes(3_000_000)
    files = {
        "carried/__init__.py": b"",
        "carried/data.bin": content,
        "carried-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n",
        "carried-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("carried-1.0.dist-info/RECORD", "".join(f"{name},,\n" for name in files))
    return path


@pytest.mark.process
def test_pieces_that_come_one_after_another_are_installed_whole(tmp_path: Path, wheel: Path) -> None:
    bundles = wheels.split("set", [wheel], tmp_path / "bundles", most=1_000_000)
    assert [path.name for path in bundles] == [f"set-{n}-of-4.bundle" for n in range(1, 5)]
    assert all(path.stat().st_size <= 1_000_000 for path in bundles)
    there = tmp_path / "there"
    assert wheels.install(bundles[2:], there) == ["set: 2 of 4 bundles are missing: 1, 2"]
    assert not (there / "site").exists()
    assert wheels.install(bundles[:2], there) == [f"set: 1 wheels in {there / 'site'}"]
    with zipfile.ZipFile(wheel) as archive:
        assert (there / "site" / "carried" / "data.bin").read_bytes() == archive.read("carried/data.bin")


@pytest.mark.parametrize("at", [300, -1], ids=["early", "late"])
def test_a_damaged_or_short_piece_is_refused(tmp_path: Path, wheel: Path, at: int) -> None:
    first, *_ = wheels.split("set", [wheel], tmp_path / "bundles", most=1_000_000)
    content = bytearray(first.read_bytes())
    content[at] ^= 1
    first.write_bytes(content)
    with pytest.raises(SystemExit, match=r"set-1-of-4.bundle is damaged: carry it again"):
        wheels.install([first], tmp_path / "there")
    first.write_bytes(content[:-1])
    with pytest.raises(SystemExit, match="is damaged"):
        wheels.install([first], tmp_path / "there")


def test_bundles_of_two_gatherings_do_not_meet(tmp_path: Path, wheel: Path) -> None:
    old = wheels.split("set", [wheel], tmp_path / "old", most=1_000_000)
    wheel.write_bytes(wheel.read_bytes() + b" ")
    new = wheels.split("set", [wheel], tmp_path / "new", most=1_000_000)
    wheels.install(old[:2], tmp_path / "there")
    assert wheels.install(new[2:], tmp_path / "there") == ["set: 2 of 4 bundles are missing: 1, 2"]


def test_wheels_are_asked_for_as_the_gpu_machine_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Binary ones of its Python; those of a package with its needs, or alone, as the set says."""
    asked: list[list[str]] = []

    def download(words: list[str], check: bool) -> None:
        asked.append(words)
        (Path(words[words.index("-d") + 1]) / "a-1-py3-none-any.whl").touch()

    monkeypatch.setattr(subprocess, "run", download)
    wheels.main(["gather", "-o", str(tmp_path / "bundles")])
    base, ort = (" ".join(words) for words in asked)
    assert all("--only-binary=:all: --implementation cp --python-version 3.12" in words for words in (base, ort))
    assert base.endswith("pydantic typer rich pillow") and "--no-deps" not in base
    assert ort.endswith("--no-deps onnxruntime-gpu")
    assert {path.name for path in (tmp_path / "bundles").iterdir()} == {
        "base-1-of-1.bundle",
        "onnxruntime-gpu-1-of-1.bundle",
    }
    with pytest.raises(SystemExit):
        wheels.main(["gather", "other"])
