"""Graphs that hurt engines, each refused before one sees it; and all that export writes, which every engine runs."""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import cm_runtime as cm
from cm_runtime import backends, onnx_graph
from cm_runtime.checkpoints.native import read_checkpoint
from cm_runtime.errors import ArtifactError, CmRuntimeError
from cm_runtime.evaluate.extractor import SHIPPED, Extractor
from cm_runtime.export import graphs
from cm_runtime.files import protobuf
from cm_runtime.manifest import Manifest, read_manifest
from cm_runtime.onnx_graph import message, operators
from cm_runtime.onnx_graph.graph import ITEM_BITS

BUNDLED = read_manifest(backends.DEFAULT_MODEL)
MANIFEST = BUNDLED.model_copy(update={"num_classes": 0, "image_shape": (3, 8, 8), "training": None})
N = helper.make_node
CM = helper.make_opsetid("cm", 1)
TAIL = [N("Reshape", ["sigma", "column"], ["s"]), N("Mul", ["s", "zero"], ["s0"]), N("Add", ["y", "s0"], ["denoised"])]
CONSTANTS = {"column": np.array([-1, 1, 1, 1]), "zero": np.float32(0)}


def port(name: str, dims: Sequence[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def model(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, Any] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    opset: int = 20,
    manifest: Manifest = MANIFEST,
) -> onnx.ModelProto:
    """A denoiser somebody wrote: ``nodes`` make y of x, and sigma is taken for nothing."""
    images = ["N", *manifest.image_shape]
    numbers = {**CONSTANTS, **(constants or {})}
    graph = helper.make_graph(
        [*nodes, *TAIL],
        "g",
        [port("x", images), port("sigma", ["N"])],
        [port("denoised", images)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items()],
    )
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset), CM][: 1 + bool(functions)], functions=functions
    )
    made.ir_version = 10
    helper.set_model_props(made, {"cm_runtime": manifest.model_dump_json()})
    return made


def saved(made: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(made.SerializeToString())
    return path


def doubled(kind: str, **attributes: Any) -> list[onnx.NodeProto]:
    chain = [N(kind, [f"c{i}", f"c{i}"], [f"c{i + 1}"], **attributes) for i in range(40)]
    return [N("Reshape", ["x", "flat"], ["c0"]), *chain, N("ReduceSum", ["c40"], ["a"], keepdims=0)]


SUMMED = [N("ReduceSum", ["a"], ["b"], keepdims=0), N("Add", ["x", "b"], ["y"])]
FLAT = {"flat": np.array([-1])}
CALLS = [
    helper.make_function(
        "cm",
        f"F{i}",
        ["a"],
        ["b"],
        [N(f"F{i + 1}", ["a"], ["t"], domain="cm"), N(f"F{i + 1}", ["t"], ["b"], domain="cm")]
        if i < 30
        else [N("Relu", ["a"], ["b"])],
        [helper.make_opsetid("", 20), CM],
    )
    for i in range(31)
]
ITSELF = helper.make_function("cm", "F0", ["a"], ["b"], [N("F0", ["a"], ["b"], domain="cm")], [CM])
BODY = helper.make_graph([N("Add", ["v", "v"], ["w"])], "body", [], [port("w", [])])
BOMBS: dict[str, onnx.ModelProto] = {
    "a constant of 4 GiB": model([N("ConstantOfShape", ["r"], ["a"]), *SUMMED], {"r": np.array([2**10, 2**20])}),
    "a constant of computed shape": model(
        [N("Mul", ["r", "r"], ["r2"]), N("ConstantOfShape", ["r2"], ["a"]), *SUMMED], {"r": np.array([2**16])}
    ),
    "a size of the numbers": model([N("Cast", ["sigma"], ["n"], to=7), N("ConstantOfShape", ["n"], ["a"]), *SUMMED]),
    "a range": model(
        [N("Range", ["start", "stop", "step"], ["a"]), *SUMMED],
        {"start": np.float32(0), "stop": np.float32(2**40), "step": np.float32(1)},
    ),
    "doubling": model([*doubled("Concat", axis=0), N("Add", ["x", "a"], ["y"])], FLAT),
    "doubling of what is not known": model(
        [N("NonZero", ["x"], ["c0"]), *doubled("Concat", axis=1)[1:-1], N("Cast", ["c40"], ["a"], to=1), *SUMMED]
    ),
    "an outer product": model(
        [N("MatMul", ["up", "down"], ["a"]), *SUMMED],
        {"up": np.zeros((2**15, 1), np.float32), "down": np.zeros((1, 2**15), np.float32)},
    ),
    "tiles": model([N("Tile", ["x", "times"], ["a"]), *SUMMED], {"times": np.array([1, 1, 2**14, 2**14])}),
    "an expansion": model([N("Expand", ["x", "to"], ["a"]), *SUMMED], {"to": np.array([2**22, 3, 8, 8])}),
    "a padding": model([N("Pad", ["x", "pads"], ["a"]), *SUMMED], {"pads": np.array([0, 0, 2**20, 2**20, 0, 0, 0, 0])}),
    "an enlargement": model(
        [N("Resize", ["x", "", "scales"], ["a"]), *SUMMED], {"scales": np.float32([1, 1, 2**12, 2**12])}
    ),
    "many at once": model(
        [
            *(N("Resize", ["x", "", "scales"], [f"r{i}"]) for i in range(12)),
            N("Sum", [f"r{i}" for i in range(12)], ["a"]),
            *SUMMED,
        ],
        {"scales": np.float32([1, 1, 1024, 1024])},
    ),
    "functions 30 deep": model([N("F0", ["x"], ["y"], domain="cm")], functions=CALLS),
    "functions of 2^7 nodes each": model(
        [N("F23", ["x"], ["q0"], domain="cm")]
        + [N("F23", [f"q{i}"], [f"q{i + 1}"], domain="cm") for i in range(170)]
        + [N("Identity", ["q170"], ["y"])],
        functions=CALLS[23:],
    ),
    "a function that calls itself": model([N("F0", ["x"], ["y"], domain="cm")], functions=[ITSELF]),
    "an endless loop": model([N("Loop", ["", "", "x"], ["y"], body=BODY)]),
    "a condition": model([N("If", ["x"], ["y"], then_branch=BODY, else_branch=BODY)]),
    "a scan": model([N("Scan", ["x"], ["y"], body=BODY, num_scan_inputs=1)]),
    "operators of 2^40": model([N("Identity", ["x"], ["y"])], opset=2**40),
    "a chain of 30000": model(
        [N("Relu", [f"r{i}" if i else "x"], [f"r{i + 1}"]) for i in range(30000)] + [N("Identity", ["r30000"], ["y"])]
    ),
    "an operator of somebody": model([N("Anything", ["x"], ["y"], domain="com.somebody")]),
    "a shape that does not fit": model([N("Reshape", ["x", "to"], ["y"])], {"to": np.array([0, 3, 8, 9])}),
}
INDICES = {
    "j": np.full((2, 1), 50_000_000),
    "j4": np.full((1, 3, 8, 8), 2**40),
    "u": np.zeros((1, 3, 8, 8), np.float32),
}
STRANGE: dict[str, onnx.ModelProto] = {  # what OpenVINO does not check
    "GatherND": model([N("GatherND", ["x", "j"], ["a"]), *SUMMED], INDICES),
    "GatherElements": model([N("GatherElements", ["x", "j4"], ["y"], axis=3)], INDICES),
    "ScatterElements": model([N("ScatterElements", ["x", "j4", "u"], ["y"], axis=3)], INDICES),
    "a shape of the numbers": model([N("Cast", ["sigma"], ["i"], to=7), N("Reshape", ["x", "i"], ["a"]), *SUMMED]),
    "a batch of one": model([N("Reshape", ["x", "to"], ["y"])], {"to": np.array([1, 3, 8, 8])}),
    "Gather": model([N("Gather", ["x", "at"], ["a"], axis=3), *SUMMED], {"at": np.array(9)}),
    "a slice of the batch": model(
        [N("Slice", ["x", "from", "to", "axis"], ["y"])],
        {"from": np.array([0]), "to": np.array([1000]), "axis": np.array([0])},
    ),
    "an operator that is not written": model([N("Relu", ["x"], ["y"])]),
    "an attribute that is not written": model(
        [N("Softmax", ["x"], ["y"], axis=2)],
    ),
}


@pytest.mark.process
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_every_engine(name: str, tmp_path: Path) -> None:
    path = saved(BOMBS[name], tmp_path / "m.onnx")
    began = time.process_time()
    manifest = read_manifest(path)
    for trust in (False, True):
        with pytest.raises(ArtifactError) as refusal:
            onnx_graph.check(path, manifest, trust=trust)
        assert str(refusal.value).startswith(str(path))
        assert "\n" not in str(refusal.value)
    assert time.process_time() - began < 3


@pytest.mark.parametrize("name", STRANGE)
def test_a_graph_of_others_is_kept_from_openvino(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of OpenVINO reads it, whoever asks; auto takes ONNX Runtime and measures nothing."""
    path = saved(STRANGE[name], tmp_path / "m.onnx")
    monkeypatch.setattr("cm_runtime.backends.openvino.read_model", None)
    with pytest.raises(ArtifactError, match="OpenVINO runs only graphs as cm-runtime export writes them"):
        cm.load(path, "openvino")
    try:
        assert cm.load(path, device="cpu").name == "ort"
    except ArtifactError as error:
        assert "ONNX Runtime" in str(error)


def test_a_graph_of_others_runs_on_onnx_runtime_or_anywhere_with_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(model([N("Relu", ["x"], ["r"]), N("Tanh", ["r"], ["y"])]), tmp_path / "m.onnx")
    x = np.linspace(-2, 2, 2 * 192, dtype=np.float32).reshape(2, 3, 8, 8)
    wanted = np.tanh(np.maximum(x, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ArtifactError, match="--trust"):
        cm.load(path, "openvino")
    engines = [cm.load(path, device="cpu"), cm.load(path, "openvino", trust=True)]
    monkeypatch.setenv(onnx_graph.TRUST, "1")
    for engine in [*engines, cm.load(path, "openvino")]:
        assert np.allclose(engine.denoise(x, 1.0), wanted, atol=1e-5)


@pytest.mark.slow
def test_a_network_that_torch_exported_runs_on_onnx_runtime(tmp_path: Path) -> None:
    """Somebody's own network in torch's own words, with our manifest."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            h = torch.nn.functional.interpolate(torch.nn.functional.silu(self.conv(x)), scale_factor=2.0)
            return torch.nn.functional.avg_pool2d(h, 2) / sigma.reshape(-1, 1, 1, 1).expand(x.shape)

    network = Network().eval()
    dynamic = {name: {0: torch.export.Dim("N")} for name in ("x", "sigma")}
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0])
    program = torch.onnx.export(
        network, (x, sigma), dynamo=True, dynamic_shapes=dynamic, output_names=["denoised"], verbose=False
    )
    assert program is not None
    made = program.model_proto
    helper.set_model_props(made, {"cm_runtime": MANIFEST.model_dump_json()})
    engine = cm.load(saved(made, tmp_path / "m.onnx"), device="cpu")
    assert engine.name == "ort"
    assert np.allclose(engine.denoise(x.numpy(), sigma.numpy()), network(x, sigma).detach().numpy(), atol=1e-5)


# Where weights may lie


def external(**place: str) -> onnx.ModelProto:
    made = model([N("Relu", ["x"], ["r"]), N("Add", ["r", "w"], ["y"])], {"w": np.zeros((1, 3, 8, 8), np.float32)})
    tensor = next(each for each in made.graph.initializer if each.name == "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in place.items():
        tensor.external_data.add(key=key.rstrip("_"), value=value)
    if "location_" in place:
        tensor.external_data.add(key="location", value="m.data")
    return made


def in_a_constant() -> onnx.ModelProto:
    tensor = external(location="*/_ORT_MEM_ADDR_/*", offset="4096").graph.initializer[-1]
    return model([N("Constant", [], ["w"], value=tensor), N("Add", ["x", "w"], ["y"])])


PLACES = {
    "an address": external(location="*/_ORT_MEM_ADDR_/*", offset="140000000000000", length="768"),
    "an address in a constant": in_a_constant(),
    "another folder": external(location="../m.data", length="768"),
    "a whole path": external(location="/etc/passwd", length="768"),
    "a place twice": external(location_="m.data", location="other", length="768"),
    "a key of no meaning": external(location="m.data", length="768", basepath="/"),
    "beyond the end": external(location="m.data", offset="4000", length="768"),
    "less than it needs": external(location="m.data", length="700"),
    "below zero": external(location="m.data", offset="-1", length="768"),
    "nowhere": external(offset="0", length="768"),
    "a folder": external(location="folder", length="768"),
}


@pytest.mark.parametrize("name", PLACES)
def test_weights_lie_beside_their_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "m.data").write_bytes(bytes(4096))
    (tmp_path / "folder").mkdir()
    path = saved(PLACES[name], tmp_path / "m.onnx")
    with pytest.raises(ArtifactError):
        onnx_graph.check(path, MANIFEST, trust=True)
    saved(external(location="m.data", offset="64", length="768"), path)
    assert onnx_graph.check(path, MANIFEST).foreign


def test_protobuf_that_two_readers_could_read_differently_is_refused(tmp_path: Path) -> None:
    """A graph in two parts, which protobuf would join; sparse weights; training; a weight twice."""
    sound = model([N("Identity", ["x"], ["y"])])
    content = sound.SerializeToString()
    sparse, training, twice = (onnx.ModelProto.FromString(content) for _ in range(3))
    sparse.graph.sparse_initializer.add().dims.append(3)
    training.training_info.add()
    twice.graph.initializer.append(twice.graph.initializer[0])
    more = onnx.ModelProto(graph=onnx.GraphProto(node=[N("Relu", ["x"], ["z"])])).SerializeToString()
    for each in (
        *(made.SerializeToString() for made in (sparse, training, twice)),
        content + more,
        content + b"\x7a\0",
    ):
        with pytest.raises(ArtifactError):
            onnx_graph.check(each, MANIFEST)
    assert onnx_graph.check(content, MANIFEST).foreign


# What export writes


@pytest.fixture(scope="module", params=exports.KINDS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> exports.Files:
    return exports.Files(request.param, tmp_path_factory)


@pytest.mark.process
@pytest.mark.parametrize("kind", ["denoiser", "sampler", "network"])
def test_what_export_writes_runs_on_every_engine(each: exports.Files, kind: Any) -> None:
    """In each precision, and inline; without an engine, so that the forms that none here runs are seen too."""
    model = each.model()
    manifest = read_checkpoint(each.checkpoint).manifest().model_copy(update={"graph": kind})
    levels = (80.0, 20.0, 1.5)
    if kind == "sampler":
        manifest = manifest.model_copy(update={"sigmas": {3: levels}})
    for precision, inline in itertools.product(("fp32", "fp16", "bf16"), (False, True)):
        if kind == "sampler":
            graph = graphs.sampler(model, levels, precision, inline=inline)  # type: ignore[arg-type]
        else:
            graph = (graphs.denoiser if kind == "denoiser" else graphs.network)(model, precision)  # type: ignore[arg-type]
        network = graph.network()
        proto = network.graph
        if inline:
            proto = onnx.inliner.inline_local_functions(proto)
        for tensor in proto.graph.initializer:
            if tensor.name in network.weights:
                bits = ITEM_BITS[tensor.data_type]
                tensor.raw_data = bytes(int(np.prod(tensor.dims)) * bits // 8)
        said = manifest.model_copy(update={"precision": precision})
        operators.check(message.read_graph(proto.SerializeToString(), "m"), said)


@pytest.mark.parametrize("form", ["onnx", "inline", "half", "apart", "half_apart", "inline_apart"])
def test_files_of_every_form_are_ours(each: exports.Files, form: str) -> None:
    path = getattr(each, form)
    assert onnx_graph.check(path, read_manifest(path)) == ("",)


@pytest.mark.process
def test_a_damaged_file_leaves_no_harm(tmp_path: Path) -> None:
    """Each number of each kind of shape in the bundled model changed: none reaches OpenVINO, which draws as before."""
    whole = onnx.load(backends.DEFAULT_MODEL)
    shapes = [
        each for each in whole.graph.initializer if each.data_type == TensorProto.INT64 and len(each.raw_data) == 32
    ]
    good = cm.load(None, "openvino", "cpu", 1)
    wanted = cm.sample(good, 1, labels=3)
    count = 0
    for tensor in shapes[:4]:
        kept = tensor.raw_data
        for at, to in ((2, 255), (0, 255), (1, -2)):
            numbers = list(struct.unpack("<4q", kept))
            numbers[at] = to
            tensor.raw_data = struct.pack("<4q", *numbers)
            with pytest.raises(ArtifactError, match=r"OpenVINO runs only|damaged"):
                cm.load(saved(whole, tmp_path / "m.onnx"), "openvino", "cpu", 1)
            count += 1
        tensor.raw_data = kept
    assert count >= 12
    assert np.array_equal(cm.sample(cm.load(None, "openvino", "cpu", 1), 1, labels=3), wanted)


@pytest.mark.process
def test_bytes_changed_at_random_end_in_a_line() -> None:
    """Over the whole of the bundled model's graph."""
    content = bytearray(backends.DEFAULT_MODEL.read_bytes())
    random = np.random.default_rng(0)
    for place, value in zip(random.integers(0, 60_000, 60), random.integers(1, 256, 60), strict=True):
        kept = content[place]
        content[place] = kept ^ int(value)
        try:
            onnx_graph.check(bytes(content), BUNDLED)
        except CmRuntimeError as error:
            assert "\n" not in str(error)
        content[place] = kept


def test_the_check_is_quick() -> None:
    """Under 20 ms of an idle processor; a weight is not read."""

    def taken() -> float:
        began = time.process_time()
        onnx_graph.check(backends.DEFAULT_MODEL, BUNDLED)
        return time.process_time() - began

    assert min(taken() for _ in range(5)) < 0.05


def test_an_extractor_is_bounded_too(tmp_path: Path) -> None:
    """A batch of four million would be filled up with copies."""
    onnx_graph.check_extractor(SHIPPED)
    made = onnx.load(SHIPPED)
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4_000_000
    with pytest.raises(ArtifactError, match="at most 1024"):
        Extractor(saved(made, tmp_path / "e.onnx"))
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1024
    assert Extractor(saved(made, tmp_path / "e.onnx"), device="cpu").channels == 1
    with pytest.raises(ArtifactError, match="too large"):
        Extractor(saved(BOMBS["tiles"], tmp_path / "e.onnx"))


@pytest.mark.parametrize("start", [b"\x0b", b"\x08" + b"\xff" * 11, b"\x12" + b"\xff" * 9 + b"\x01", b"\x0d"])
def test_a_large_weight_of_no_known_fields_ends(tmp_path: Path, start: bytes) -> None:
    """A field that no window of the file holds would be read again and again."""
    weight = start + bytes(3 * message.SMALL)
    graph = protobuf.write_head(5, len(weight)) + weight
    (tmp_path / "m.onnx").write_bytes(protobuf.write_head(7, len(graph)) + graph)
    with pytest.raises(ArtifactError) as refusal:
        onnx_graph.check(tmp_path / "m.onnx", MANIFEST)
    assert "\n" not in str(refusal.value)
