"""export/from_onnx.py: the checkpoint inside an exported file has the tensors that were exported, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import pytest
import torch

import cm_runtime as cm
from cm_runtime.backends import DEFAULT_MODEL
from cm_runtime.checkpoints.native import read_checkpoint
from cm_runtime.errors import ArtifactError
from cm_runtime.export.from_onnx import recover
from cm_runtime.manifest import read_manifest
from cm_runtime.networks.unet import UNetConfig


def network_of(files: exports.Files) -> UNetConfig:
    return read_checkpoint(files.checkpoint).config.network


@pytest.mark.covering(1)
@pytest.mark.parametrize("form", ["onnx", "inline", "half", "apart", "half_apart", "inline_apart"])
def test_every_tensor_comes_back_as_it_was_stored(each: exports.Files, form: str) -> None:
    original = read_checkpoint(each.half_checkpoint if "half" in form else each.checkpoint)
    found = recover(getattr(each, form), original.config.network)
    assert (found.config, found.training, found.sha256) == (original.config, original.training, original.sha256)
    (weights,), (expected,) = found.ema.values(), original.ema.values()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert weights[name].dtype == tensor.dtype, name
        assert torch.equal(weights[name], tensor), name
    found.model()


@pytest.mark.process
def test_the_bundled_model_is_what_its_file_computes() -> None:
    """It says its own network: its training is recorded."""
    found, ort = recover(DEFAULT_MODEL), cm.load()
    f, shape, label = found.model(), ort.manifest.image_shape, np.arange(3)
    assert found.sigmas == ort.manifest.sigmas
    for k, sigma in enumerate((80.0, 1.1, 0.01)):
        x = cm.noise.normal(0, np.arange(3, dtype=np.uint64), k, shape) * np.float32((sigma**2 + 0.25) ** 0.5)
        with torch.inference_mode():
            x0 = f(torch.from_numpy(x), torch.full((3,), sigma), torch.from_numpy(label)).numpy()
        assert np.abs(x0 - ort.denoise(x, sigma, label)).max() < 1e-4


def recorded(files: exports.Files, folder: Path, config: dict[str, Any]) -> Path:
    """The export, as if a run of that configuration had trained it."""
    said = json.loads(read_manifest(files.onnx).model_dump_json())
    said["training"]["config"] = config
    return exports.with_metadata(files.onnx, folder / "told.onnx", json.dumps(said))


def test_a_run_records_the_network_and_of_several_the_last_counts(boundary: exports.Files, tmp_path: Path) -> None:
    network = network_of(boundary)
    shape = network.model_dump(mode="json", exclude={"image_size", "image_channels", "num_classes"})
    runs = [{"config": {"network": {**shape, "channels": 64}}}, {"config": {"network": shape}}]
    for config in ({"network": shape}, {"runs": runs}):
        assert recover(recorded(boundary, tmp_path, config)).config.network == network


@pytest.mark.parametrize(
    "config", [{}, {"network": None}, {"network": 3}, {"runs": []}, {"runs": [1]}, {"runs": [{}]}, {"runs": {"a": 1}}]
)
def test_without_a_recorded_network_the_checkpoint_itself_is_asked_for(
    boundary: exports.Files, tmp_path: Path, config: dict[str, Any]
) -> None:
    with pytest.raises(ArtifactError, match=r"told\.onnx does not say its network's shape: use the checkpoint"):
        recover(recorded(boundary, tmp_path, config))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"channels": 64}, r"its weights are not those of its network: F\.time_embed\.0\.weight is \(128, 32\)"),
        ({"res_blocks": 2}, "its weights are not those of its network"),
        ({"resample": "resblock"}, "its weights are not those of its network"),
        ({"image_size": 16}, "is for other images or classes than its network"),
        ({"num_classes": 0}, "is for other images or classes than its network"),
        ({"scale_shift": False}, r"emb_layers\.1\.weight is \(64, 128\) and should be \(32, 128\)"),
        ({"patch": 2}, r"F\.input_blocks\.0\.0\.weight is \(32, 3, 3, 3\) and should be \(32, 12, 3, 3\)"),
    ],
)
def test_another_network_is_refused(boundary: exports.Files, changes: dict[str, Any], complaint: str) -> None:
    network = UNetConfig.model_validate({**network_of(boundary).model_dump(), **changes})
    with pytest.raises(ArtifactError, match=complaint):
        recover(boundary.onnx, network)


def test_a_recorded_network_that_is_none_is_refused(boundary: exports.Files, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="records no network of ours"):
        recover(recorded(boundary, tmp_path, {"network": {"channels": "many"}}))


def test_weights_cut_short_are_refused(boundary: exports.Files, tmp_path: Path) -> None:
    path = exports.copied(boundary.apart, tmp_path)
    data = exports.data_file(path)
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="damaged or cut short"):
        recover(path, network_of(boundary))
    data.unlink()
    with pytest.raises(ArtifactError, match="its weights are not there"):
        recover(path, network_of(boundary))


def test_only_the_manifests_data_file_is_opened(boundary: exports.Files, tmp_path: Path) -> None:
    path = exports.copied(boundary.apart, tmp_path)
    graph = onnx.load(path, load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "/etc/passwd"
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(ArtifactError, match="damaged"):
        recover(path, network_of(boundary))


@pytest.mark.process
@pytest.mark.parametrize("how", [{"graph": "sampler"}, {"precision": "fp16"}])
def test_a_file_without_all_of_the_weights_is_refused(boundary: exports.Files, how: dict[str, Any]) -> None:
    path = boundary.exported(**how)
    with pytest.raises(ArtifactError, match="without all of its checkpoint"):
        recover(path, network_of(boundary))


def test_a_missing_weight_is_named(boundary: exports.Files, tmp_path: Path) -> None:
    graph = onnx.load(boundary.onnx)
    for part in (*graph.graph.initializer, *graph.graph.node):
        if part.name == "F.label_emb.weight":
            part.name = "other"
    onnx.save(graph, tmp_path / "m.onnx")
    with pytest.raises(ArtifactError, match=r"missing F\.label_emb\.weight"):
        recover(tmp_path / "m.onnx", network_of(boundary))
