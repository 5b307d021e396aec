"""The exported file: what a stock engine that knows nothing of cm-runtime computes from it, and how it is written."""

import hashlib
import json
import os
import resource
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cm_runtime import export
from cm_runtime.backends import openvino
from cm_runtime.checkpoints.native import Checkpoint, read_checkpoint
from cm_runtime.errors import OutputError, RequestError
from cm_runtime.export import graphs, parity, to_onnx, weights_file
from cm_runtime.export.builder import Graph
from cm_runtime.manifest import Parity, read_manifest
from cm_runtime.networks.consistency import ConsistencyModel
from cm_runtime.onnx_graph.export_writer import write_manifest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from torch_graph import detach

TOLERANCE = 1e-4
BATCHES = (1, 3, 7)
LEVELS = (80.0, 0.002, 1.382368, 0.3, 0.02, 17.5, 4.4)
SMALLEST, LARGEST = np.float32(2.0**-24), np.float32(65504)  # of float16

STOCK_ENGINE = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cm_runtime", "torch", "onnx"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import numpy, onnxruntime

given, model, answer = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
with numpy.load(given) as arrays:
    feeds = {}
    for key in arrays.files:
        batch, _, name = key.partition(".")
        feeds.setdefault(batch, {})[name] = arrays[key]
numpy.savez(answer, **{batch: session.run(["denoised"], feed)[0] for batch, feed in feeds.items()})
"""

Inputs = dict[str, NDArray[np.generic]]


def inputs(files: exports.Files, n: int) -> Inputs:
    """A batch whose noise levels all differ, and whose labels differ too."""
    config = exports.checkpoint(files.kind).config
    sigma = np.resize(np.array(LEVELS, np.float32), n)
    x = np.random.default_rng(n).standard_normal((n, *config.image_shape)) * np.hypot(sigma, 0.5)[:, None, None, None]
    given: Inputs = {"x": x.astype(np.float32), "sigma": sigma}
    if config.network.num_classes:
        given["label"] = (np.arange(n) * 2 + 1) % exports.CLASSES
    return given


def expected(files: exports.Files, given: Inputs) -> NDArray[np.float32]:
    """The float32 torch model's own answer."""
    with torch.inference_mode():
        answer: NDArray[np.float32] = files.model()(*map(torch.from_numpy, given.values())).numpy()
    return answer


def largest_difference(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    assert np.isfinite(wanted).all()
    return float(np.abs(found - wanted).max())


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def without_metadata(path: Path) -> bytes:
    """The graph, whose bytes are the same each time; the parity beside it is a measurement."""
    graph = onnx.load(path)
    del graph.metadata_props[:]
    return graph.SerializeToString(deterministic=True)


# What the file computes


@pytest.mark.process
@pytest.mark.covering(1)
@pytest.mark.parametrize("form", ["onnx", "inline", "half", "apart", "half_apart", "inline_apart"])
def test_a_stock_onnx_runtime_without_our_code_computes_what_the_torch_model_computes(
    each: exports.Files, form: str, tmp_path: Path
) -> None:
    batches = {str(n): inputs(each, n) for n in BATCHES}
    flat = {f"{batch}.{name}": array for batch, given in batches.items() for name, array in given.items()}
    np.savez(tmp_path / "given.npz", **flat)
    words = [str(tmp_path / "given.npz"), str(getattr(each, form)), str(tmp_path / "answer.npz")]
    subprocess.run([sys.executable, "-I", "-c", STOCK_ENGINE, *words], check=True, cwd=tmp_path, timeout=120)
    with np.load(tmp_path / "answer.npz") as answer:
        for batch, given in batches.items():
            assert largest_difference(answer[batch], expected(each, given)) < TOLERANCE


def test_every_input_matters(each: exports.Files) -> None:
    """Without this, agreement with the torch model could be that of two constants."""
    given = inputs(each, 7)
    run = session(each.onnx).run
    (before,) = run(None, given)
    assert before.std() > 0.1
    other = {"x": given["x"][:, ::-1, ::-1], "sigma": given["sigma"] * np.float32(1.1)}
    if "label" in given:
        other["label"] = (given["label"] + 1) % exports.CLASSES
    for name, value in other.items():
        (after,) = run(None, {**given, name: np.ascontiguousarray(value)})
        changed = np.abs(after - before).max(axis=(1, 2, 3))
        assert (changed[np.array(LEVELS) > 0.01] > 1e-3).all(), name


@pytest.mark.process
@pytest.mark.covering(1)
@pytest.mark.parametrize("form", ["inline", "half", "inline_apart"])
def test_openvino_runs_the_inlined_file(each: exports.Files, form: str) -> None:
    path = each.inline if form == "half" else getattr(each, form)
    if form == "half":
        path = each.half_inline
    compiled = openvino.core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for n in BATCHES:
        given = inputs(each, n)
        assert largest_difference(compiled(given)["denoised"], expected(each, given)) < TOLERANCE


@pytest.mark.covering(1)
@pytest.mark.parametrize("form", ["onnx", "inline", "half", "apart"])
def test_tensorrt_parses_the_file(each: exports.Files, form: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(getattr(each, form)))
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]
    assert [network.get_output(i).name for i in range(network.num_outputs)] == ["denoised"]
    assert tuple(network.get_output(0).shape)[1:] == exports.checkpoint(each.kind).config.image_shape


# What the file says


def test_inputs_and_output_have_the_contracts_names_types_and_one_dynamic_dimension(each: exports.Files) -> None:
    for path in (each.onnx, each.inline, each.half):
        graph = onnx.load(path).graph
        stated = {
            value.name: (
                value.type.tensor_type.elem_type,
                [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
            )
            for value in (*graph.input, *graph.output)
        }
        config = exports.checkpoint(each.kind).config
        image = (TensorProto.FLOAT, ["N", *config.image_shape])
        labels = {"label": (TensorProto.INT64, ["N"])} if config.network.num_classes else {}
        assert stated == {"x": image, "sigma": (TensorProto.FLOAT, ["N"]), **labels, "denoised": image}
        assert [value.name for value in graph.input] == ["x", "sigma", *labels]


def test_the_checker_and_strict_shape_inference_accept_it(each: exports.Files) -> None:
    for path in (each.onnx, each.inline, each.half):
        graph = onnx.load(path)
        onnx.checker.check_model(graph, full_check=True)
        onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True, data_prop=True)


@pytest.mark.parametrize("form", ["apart", "half_apart", "inline_apart"])
def test_the_checker_accepts_weights_beside_the_file(each: exports.Files, form: str) -> None:
    onnx.checker.check_model(str(getattr(each, form)), full_check=True)


def test_only_the_plain_file_has_a_function_and_only_the_half_file_has_casts_of_weights(
    boundary: exports.Files,
) -> None:
    graphs = [onnx.load(path) for path in (boundary.onnx, boundary.inline, boundary.half)]
    assert [len(graph.functions) for graph in graphs] == [1, 0, 1]
    halves = [sum(w.data_type == TensorProto.FLOAT16 for w in graph.graph.initializer) for graph in graphs]
    assert halves[:2] == [0, 0]
    assert halves[2] > 20


@pytest.mark.process
def test_the_manifest_is_json_that_any_onnx_reader_finds(each: exports.Files) -> None:
    (entry,) = onnx.load(each.onnx).metadata_props
    assert entry.key == "cm_runtime"
    said = json.loads(entry.value)
    assert onnxruntime.InferenceSession(str(each.onnx)).get_modelmeta().custom_metadata_map["cm_runtime"] == entry.value
    classes = 0 if each.kind == "edm" else exports.CLASSES
    facts = {
        "format_version": 1,
        "graph": "denoiser",
        "image_shape": [1 if each.kind == "edm" else 3, 8, 8],
        "num_classes": classes,
        "precond": each.kind,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "sigma_data": 0.5,
        "sigma_boundary": 0.0 if each.kind == "edm" else 0.002,
        "rho": 7.0,
        "sigmas": {},
        "precision": "fp32",
    }
    assert {key: said[key] for key in facts} == facts
    assert set(said) == {*facts, "parity", "source_sha256", "training"}
    summary = {"method": "ect", "data": "none", "steps": 3, "images": 24, "seconds": 1.5, "config": {"seed": 0}}
    assert said["training"] == summary
    checksum = subprocess.run(["sha256sum", each.checkpoint], capture_output=True, text=True, check=True).stdout
    assert said["source_sha256"] == checksum.split()[0]
    assert json.loads(read_manifest(each.onnx).model_dump_json()) == said


@pytest.mark.process
def test_export_returns_the_manifest_it_wrote(boundary: exports.Files, tmp_path: Path) -> None:
    manifest = export.onnx(read_checkpoint(boundary.checkpoint), tmp_path / "m.onnx").manifest
    assert manifest == read_manifest(tmp_path / "m.onnx")


def test_the_file_names_no_folder_of_the_machine_that_made_it(boundary: exports.Files) -> None:
    content = boundary.onnx.read_bytes()
    for trace in (str(exports.ROOT), "site-packages", "torch.nn.modules"):
        assert trace.encode() not in content


@pytest.mark.process
def test_exporting_twice_gives_the_same_bytes(boundary: exports.Files, tmp_path: Path) -> None:
    """With torch's exporter run anew; also when nothing of it is remembered."""
    export.onnx(read_checkpoint(boundary.checkpoint), tmp_path / "again.onnx")
    first, again = onnx.load(boundary.onnx), onnx.load(tmp_path / "again.onnx")
    said = [json.loads(graph.metadata_props[0].value) for graph in (first, again)]
    for manifest in said:
        manifest["parity"].pop("max_abs")  # a measurement
    assert said[0] == said[1]
    assert without_metadata(boundary.onnx) == without_metadata(tmp_path / "again.onnx")


# Float16 storage


def test_a_float16_checkpoint_makes_a_file_of_half_the_weights(each: exports.Files) -> None:
    count = sum(tensor.numel() for tensor in exports.checkpoint(each.kind).ema["0.999"].values())
    saved = each.onnx.stat().st_size - each.half.stat().st_size
    assert saved == pytest.approx(2 * count, rel=0.03)


@pytest.mark.process
def test_the_float16_file_computes_in_float32_to_the_last_bit(each: exports.Files) -> None:
    """The numbers are the same, so stored halves must give what stored floats give."""
    given = inputs(each, 7)
    (full,), (half,) = (session(path).run(None, given) for path in (each.onnx, each.half))
    assert np.array_equal(full, half)


@pytest.mark.covering(1)
@pytest.mark.process
@pytest.mark.parametrize(("inside", "apart"), [("onnx", "apart"), ("half", "half_apart"), ("inline", "inline_apart")])
def test_weights_beside_the_file_are_those_inside_it(each: exports.Files, inside: str, apart: str) -> None:
    """The onnx package joins the two to the same graph, and an engine computes the same to the last bit."""
    one, other = getattr(each, inside), getattr(each, apart)
    assert other.stat().st_size < one.stat().st_size / 5
    assert one.stat().st_size < other.stat().st_size + exports.data_file(other).stat().st_size
    joined = onnx.load(other)  # with its data
    for tensor in joined.graph.initializer:
        tensor.ClearField("data_location")  # said to be inside, which is the default
    plain = onnx.load(one)
    assert read_manifest(other).model_copy(update={"data_file": ""}) == read_manifest(one)
    for graph in (plain, joined):
        del graph.metadata_props[:]
    assert joined == plain
    given = inputs(each, 7)
    (a,), (b,) = (session(path).run(None, given) for path in (one, other))
    assert np.array_equal(a, b)


def stored(*arrays: NDArray[np.generic]) -> onnx.ModelProto:
    """A graph that adds nothing to its weights: each w_i is an initializer and y_i a copy of it."""
    tensors = [numpy_helper.from_array(array, f"w{i}") for i, array in enumerate(arrays)]
    nodes = [helper.make_node("Identity", [f"w{i}"], [f"y{i}"]) for i in range(len(arrays))]
    outputs = [helper.make_tensor_value_info(f"y{i}", w.data_type, list(w.dims)) for i, w in enumerate(tensors)]
    graph = helper.make_graph(nodes, "g", [], outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


WEIGHTS = {
    "exact": (np.array([1, -0.5, 2.0**-14, 0], np.float32), True),
    "largest": (np.array([LARGEST, -LARGEST], np.float32), True),
    "subnormal in float16": (np.array([SMALLEST, 3 * SMALLEST], np.float32), True),
    "one value not exact": (np.array([1, 0.1], np.float32), False),
    "one bit too many": (np.array([1 + 2.0**-11], np.float32), False),
    "almost exact": (np.array([1 + 2.0**-20, 1], np.float32), False),
    "overflow": (np.array([65520, 1], np.float32), False),
    "underflow": (np.array([SMALLEST / 2, 1], np.float32), False),
    "scalar": (np.array(0.5, np.float32), False),
    "integers": (np.array([1, 2], np.int64), False),
    "doubles": (np.array([1.0, 2.0], np.float64), False),
    "matrix": (np.full((3, 5), 0.25, np.float32), True),
    "infinity": (np.array([np.inf, 1], np.float32), None),
    "nan": (np.array([np.nan, 1], np.float32), None),
    "empty": (np.zeros((0, 4), np.float32), None),
    "negative zero": (np.array([-0.0], np.float32), True),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_is_stored_in_float16_only_where_that_loses_nothing(name: str, tmp_path: Path) -> None:
    array, is_half = WEIGHTS[name]
    neighbour = np.array([0.75, 3.0], np.float32)
    network = detach(onnx_ir.from_proto(stored(array, neighbour)))
    to_onnx.store_halves(network)
    weights_file.write(network, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(graph, full_check=True)
    types = {weight.name.partition(".")[0]: weight.data_type for weight in graph.graph.initializer}
    assert types["w1"] == TensorProto.FLOAT16
    if is_half is not None:
        assert (types["w0"] == TensorProto.FLOAT16) is is_half
    found = onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {})
    for before, after in zip((array, neighbour), found, strict=True):
        assert after.dtype == before.dtype
        assert after.shape == before.shape
        assert after.tobytes() == before.tobytes()


# How the file is written


@pytest.mark.parametrize("name", ["model.pt", "model", "model.onnx.bak"])
def test_another_ending_is_refused_before_any_work(
    boundary: exports.Files, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "denoiser", pytest.fail)
    with pytest.raises(RequestError, match=r"ends in \.onnx"):
        export.onnx(read_checkpoint(boundary.checkpoint), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_an_existing_file_is_replaced_only_with_force(boundary: exports.Files, tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    target.write_bytes(b"somebody's work")
    ours = read_checkpoint(boundary.checkpoint)
    with pytest.raises(OutputError, match=r"exists.*--force"):
        export.onnx(ours, target)
    assert target.read_bytes() == b"somebody's work"
    export.onnx(ours, target, force=True)
    assert without_metadata(target) == without_metadata(boundary.onnx)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("folder", ["missing", "file", "/proc"])
def test_a_folder_that_cannot_be_written_is_one_error(boundary: exports.Files, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    target = tmp_path / folder / "m.onnx"
    with pytest.raises(OutputError, match=r"m\.onnx cannot be written"):
        export.onnx(read_checkpoint(boundary.checkpoint), target)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def fails_where_files_are_small(boundary: exports.Files, folder: Path, limit: int) -> None:
    """An export into ``folder``, where no file may have more than ``limit`` bytes, leaves nothing there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ours = read_checkpoint(boundary.checkpoint)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"m\.onnx cannot be written"):
            export.onnx(ours, folder / "m.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(boundary: exports.Files, tmp_path: Path) -> None:
    fails_where_files_are_small(boundary, tmp_path, boundary.onnx.stat().st_size // 2)


@pytest.mark.process
def test_of_two_exports_at_once_one_wins_and_the_other_says_so(
    boundary: exports.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are past the check that nothing is there when either writes."""
    both = threading.Barrier(2, timeout=60)

    real = graphs.denoiser

    def build(model: ConsistencyModel, *how: Any) -> Graph:
        both.wait()
        return real(model, *how)

    monkeypatch.setattr(graphs, "denoiser", build)
    outcomes: list[object] = []

    def run() -> None:
        try:
            outcomes.append(export.onnx(read_checkpoint(boundary.checkpoint), tmp_path / "m.onnx"))
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lost,) = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert isinstance(lost, OutputError)
    assert "exists" in str(lost)
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert without_metadata(tmp_path / "m.onnx") == without_metadata(boundary.onnx)


@pytest.mark.process
def test_torch_has_let_go_of_the_weights_when_the_engine_loads_them(
    boundary: exports.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what its exporter keeps; the vectors of normalisations, which it remembers for ever, are empty."""
    alive: list[weakref.ref[object]] = []
    real_build, real_measure = graphs.denoiser, parity.measure

    def build(model: ConsistencyModel, *how: Any) -> Graph:
        g = real_build(model, *how)
        held = (*model.parameters(), *g.weights.values())
        alive.extend(weakref.ref(weight) for weight in held if weight.ndim in (2, 4))
        return g

    def measure(*given: Any) -> Parity:
        assert len(alive) > 30
        assert [kept for kept in alive if kept() is not None] == []
        return real_measure(*given)

    monkeypatch.setattr(graphs, "denoiser", build)
    monkeypatch.setattr(parity, "measure", measure)
    export.onnx(read_checkpoint(boundary.checkpoint), tmp_path / "m.onnx")


# With the weights in a file beside it


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of any size go beside the file."""
    monkeypatch.setattr(to_onnx, "LARGEST_INSIDE", 0)


def other_weights(files: exports.Files) -> Checkpoint:
    """The same network with one weight changed."""
    ours = read_checkpoint(files.checkpoint)
    changed = {name: tensor.clone() for name, tensor in ours.ema["0.999"].items()}
    changed["F.out.2.weight"] += 0.25
    return replace(ours, ema={"0.999": changed})


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


@pytest.mark.process
def test_the_weights_go_into_one_file_named_after_the_export_and_its_content(
    boundary: exports.Files, tmp_path: Path, apart: None
) -> None:
    manifest = export.onnx(read_checkpoint(boundary.checkpoint), tmp_path / "m.onnx").manifest
    assert manifest == read_manifest(tmp_path / "m.onnx")
    assert names(tmp_path) == {"m.onnx", manifest.data_file}
    checksum = hashlib.sha256((tmp_path / manifest.data_file).read_bytes()).hexdigest()
    assert manifest.data_file == f"m-{checksum[:12]}.data"


@pytest.mark.process
def test_force_replaces_both_files_and_the_older_data_file_goes(
    boundary: exports.Files, tmp_path: Path, apart: None
) -> None:
    target = tmp_path / "m.onnx"
    first = export.onnx(read_checkpoint(boundary.checkpoint), target).manifest
    with pytest.raises(OutputError, match="--force"):
        export.onnx(other_weights(boundary), target)
    assert names(tmp_path) == {"m.onnx", first.data_file}
    second = export.onnx(other_weights(boundary), target, force=True).manifest
    assert second.data_file != first.data_file
    assert names(tmp_path) == {"m.onnx", second.data_file}
    session(target)
    export.onnx(other_weights(boundary), target, force=True)  # the same again keeps its data file
    assert names(tmp_path) == {"m.onnx", second.data_file}


@pytest.mark.process
def test_force_back_to_weights_inside_removes_the_data_file(
    boundary: exports.Files, tmp_path: Path, apart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.onnx(read_checkpoint(boundary.checkpoint), tmp_path / "m.onnx")
    monkeypatch.setattr(to_onnx, "LARGEST_INSIDE", 1 << 30)
    export.onnx(read_checkpoint(boundary.checkpoint), tmp_path / "m.onnx", force=True)
    assert names(tmp_path) == {"m.onnx"}


@pytest.mark.process
def test_a_data_file_that_another_export_names_stays(boundary: exports.Files, tmp_path: Path, apart: None) -> None:
    first = export.onnx(read_checkpoint(boundary.checkpoint), tmp_path / "m.onnx").manifest
    write_manifest(tmp_path / "m.onnx", tmp_path / "tuned.onnx", first)
    second = export.onnx(other_weights(boundary), tmp_path / "m.onnx", force=True).manifest
    assert names(tmp_path) == {"m.onnx", "tuned.onnx", first.data_file, second.data_file}
    session(tmp_path / "tuned.onnx")


@pytest.mark.process
@pytest.mark.parametrize("step", ["write", "check", "parity", "manifest"])
def test_whatever_fails_leaves_nothing_and_keeps_what_was_there(
    boundary: exports.Files, tmp_path: Path, apart: None, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    first = export.onnx(read_checkpoint(boundary.checkpoint), tmp_path / "m.onnx").manifest
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"m.onnx", first.data_file}

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    steps = {
        "write": "cm_runtime.export.weights_file.write",
        "check": "onnx.checker.check_model",
        "parity": "cm_runtime.export.parity.measure",
        "manifest": "cm_runtime.files.atomic.place",
    }
    monkeypatch.setattr(steps[step], interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.onnx(other_weights(boundary), tmp_path / "m.onnx", force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_that_fills_up_with_weights_leaves_nothing(boundary: exports.Files, tmp_path: Path, apart: None) -> None:
    fails_where_files_are_small(boundary, tmp_path, exports.data_file(boundary.apart).stat().st_size // 2)


@pytest.mark.process
def test_of_several_exports_at_once_the_one_that_stays_has_its_weights(
    boundary: exports.Files, tmp_path: Path, apart: None
) -> None:
    sources = [read_checkpoint(boundary.checkpoint), other_weights(boundary)] * 2
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda source: export.onnx(source, tmp_path / "m.onnx", force=True).manifest, sources))
    kept = read_manifest(tmp_path / "m.onnx")
    assert kept.data_file in {manifest.data_file for manifest in made}
    assert names(tmp_path) == {"m.onnx", kept.data_file}
    session(tmp_path / "m.onnx")
