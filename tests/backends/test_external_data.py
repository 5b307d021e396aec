"""Models whose files are links, as a hub's cache, a Nix store or a mounted volume keeps them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import exports
import numpy as np
import onnx
import onnxruntime
import pytest

import cm_runtime as cm
from cm_runtime.backends import external_data, openvino
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends.openvino import OpenVinoBackend
from cm_runtime.backends.ort import OrtBackend
from cm_runtime.errors import ArtifactError, EngineError
from cm_runtime.manifest import read_manifest

ENGINES = {"ort": OrtBackend, "openvino": OpenVinoBackend}
FORMS = ("both", "data alone", "model alone", "folder")


@pytest.fixture
def linked(boundary: exports.Files, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an export with its weights beside it, some of it behind links that have other names."""

    def make(form: str) -> Path:
        store, folder = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
        store.mkdir()
        folder.mkdir(parents=True)
        path = exports.copied(boundary.apart, folder)
        if form == "folder":
            (tmp_path / "here").symlink_to(folder)
            return tmp_path / "here" / path.name
        for file in {"both": [path, exports.data_file(path)], "data alone": [exports.data_file(path)]}.get(
            form, [path]
        ):
            blob = store / f"blob{file.suffix[1]}"
            shutil.move(file, blob)
            file.symlink_to(os.path.relpath(blob, folder))
        return path

    return make


@pytest.mark.process
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_a_model_behind_links_draws_what_it_draws_without(
    boundary: exports.Files, linked: Callable[[str], Path], form: str, engine: str
) -> None:
    request = {"x": np.full((2, 3, 8, 8), 0.5, np.float32), "sigma": 2.0, "label": 1}
    expected = OrtBackend(boundary.apart, options=EngineOptions(device="cpu", threads=1)).denoise(**request)  # type: ignore[arg-type]
    made = ENGINES[engine](linked(form), options=EngineOptions(device="cpu", threads=1)).denoise(**request)  # type: ignore[arg-type]
    assert np.array_equal(made, expected) if engine == "ort" else np.abs(made - expected).max() < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("damage", ["a byte short", "empty", "dangling"])
def test_damaged_weights_behind_a_link_are_one_line(linked: Callable[[str], Path], damage: str, engine: str) -> None:
    path = linked("both")
    data = exports.data_file(path)
    real = data.resolve()
    if damage == "dangling":
        real.unlink()
    else:
        real.write_bytes(real.read_bytes()[:-1] if damage == "a byte short" else b"")
    with pytest.raises(ArtifactError, match=data.name) as caught:
        ENGINES[engine](path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"), [("location", "../x.data"), ("location", "/etc/passwd"), ("offset", "-1"), ("length", "9" * 12)]
)
def test_no_address_lies_outside_of_the_data_file(linked: Callable[[str], Path], key: str, value: str) -> None:
    path = linked("data alone")
    graph = onnx.load(path, load_external_data=False)
    tensor = next(each for each in graph.graph.initializer if each.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    path.write_bytes(graph.SerializeToString())
    data = external_data.map_link(external_data.data_file(path, read_manifest(path)))
    assert data is not None
    with pytest.raises(ArtifactError, match="damaged or cut short"):
        external_data.embed_addresses(path, data)


def test_only_the_places_of_weights_are_rewritten(linked: Callable[[str], Path]) -> None:
    """The onnx package reads the same model, and each address holds the tensor's own bytes."""
    path = linked("data alone")
    data = external_data.map_link(external_data.data_file(path, read_manifest(path)))
    assert data is not None
    plain, changed = (
        onnx.load(path, load_external_data=False),
        onnx.load_from_string(external_data.embed_addresses(path, data)),
    )
    for before, after in zip(plain.graph.initializer, changed.graph.initializer, strict=True):
        old, new = ({entry.key: entry.value for entry in each.external_data} for each in (before, after))
        if old:
            assert new["location"] == external_data.IN_MEMORY and new["length"] == old["length"]
            assert int(new["offset"]) - data.content.ctypes.data == int(old["offset"])
        del before.external_data[:], after.external_data[:]
    assert changed == plain


def test_auto_takes_the_engine_that_can(
    linked: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(model: Path | bytes) -> None:
        raise RuntimeError("in-memory weights are not supported")

    monkeypatch.setattr(openvino, "read_model", refuse)
    path = linked("both")
    assert cm.load(path).name == "ort"
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == (
        f"auto does without openvino: {path}: OpenVINO cannot load it with its weights behind a link:"
        " in-memory weights are not supported"
    )


def test_an_older_onnx_runtime_says_why(linked: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(onnxruntime.SessionOptions, "add_external_initializers_from_files_in_memory")
    with pytest.raises(EngineError, match=r"ONNX Runtime before 1\.24 cannot read weights behind a link"):
        OrtBackend(linked("both"))
