"""The arithmetic counted on a graph, against what torch counts while it runs the network."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.utils.flop_counter import FlopCounterMode

from cm_runtime.backends import DEFAULT_MODEL
from cm_runtime.bench.flops import gflop
from cm_runtime.errors import ArtifactError, MissingExtraError
from cm_runtime.manifest import METADATA_KEY, Manifest, read_manifest
from cm_runtime.networks.consistency import ConsistencyModel, ModelConfig, build
from cm_runtime.networks.unet import ResBlock, Upsample


@pytest.fixture(scope="session", params=exports.KINDS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> exports.Files:
    return exports.Files(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def boundary(tmp_path_factory: pytest.TempPathFactory) -> exports.Files:
    return exports.Files("boundary", tmp_path_factory)


def counted_by_torch(model: ConsistencyModel) -> float:
    """GFLOP of one image, in the operators that torch runs; of an upsampled image's 3x3 convolution, 4 taps of 9."""
    network = model.config.network
    label = torch.zeros(1, dtype=torch.int64) if network.num_classes else None
    upsampled = [m.conv for m in model.modules() if isinstance(m, Upsample) and m.conv is not None]
    upsampled += [
        m.in_layers[-1] for m in model.modules() if isinstance(m, ResBlock) and isinstance(m.resample, Upsample)
    ]
    saved = []

    def count(conv: torch.nn.Conv2d, _: object, out: torch.Tensor) -> None:
        saved.append(2 * 5 * conv.in_channels * out[0].numel())

    hooks = [conv.register_forward_hook(count) for conv in upsampled]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *model.config.image_shape), torch.ones(1), label)
    for hook in hooks:
        hook.remove()
    assert saved
    return (counter.get_total_flops() - sum(saved)) / 1e9


@pytest.mark.parametrize("form", ["onnx", "inline", "half", "apart", "half_apart", "inline_apart"])
def test_a_graph_takes_what_its_network_takes(each: exports.Files, form: str) -> None:
    assert gflop(getattr(each, form)) == pytest.approx(counted_by_torch(each.model()), rel=1e-9)


def test_the_bundled_model_takes_what_its_network_takes() -> None:
    manifest = read_manifest(DEFAULT_MODEL)
    assert manifest.training is not None
    options = {**manifest.training.config["runs"][-1]["config"]["network"], "num_classes": manifest.num_classes}
    config = ModelConfig(network={**options, "image_size": 28, "image_channels": 1}, precond="edm", sigma_boundary=0)
    assert gflop(DEFAULT_MODEL) == pytest.approx(counted_by_torch(build(config).eval()), rel=1e-9)


def test_the_weights_beside_a_graph_are_not_read(boundary: exports.Files, tmp_path: Path) -> None:
    alone = Path(shutil.copy(boundary.apart, tmp_path / "alone.onnx"))
    assert gflop(alone) == gflop(boundary.onnx)


# Operators that our networks have and have not, by hand


@pytest.fixture
def graph(tmp_path: Path, make_manifest: Callable[..., Manifest]) -> Callable[..., Path]:
    """A file with one node, whose inputs have these shapes; the first is the batch's x, the others are weights."""

    def write(op: str, *shapes: list[Any], **attributes: Any) -> Path:
        names = ["x", *(f"w{i}" for i in range(1, len(shapes)))]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shapes[0])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        weights = [
            helper.make_tensor(name, TensorProto.FLOAT, shape, torch.zeros(*shape).numpy().tobytes(), raw=True)
            for name, shape in zip(names[1:], shapes[1:], strict=True)
        ]
        made = helper.make_graph([helper.make_node(op, names, ["y"], **attributes)], "g", [x], [y], weights)
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])
        helper.set_model_props(model, {METADATA_KEY: make_manifest().model_dump_json()})
        path = tmp_path / "graph.onnx"
        onnx.save(model, path)
        return path

    return write


@pytest.mark.parametrize(
    ("node", "attributes", "products"),
    [
        (("Conv", ["N", 6, 9, 7], [4, 3, 3, 1]), {"group": 2, "strides": [2, 1]}, 4 * 4 * 7 * 3 * 3),
        (("ConvTranspose", ["N", 6, 5, 7], [6, 2, 3, 4]), {"group": 2, "strides": [2, 2]}, 6 * 5 * 7 * 2 * 3 * 4),
        (("Gemm", ["N", 3], [3, 5]), {}, 3 * 5),
        (("Gemm", ["N", 3], [5, 3], [5]), {"transB": 1}, 3 * 5),
        (("Gemm", ["N", 3], [1, 5]), {"transA": 1}, 3 * 5),
        (("MatMul", ["N", 2, 3, 4], [4, 5]), {}, 2 * 3 * 4 * 5),
        (("MatMul", ["N", 1, 3, 4], [7, 4, 5]), {}, 7 * 3 * 4 * 5),
        (("MatMul", ["N", 3, 4], [4]), {}, 3 * 4),
    ],
)
def test_known_operators(
    graph: Callable[..., Path], node: tuple[Any, ...], attributes: dict[str, Any], products: int
) -> None:
    assert gflop(graph(*node, **attributes)) == pytest.approx(2 * products / 1e9, rel=1e-12)


def test_shapes_that_cannot_be_told_are_one_line(graph: Callable[..., Path]) -> None:
    for path in (graph("Conv", ["N", 3, "height", 8], [4, 3, 3, 3]), graph("MatMul", ["N", 3, 5], [4, 5])):
        with pytest.raises(ArtifactError, match=r"graph\.onnx: the shapes of .* cannot be told") as caught:
            gflop(path)
        assert "\n" not in str(caught.value)


def test_arithmetic_that_is_not_counted_is_not_left_out(graph: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactError, match="the arithmetic of Einsum cannot be counted"):
        gflop(graph("Einsum", ["N", 3], [3, 5], equation="ij,jk->ik"))


def test_a_damaged_file_is_refused(boundary: exports.Files, tmp_path: Path) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(boundary.onnx.read_bytes()[:-100_000])
    for path, words in ((cut, "truncated"), (tmp_path / "none.onnx", "no such file")):
        with pytest.raises(ArtifactError, match=words):
            gflop(path)


def test_without_onnx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"counting the arithmetic of a graph needs onnx: pip install"):
        gflop(DEFAULT_MODEL)
