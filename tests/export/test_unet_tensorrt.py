"""The form for TensorRT: what the real parser makes of it, what it computes, and that the real builder takes it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import exports
import onnx
import pytest
import torch
from torch import nn

from cm_runtime import export, onnx_graph
from cm_runtime.backends.batch_profiles import parse_profiles
from cm_runtime.bench.networks import random_checkpoint
from cm_runtime.checkpoints.native import Checkpoint
from cm_runtime.errors import ArtifactError
from cm_runtime.export import from_onnx, to_tensorrt
from cm_runtime.export.to_tensorrt import BuildOptions
from cm_runtime.manifest import read_manifest
from cm_runtime.networks.consistency import build

trt = pytest.importorskip("tensorrt_rtx")

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels": ("boundary", {}),
    "blocks, summands, patch": ("edm", {}),
    "no classes": ("boundary", {"num_classes": 0}),
    "one group": ("boundary", {"norm_groups": 1}),
    "blocks, scales, labels": ("boundary", {"resample": "resblock", "attention": (4,), "norm_groups": 8}),
}
QUICK = ("labels",)


def checkpoint(name: str) -> Checkpoint:
    kind, changes = NETWORKS[name]
    plain = exports.checkpoint(kind)
    config = plain.config.model_copy(update={"network": plain.config.network.model_copy(update=changes)})
    return random_checkpoint(config) if changes else replace(plain, config=config)


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NETWORKS],
)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """A network, and its denoiser for TensorRT."""
    whole, path = checkpoint(request.param), tmp_path_factory.mktemp("tensorrt") / "m.onnx"
    export.onnx(whole, path, target="tensorrt")
    return whole, path


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def norms(whole: Checkpoint) -> list[nn.GroupNorm]:
    return [each for each in build(whole.config, "meta").modules() if isinstance(each, nn.GroupNorm)]


def parsed(path: Path, logger: Any) -> tuple[Any, Any]:
    """What the parser makes of a file, and what owns it."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), parser.get_error(0).desc()
    return network, (builder, parser)


def inputs(layer: Any) -> set[str]:
    return {tensor.name for i in range(layer.num_inputs) if (tensor := layer.get_input(i))}


def test_it_computes_what_torch_does(file: tuple[Checkpoint, Path]) -> None:
    """ONNX Runtime ran the very graph that TensorRT is given."""
    manifest = read_manifest(file[1])
    assert manifest.target == "tensorrt"
    assert manifest.parity is not None
    assert manifest.parity.max_abs < 1e-4
    assert manifest.parity.engine.startswith("onnxruntime ") and "defined" not in manifest.parity.engine


def test_every_normalisation_is_one_node_without_reshapes(file: tuple[Checkpoint, Path]) -> None:
    whole, path = file
    model = onnx.load(path)
    found, names = kinds(model), {init.name for init in model.graph.initializer}
    is_one = whole.config.network.norm_groups == 1
    assert found["LayerNormalization" if is_one else "GroupNormalization"] == len(norms(whole))
    assert found["GroupNormalization" if is_one else "LayerNormalization"] == found["InstanceNormalization"] == 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert set(node.input[1:]) <= names, node.name
    assert found["DepthToSpace"] == (whole.config.network.patch > 1)


def test_the_parser_makes_one_layer_of_each(file: tuple[Checkpoint, Path]) -> None:
    """With the groups, and the scale of each channel inside: INormalizationLayer, of version 2."""
    whole, path = file
    logger = trt.Logger(trt.Logger.ERROR)
    network, _owners = parsed(path, logger)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    normal = [layer for layer in layers if layer.type == trt.LayerType.NORMALIZATION]
    assert len(normal) == len(norms(whole))
    groups = whole.config.network.norm_groups
    for layer in normal:
        layer.__class__ = trt.INormalizationLayer
        images, scale = layer.get_input(0).shape, layer.get_input(1).shape
        assert layer.is_v2
        if groups == 1:  # all channels are one, in a shape of three sides
            assert (layer.num_groups, tuple(images)[1], layer.axes, len(images)) == (1, 1, 0b100, 3)
        else:
            assert (layer.num_groups, layer.axes, len(images)) == (groups or 32, 0b1100, 4)
            assert tuple(scale) == (1, images[1], 1, 1)


def test_attention_is_the_pattern_that_tensorrt_fuses(file: tuple[Checkpoint, Path]) -> None:
    """docs.nvidia.com, Fused Attention: Q, K and V are [B, N, S, H], and Q is multiplied before the first product."""
    logger = trt.Logger(trt.Logger.ERROR)
    network, _owners = parsed(file[1], logger)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    makers = {layer.get_output(0).name: layer for layer in layers}
    soft = [layer for layer in layers if layer.type == trt.LayerType.SOFTMAX]
    blocks = [name for name, _ in build(file[0].config, "meta").F.named_modules() if name.endswith(".qkv")]
    assert len(soft) == len(blocks) > 0
    for layer in soft:
        scores, product = makers[layer.get_input(0).name], layer
        while scores.type == trt.LayerType.SHUFFLE:  # around a softmax the parser has some, which do nothing here
            scores = makers[scores.get_input(0).name]
        while product.type != trt.LayerType.MATRIX_MULTIPLY:
            (product,) = [each for each in layers if product.get_output(0).name in inputs(each)]
        q, k, v = scores.get_input(0), scores.get_input(1), product.get_input(1)
        _, heads, pixels, dim = q.shape
        assert (scores.type, dim) == (trt.LayerType.MATRIX_MULTIPLY, 32)
        assert (tuple(k.shape)[1:], tuple(v.shape)[1:]) == ((heads, dim, pixels), (heads, pixels, dim))
        assert makers[makers[q.name].get_input(0).name].type == trt.LayerType.ELEMENTWISE


@pytest.mark.process
def test_the_builder_takes_it(file: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    options = BuildOptions(parse_profiles("1,2:4:8"), ("8.9",))
    manifest = to_tensorrt.build(file[1], tmp_path / "m.engine", "tensorrt_rtx", options)
    assert (manifest.model.target, manifest.bytes > 100_000) == ("tensorrt", True)


def test_half_the_layers_are_gone(file: tuple[Checkpoint, Path], boundary: exports.Files) -> None:
    """Of what the parser makes of the form of other engines: Reshapes, scales apart, weights that are computed."""
    if file[0].config != exports.checkpoint("boundary").config:
        pytest.skip("it is another network")
    logger = trt.Logger(trt.Logger.ERROR)
    plain, ours = (parsed(each, logger) for each in (boundary.onnx, file[1]))
    assert ours[0].num_layers < 0.6 * plain[0].num_layers


@pytest.mark.slow
@pytest.mark.parametrize("precision", exports.HALVES)
@pytest.mark.parametrize("graph", ["network", "sampler"])
def test_halves_and_samplers_build_too(tmp_path: Path, graph: Any, precision: Any) -> None:
    path = tmp_path / "m.onnx"
    export.onnx(exports.checkpoint("edm"), path, target="tensorrt", graph=graph, precision=precision)
    options = BuildOptions(parse_profiles("1:4:8"), ("8.9", "12.0"))
    assert to_tensorrt.build(path, tmp_path / "m.engine", "tensorrt_rtx", options).model.precision == precision


def test_its_checkpoint_is_recovered(file: tuple[Checkpoint, Path]) -> None:
    whole, path = file
    weights = from_onnx.recover(path, whole.config.network).ema[from_onnx.EMA]
    (stored,) = whole.ema.values()
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name].float()) for name in stored)


@pytest.mark.parametrize("groups", [0, 5, 64, -1])
def test_groups_that_do_not_divide_the_channels_are_refused(
    file: tuple[Checkpoint, Path], tmp_path: Path, groups: int
) -> None:
    model = onnx.load(file[1])
    node = next((node for node in model.graph.node if node.op_type == "GroupNormalization"), None)
    if node is None:
        pytest.skip("it has none")
    next(each for each in node.attribute if each.name == "num_groups").i = groups
    onnx.save(model, tmp_path / "m.onnx")
    manifest = read_manifest(tmp_path / "m.onnx")
    with pytest.raises(ArtifactError, match="GroupNormalization"):
        onnx_graph.check(tmp_path / "m.onnx", manifest).require_own(tmp_path / "m.onnx", "tensorrt")
