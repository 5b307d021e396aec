"""Every reader's opener: what is no regular file is refused in one line, before a byte of it is read."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.progress import Progress

from cm_runtime.backends import DEFAULT_MODEL, engine_file, measurements
from cm_runtime.checkpoints import diffusers, load, native
from cm_runtime.errors import LONGEST, CmRuntimeError, ConfigError, RequestError
from cm_runtime.evaluate import sources, statistics
from cm_runtime.evaluate.extractor import Extractor
from cm_runtime.files import atomic, image_reader, inputs, npz, streams
from cm_runtime.manifest import data_path, read_manifest
from cm_runtime.onnx_graph.export_writer import write_manifest
from cm_runtime.training import lpips_weights
from cm_runtime.training.data.catalogue import RemoteFile
from cm_runtime.training.data.cifar import read_cifar_archive
from cm_runtime.training.data.download import fetch
from cm_runtime.training.data.folder import read_folder
from cm_runtime.training.data.idx import read_idx
from cm_runtime.training.data.npz import read_npz


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Unix socket by a short name: the kernel takes 107 bytes."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        yield tmp_path / "s"


def refused(path: str | Path, most: int = 100) -> str:
    with pytest.raises(ConfigError) as caught:
        streams.read_bytes(path, ConfigError, most)
    return str(caught.value)


def test_regular_file_is_read_through_links(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    (tmp_path / "link").symlink_to(file)
    assert streams.read_bytes(file, ConfigError, 100) == b"x" * 100
    assert streams.read_text(tmp_path / "link", ConfigError, 100) == "x" * 100
    assert streams.regular(tmp_path / "link", ConfigError).st_size == 100


def test_what_is_no_file_is_named(tmp_path: Path, listening: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="is a pipe, not"), streams.open_file(tmp_path / "pipe", ConfigError):
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
        streams.read_text(file, ConfigError, 100)


def test_exists_of_names_that_no_file_can_have(tmp_path: Path) -> None:
    assert streams.exists(tmp_path)
    assert not streams.exists(tmp_path / ("n" * 300))
    assert not streams.exists("a\0b")


def test_line_of_an_error_is_cut_in_its_middle() -> None:
    line = str(RequestError("begin " + "x\n" * 100_000 + " end"))
    assert line.startswith("begin ") and line.endswith(" end") and "[...]" in line
    assert len(line) <= LONGEST + 10 and "\n" not in line
    assert isinstance(RequestError("x"), CmRuntimeError)


# Readers: each takes a path and refuses what is no file, at once and in one line

Reader = Callable[[Path], object]


def beside(name: str, reader: Reader, *others: tuple[str, str]) -> Reader:
    """A reader of a folder in which ``name`` is the path that is tried, beside files of those names and texts."""

    def read(path: Path) -> object:
        folder = path.parent / "folder"
        folder.mkdir()
        for other, text in others:
            (folder / other).write_text(text)
        (folder / name).symlink_to(path)
        return reader(folder)

    return read


def data_file(path: Path) -> object:
    """The weights beside an exported file."""
    manifest = read_manifest(DEFAULT_MODEL).model_copy(update={"data_file": "model-0123456789ab.data"})
    path.with_name("model-0123456789ab.data").symlink_to(path)
    return data_path(path.with_name("model.onnx"), manifest)


WEIGHTS = "diffusion_pytorch_model"
READERS: dict[str, Reader] = {
    "manifest": read_manifest,
    "new manifest": lambda path: write_manifest(path, path.with_name("o.onnx"), read_manifest(DEFAULT_MODEL)),
    "checkpoint": native.read_checkpoint,
    "safetensors": native.load_safetensors,
    "any checkpoint": load.load_checkpoint,
    "LPIPS": lambda path: lpips_weights.read_weights([path]),
    "engine": engine_file.read_engine_manifest,
    "npz": npz.keys,
    "arrays": lambda path: inputs._arrays(path, 1, [(4, 4)]),
    "data set npz": lambda path: read_npz(path, "x"),
    "samples": sources.open_samples,
    "statistics": statistics.read_statistics,
    "extractor": lambda path: Extractor(path),
    "hash": atomic.sha256,
    "picture": lambda path: image_reader.read(path, 1),
    "grey": image_reader.is_grey,
    "size": image_reader.size_of,
    "mask": lambda path: inputs.read_mask(path, [], (4, 4)),
    "IDX": lambda path: read_idx(path, 3),
    "CIFAR": lambda path: read_cifar_archive(path, "train", "x"),
    "download": lambda path: fetch(path, RemoteFile("0" * 64, 1, ("http://127.0.0.1:9/x",))),
}
IN_FOLDERS: dict[str, Reader] = {
    "data file": data_file,
    "diffusers": beside("config.json", load.load_checkpoint),
    "scheduler": beside("scheduler_config.json", load.load_checkpoint, ("config.json", "{}")),
    "weights": beside(f"{WEIGHTS}.bin", lambda folder: diffusers._tensors(diffusers._weights(folder))),
    "index": beside(f"{WEIGHTS}.bin.index.json", diffusers._weights),
    "folder of pictures": lambda path: read_folder(path.parent, "train", "x", image_size=4, bar=Progress(disable=True)),
}
SPECIAL = ("pipe", "socket", "device", "folder", "loop", "NUL", "long")


@pytest.mark.parametrize("kind", SPECIAL)
def test_readers_refuse_what_is_no_file(tmp_path: Path, listening: Path, kind: str) -> None:
    has_name = kind not in ("NUL", "long")
    signal.alarm(30)  # ends a reader that waits
    try:
        for name, reader in (READERS | IN_FOLDERS if has_name else READERS).items():
            folder = tmp_path / name
            folder.mkdir()
            path = folder / {"NUL": "a\0b.png", "long": "n" * 300}.get(kind, "x.png")
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "folder":
                path.mkdir()
            elif has_name:
                path.symlink_to({"socket": listening, "device": Path("/dev/zero"), "loop": path}[kind])
            with pytest.raises(CmRuntimeError) as caught:
                reader(path)
            assert str(caught.value).isprintable() and len(str(caught.value)) < LONGEST + 10, name
    finally:
        signal.alarm(0)


def test_a_choice_that_is_no_file_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "folder", lambda: tmp_path)
    question: Any = SimpleNamespace(key="key", names=("ort",))
    (tmp_path / "key.json").symlink_to("/dev/zero")
    assert measurements.load(question) is None
