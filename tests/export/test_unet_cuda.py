"""The CUDA form: its operators by definitions of ours and of others, what it computes, and who may run it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch.nn import functional

import cm_runtime as cm
from cm_runtime import backends, export, onnx_graph
from cm_runtime.backends import auto
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends.openvino import OpenVinoBackend
from cm_runtime.backends.ort import OrtBackend
from cm_runtime.bench.networks import random_checkpoint
from cm_runtime.checkpoints.native import Checkpoint, read_checkpoint
from cm_runtime.errors import ArtifactError, EngineError, RequestError
from cm_runtime.export import contrib, from_onnx, to_onnx
from cm_runtime.manifest import read_manifest
from cm_runtime.onnx_graph.rules import CONTRIB

Array = NDArray[Any]
RANDOM = np.random.default_rng(3)
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels": ("boundary", {}),
    "blocks, summands, patch": ("edm", {}),
    "no classes": ("boundary", {"num_classes": 0}),
    "blocks, scales, labels": ("boundary", {"resample": "resblock", "attention": (4,)}),
}


def checkpoint(name: str) -> Checkpoint:
    """A tiny one whose normalisations have four channels in a group, as GroupNorm takes them."""
    kind, changes = NETWORKS[name]
    plain = exports.checkpoint(kind)
    network = plain.config.network.model_copy(update={"norm_groups": 8, **changes})
    weights = plain.ema["0.999"]
    config = plain.config.model_copy(update={"network": network})
    return random_checkpoint(config) if changes else replace(plain, config=config, ema={"0.999": weights})


QUICK = ("labels",)


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NETWORKS],
)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of one network, in both forms: cpu.onnx and cuda.onnx are denoisers, sampler.onnx and half.onnx are not."""
    folder = tmp_path_factory.mktemp("cuda")
    whole = checkpoint(request.param)
    made = {name: folder / f"{name}.onnx" for name in ("cpu", "cuda", "sampler", "half")}
    export.onnx(whole, made["cpu"])
    export.onnx(whole, made["cuda"], target="cuda")
    export.onnx(whole, made["sampler"], target="cuda", graph="sampler", steps=2)
    export.onnx(whole, made["half"], target="cuda", graph="network", precision="fp16")
    return made


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda") / "m.onnx"
    export.onnx(checkpoint("labels"), path, target="cuda")
    return path


# The operators


class NhwcConv(OpRun):
    op_domain = CONTRIB

    def _run(self, X: Array, W: Array, B: Array, **how: Any) -> tuple[Array]:
        x, w = (torch.from_numpy(each.astype(np.float32)).permute(0, 3, 1, 2) for each in (X, W))
        pads = how.get("pads") or [0, 0, 0, 0]
        assert pads[:2] == pads[2:]
        y = functional.conv2d(x, w, torch.from_numpy(B.astype(np.float32)), how.get("strides") or 1, tuple(pads[:2]))
        return (np.ascontiguousarray(y.permute(0, 2, 3, 1).numpy()).astype(X.dtype),)


class GroupNorm(OpRun):
    op_domain = CONTRIB

    def _run(self, X: Array, gamma: Array, beta: Array, **how: Any) -> tuple[Array]:
        x = torch.from_numpy(X.astype(np.float32)).permute(0, 3, 1, 2)
        y = functional.group_norm(x, how["groups"], *map(torch.tensor, (gamma, beta)), eps=how["epsilon"])
        y = functional.silu(y) if how["activation"] else y
        return (np.ascontiguousarray(y.permute(0, 2, 3, 1).numpy()).astype(X.dtype),)


class MultiHeadAttention(OpRun):
    op_domain = CONTRIB

    def _run(self, *qkv: Array, **how: Any) -> tuple[Array]:
        n, pixels, c = qkv[0].shape
        heads = how["num_heads"]
        split = (torch.from_numpy(e.astype(np.float32)).reshape(n, pixels, heads, c // heads) for e in qkv)
        q, k, v = (each.transpose(1, 2) for each in split)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, pixels, c)
        return (mixed.numpy().astype(qkv[0].dtype),)


class QuickGelu(OpRun):
    op_domain = CONTRIB

    def _run(self, X: Array, alpha: float = 1.702) -> tuple[Array]:
        x = torch.from_numpy(X.astype(np.float32))
        return ((x * torch.sigmoid(alpha * x)).numpy().astype(X.dtype),)


OPERATORS: list[Any] = [NhwcConv, GroupNorm, MultiHeadAttention, QuickGelu]
CASES: dict[str, tuple[str, list[tuple[int, ...]], dict[str, Any]]] = {
    "3x3": ("NhwcConv", [(2, 7, 5, 3), (4, 3, 3, 3), (4,)], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    "strided": (
        "NhwcConv",
        [(1, 8, 8, 6), (2, 3, 3, 6), (2,)],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    ),
    "1x1": ("NhwcConv", [(3, 1, 7, 255), (7, 1, 1, 255), (7,)], {"kernel_shape": [1, 1]}),
    "silu": (
        "GroupNorm",
        [(2, 3, 7, 12), (12,), (12,)],
        {"groups": 3, "epsilon": 1e-5, "activation": 1, "channels_last": 1},
    ),
    "no silu, one pixel": (
        "GroupNorm",
        [(3, 1, 1, 64), (64,), (64,)],
        {"groups": 32, "epsilon": 0.25, "activation": 0, "channels_last": 1},
    ),
    "heads": ("MultiHeadAttention", [(2, 7, 24)] * 3, {"num_heads": 3}),
    "one head": ("MultiHeadAttention", [(1, 255, 8)] * 3, {"num_heads": 1}),
    "gelu": ("QuickGelu", [(3, 7, 1)], {"alpha": 1.0}),
}


def graph_of(case: str, kind: int) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """One operator as a model, and its inputs."""
    name, shapes, how = CASES[case]
    types = [TensorProto.FLOAT if name == "GroupNorm" and i else kind for i in range(len(shapes))]
    feed = {
        f"i{i}": RANDOM.standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(to))
        for i, (shape, to) in enumerate(zip(shapes, types, strict=True))
    }
    node = helper.make_node(name, list(feed), ["y"], domain=CONTRIB, **how)
    ports = [helper.make_tensor_value_info(each, to, feed[each].shape) for each, to in zip(feed, types, strict=True)]
    out = helper.make_tensor_value_info("y", kind, None)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(helper.make_graph([node], "g", ports, [out]), opset_imports=opsets, ir_version=10), feed


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
@pytest.mark.parametrize("case", CASES)
def test_a_definition_computes_what_torch_computes(case: str, kind: int) -> None:
    model, feed = graph_of(case, kind)
    (wanted,) = ReferenceEvaluator(model, new_ops=OPERATORS).run(None, feed)
    contrib.define(model)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert np.abs(found.astype(float) - wanted).max() < (2e-5 if kind == TensorProto.FLOAT else 1e-2)


@pytest.mark.parametrize("case", ["heads", "one head", "gelu"])
def test_a_definition_computes_what_onnx_runtime_computes_where_its_cpu_can(case: str) -> None:
    model, feed = graph_of(case, TensorProto.FLOAT)
    (wanted,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
    contrib.define(model)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
    assert np.abs(found - wanted).max() < 2e-5


# The files


def feed_of(path: Path, n: int) -> dict[str, Array]:
    manifest = read_manifest(path)
    sigma = np.geomspace(80, 0.01, n).astype(np.float32)
    x = RANDOM.standard_normal((n, *manifest.image_shape)).astype(np.float32) * sigma.reshape(-1, 1, 1, 1)
    labels = {"label": np.arange(n) % manifest.num_classes} if manifest.num_classes else {}
    return {"x": x, "sigma": sigma, **labels}


@pytest.mark.process
@pytest.mark.parametrize("n", [1, 3])
def test_the_file_itself_computes_what_the_standard_form_does(files: dict[str, Path], n: int) -> None:
    """Its own bytes, by an evaluator that knows the operators from torch alone."""
    feed = feed_of(files["cpu"], n)
    (wanted,) = onnxruntime.InferenceSession(str(files["cpu"])).run(None, feed)
    (found,) = ReferenceEvaluator(str(files["cuda"]), new_ops=OPERATORS).run(None, feed)
    assert wanted.std() > 0.1
    assert np.abs(found - wanted).max() < 1e-4


@pytest.mark.process
def test_every_file_is_proved_and_ours(files: dict[str, Path]) -> None:
    for name, path in files.items():
        manifest = read_manifest(path)
        assert manifest.target == ("cpu" if name == "cpu" else "cuda")
        assert manifest.parity is not None
        assert onnx_graph.check(path, manifest) == ("",)
        if name != "cpu":
            assert "operators of cuda defined" in manifest.parity.engine
            with pytest.raises(ArtifactError, match=r"com\.microsoft::NhwcConv"):
                onnx_graph.check(path, manifest.model_copy(update={"target": "cpu"}))
    assert {path.suffix for path in files["cpu"].parent.iterdir()} == {".onnx"}  # no copy is left
    assert len(list(files["cpu"].parent.iterdir())) == len(files)


@pytest.mark.process
def test_feature_maps_are_nhwc_from_end_to_end(files: dict[str, Path]) -> None:
    """No convolution, normalisation or SiLU of the standard form is left, and images turn at both ends alone."""
    for name in ("cuda", "half", "sampler"):
        nodes = onnx.load(files[name]).graph.node
        kinds = {(node.domain, node.op_type) for node in nodes}
        assert {(CONTRIB, kind) for kind in ("NhwcConv", "GroupNorm", "MultiHeadAttention")} <= kinds
        assert not {kind for domain, kind in kinds if not domain} & {"Conv", "InstanceNormalization", "Softmax"}
        weights = {tensor.name for tensor in onnx.load(files[name]).graph.initializer}
        weights |= {value for node in nodes if node.op_type in ("Split", "Cast") for value in node.output}
        turns = [node for node in nodes if node.op_type == "Transpose" and node.input[0] not in weights]
        pools = sum(node.op_type == "AveragePool" for node in nodes)
        steps = 2 if name == "sampler" else 1
        patches = sum("input_blocks.0.0" in node.name for node in turns) - steps
        assert len(turns) == 2 * steps + 2 * pools + patches + (name == "sampler")
        kernels = [node.input[0] for node in nodes if node.op_type == "Transpose" and node.input[0] in weights]
        assert len(kernels) == len(set(kernels))  # each weight is turned once, however many steps there are


@pytest.mark.process
def test_a_checkpoint_comes_back_from_it(labelled: Path) -> None:
    whole = checkpoint("labels")
    back = from_onnx.recover(labelled, whole.config.network)
    assert all(torch.equal(back.ema["exported"][name], tensor) for name, tensor in whole.ema["0.999"].items())


@pytest.mark.process
def test_weights_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "LARGEST_INSIDE", 0)
    manifest = export.onnx(checkpoint("labels"), tmp_path / "m.onnx", target="cuda").manifest
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", manifest.data_file}


# Who may run it


@pytest.mark.parametrize("engine", [OrtBackend, OpenVinoBackend])
def test_an_engine_of_the_cpu_refuses_it_with_one_line(labelled: Path, engine: Any) -> None:
    with pytest.raises(EngineError, match=r"m\.onnx was exported for cuda: .* --for cpu") as caught:
        engine(labelled)
    assert "\n" not in str(caught.value)


def test_auto_refuses_it_without_a_gpu_and_takes_it_with_one(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="exported for cuda"):
        cm.load(labelled)
    manifest = read_manifest(labelled)
    assert auto.candidates(manifest, "cpu", "auto") == ()
    assert auto.candidates(manifest, "cuda:0", "auto") == ("ort",)
    opened: list[EngineOptions] = []
    monkeypatch.setattr(backends, "has_cuda", lambda: True)
    monkeypatch.setattr(backends, "OrtBackend", lambda path, manifest, options, verdict: opened.append(options))
    cm.load(labelled)
    assert [options.device for options in opened] == ["cuda:0"]


def test_bf16_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no bf16"):
        export.onnx(checkpoint("labels"), tmp_path / "m.onnx", target="cuda", precision="bf16")


def test_a_group_of_an_odd_number_of_channels_is_refused_with_one_line(boundary: exports.Files, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"1 channel in a group; export it with --for cpu") as caught:
        export.onnx(read_checkpoint(boundary.checkpoint), tmp_path / "m.onnx", target="cuda")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_standard_forms_manifest_does_not_speak_of_it(boundary: exports.Files) -> None:
    (entry,) = onnx.load(boundary.onnx).metadata_props
    assert "target" not in json.loads(entry.value)
    assert read_manifest(boundary.onnx).target == "cpu"
