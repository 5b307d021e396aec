"""`load`: which engine a file gets, and files that are damaged, foreign or lie about themselves."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import cm_runtime as cm
from cm_runtime import editing
from cm_runtime.backends import DEFAULT_MODEL
from cm_runtime.checkpoints.native import save_checkpoint
from cm_runtime.errors import ArtifactError, CheckpointError, CmRuntimeError, EngineError, RequestError
from cm_runtime.manifest import read_manifest


def one_line(error: BaseException) -> str:
    message = str(error)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.process
def test_reprs_are_a_line(boundary: exports.Files, edm: exports.Files) -> None:
    """Without weights, numbers and configurations."""
    model = cm.load(boundary.onnx, backend="ort", device="cpu")
    assert repr(model) == "<model.onnx on ort, cpu: 3x8x8, 5 classes>"
    assert repr(cm.load(edm.onnx, backend="openvino")) == "<model.onnx on openvino, cpu: 1x8x8>"
    assert repr(cm.load(edm.checkpoint)) == "<ckpt.pt on torch, cpu: 1x8x8>"
    manifest = (
        f"<Manifest of a denoiser: 3x8x8, 5 classes, boundary form, fp32, {model.manifest.training.method} of none>"
    )
    assert repr(model.manifest) == str(model.manifest) == manifest
    assert "config" not in repr(read_manifest(DEFAULT_MODEL).training)
    stream = cm.stream(model, 3, micro_batch=2)
    assert str(model) in repr(stream) and len(repr(stream)) < 300
    assert repr(next(iter(stream))) == "Batch(index 0 to 1, labels (2,), images (2, 8, 8, 3) uint8)"
    checkpoint = cm.load_checkpoint(boundary.checkpoint)
    weights = sum(tensor.numel() for tensor in checkpoint.ema["0.999"].values())
    assert repr(checkpoint) == f"<Checkpoint: 3x8x8, 5 classes, {weights:,} weights, EMA 0.999, ect>"


# The choice


@pytest.mark.process
def test_an_onnx_file_runs_on_an_engine_and_a_checkpoint_on_torch(boundary: exports.Files) -> None:
    assert cm.load(boundary.onnx).name in ("ort", "openvino")  # whichever measured faster
    assert cm.load(str(boundary.checkpoint)).name == "torch"
    assert cm.load(boundary.onnx, backend="ort", device="cpu").name == "ort"
    assert cm.load(boundary.checkpoint, backend="torch", device="cpu").name == "torch"


@pytest.mark.process
def test_all_engines_draw_the_same_images(boundary: exports.Files) -> None:
    models = [cm.load(boundary.onnx, backend=name) for name in ("ort", "openvino")] + [cm.load(boundary.checkpoint)]
    first, *others = (cm.sample(model, count=7, steps=2, output="float32") for model in models)
    assert first.std() > 0.1
    for other in others:
        assert np.abs(first - other).max() < 1e-4


@pytest.mark.process
def test_all_engines_edit_alike(boundary: exports.Files) -> None:
    y = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    models = [cm.load(boundary.onnx, backend=name) for name in ("ort", "openvino")] + [cm.load(boundary.checkpoint)]
    how: Any = {"labels": [1, 4], "answers": 2, "steps": 3, "output": "float32"}
    for edit in (
        lambda model: editing.inpaint(model, y, np.eye(8), **how),
        lambda model: editing.colorize(model, y, **how),
        lambda model: editing.superres(model, y[:, ::4, ::4], 4, **how),
        lambda model: editing.stroke(model, y, 3.0, **how),
    ):
        first, *others = map(edit, models)
        assert max(np.abs(first - other).max() for other in others) < 1e-4


def test_what_an_engine_cannot_compute_in_is_refused_by_what_can(boundary: exports.Files) -> None:
    with pytest.raises(RequestError, match="take --backend openvino"):
        cm.load(boundary.onnx, backend="ort", precision="bf16")
    with pytest.raises(RequestError, match="fp32 or bf16, not in fp16"):
        cm.load(boundary.onnx, backend="openvino", precision="fp16")
    with pytest.raises(RequestError, match="OpenVINO's CPU computes in fp32 or bf16, not in tf32"):
        cm.load(boundary.onnx, backend="openvino", precision="tf32")
    with pytest.raises(EngineError, match=r"no installed engine runs .* on cpu in tf32"):
        cm.load(boundary.onnx, precision="tf32", device="cpu")
    with pytest.raises(RequestError, match="precision must be auto, fp32, tf32, bf16 or fp16"):
        cm.load(boundary.onnx, precision="half")  # type: ignore[arg-type]


@pytest.mark.process
@exports.needs_bf16
def test_bf16_on_the_cpu_is_openvinos(boundary: exports.Files) -> None:
    assert cm.load(boundary.onnx, precision="bf16").name == "openvino"


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_graph_is_no_engine_and_an_engine_no_graph(boundary: exports.Files, tmp_path: Path, backend: Any) -> None:
    with pytest.raises(RequestError, match=f"cm-runtime export CKPT --format {backend}"):
        cm.load(boundary.onnx, backend=backend)
    (tmp_path / "m.engine").write_bytes(b"native code")
    with pytest.raises(RequestError, match="which ort does not run"):
        cm.load(tmp_path / "m.engine", backend="ort")
    with pytest.raises(ArtifactError, match=r"m\.engine"):
        cm.load(tmp_path / "m.engine", backend=backend)


def test_the_precision_of_torch_is_asked_for(boundary: exports.Files) -> None:
    full, half = (cm.load(boundary.checkpoint, precision=p) for p in ("fp32", "bf16"))  # type: ignore[arg-type]
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    apart = np.abs(full.denoise(x, 1.0, 1) - half.denoise(x, 1.0, 1)).max()
    assert 1e-5 < apart < 0.1


@pytest.mark.process
def test_they_describe_themselves_alike_but_for_the_parity(boundary: exports.Files) -> None:
    exported_file, checkpoint = (cm.load(p).manifest for p in (boundary.onnx, boundary.checkpoint))
    assert exported_file.model_copy(update={"parity": None}) == checkpoint
    assert len(checkpoint.source_sha256) == 64


@pytest.mark.process
def test_the_default_is_the_bundled_model() -> None:
    if not DEFAULT_MODEL.exists():
        with pytest.raises(ArtifactError, match="no such model"):
            cm.load()
        return
    images = cm.sample(cm.load(), count=2)
    assert images.dtype == np.uint8
    assert images.std() > 10


def test_a_checkpoint_on_onnx_runtime_names_the_command_that_makes_one(boundary: exports.Files) -> None:
    with pytest.raises(RequestError, match="cm-runtime export"):
        cm.load(boundary.checkpoint, backend="ort")


def test_an_exported_file_on_torch_is_refused(boundary: exports.Files) -> None:
    with pytest.raises(RequestError, match="checkpoints"):
        cm.load(boundary.onnx, backend="torch")


@pytest.mark.parametrize("backend", ["", "ORT", "tensorflow", None])
def test_an_unknown_backend_is_named(boundary: exports.Files, backend: Any) -> None:
    with pytest.raises(
        RequestError, match=r"backend must be one of auto, ort, openvino, torch, torch\.compile, tensorrt"
    ):
        cm.load(boundary.onnx, backend=backend)


@pytest.mark.parametrize("threads", [-1, 1 << 40])
@pytest.mark.parametrize("form", ["onnx", "checkpoint"])
def test_an_impossible_number_of_threads_is_one_error(boundary: exports.Files, form: str, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        with pytest.raises(CmRuntimeError, match="threads") as caught:
            cm.load(getattr(boundary, form), threads=threads)
    finally:
        torch.set_num_threads(before)
    one_line(caught.value)


def test_torch_takes_the_threads_it_is_given(boundary: exports.Files) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            cm.load(boundary.checkpoint, threads=threads)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("form", ["onnx", "checkpoint"])
@pytest.mark.parametrize("device", ["cuda:0", "nonsense"])
def test_a_device_that_is_not_there_is_one_error_and_no_fallback(
    boundary: exports.Files, form: str, device: str
) -> None:
    with pytest.raises(EngineError) as caught:
        cm.load(getattr(boundary, form), device=device)
    assert device in one_line(caught.value)


# Files that are not models


def foreign(folder: Path) -> Path:
    """A sound ONNX file that somebody else made."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    onnx.save(helper.make_model(graph, ir_version=9), folder / "foreign.onnx")
    return folder / "foreign.onnx"


def text(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def folder_of(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


NOT_MODELS: dict[str, tuple[Callable[[Path], Path], type[CmRuntimeError], str]] = {
    "missing": (lambda f: f / "no.onnx", ArtifactError, "no such"),
    "missing checkpoint": (lambda f: f / "no.pt", CmRuntimeError, "no such"),
    "in a missing folder": (lambda f: f / "no" / "m.onnx", ArtifactError, "no such"),
    "below a file": (lambda f: text(f, "file", b"") / "m.onnx", CmRuntimeError, "m.onnx"),
    "foreign onnx": (foreign, ArtifactError, "not exported by cm-runtime"),
    "empty": (lambda f: text(f, "m.onnx", b""), ArtifactError, "not an ONNX file"),
    "text": (lambda f: text(f, "m.onnx", b"hello, world\n" * 20), ArtifactError, "m.onnx"),
    "zeros": (lambda f: text(f, "m.onnx", bytes(1000)), ArtifactError, "not an ONNX file"),
    "a folder": (lambda f: folder_of(f, "m.onnx"), CheckpointError, "is no diffusers folder of a UNet2DModel"),
    "a checkpoint folder": (lambda f: folder_of(f, "m.pt"), CheckpointError, "m.pt"),
    "a text checkpoint": (lambda f: text(f, "m.pt", b"hello"), CheckpointError, "not a torch checkpoint"),
    "an empty checkpoint": (lambda f: text(f, "m.pt", b""), CheckpointError, "not a torch checkpoint"),
}


@pytest.mark.parametrize("name", NOT_MODELS)
def test_a_file_that_is_no_model_is_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    make, kind, message = NOT_MODELS[name]
    path = make(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        cm.load(path)
    assert str(path) in one_line(caught.value)


def test_a_path_of_nulls_is_an_error_of_ours() -> None:
    with pytest.raises(CmRuntimeError):
        cm.load("model\0.onnx")


def lengths(path: Path) -> list[int]:
    """Where a copy may break off: in the graph, just behind it, in the manifest, in the function, at the end."""
    content = path.read_bytes()
    manifest = content.index(b'{"format_version"')
    length = len(content)
    return [1, 10, 1000, length // 3, manifest - 40, manifest + 30, manifest + 400, length - 500, length - 1]


@pytest.mark.parametrize("place", range(9))
def test_a_truncated_file_is_an_artifact_error(boundary: exports.Files, tmp_path: Path, place: int) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(boundary.onnx.read_bytes()[: lengths(boundary.onnx)[place]])
    with pytest.raises(ArtifactError) as caught:
        cm.load(cut)
    assert str(cut) in one_line(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_a_checkpoint_error(boundary: exports.Files, tmp_path: Path, share: float) -> None:
    content = boundary.checkpoint.read_bytes()
    cut = text(tmp_path, "cut.pt", content[: int(len(content) * share)])
    with pytest.raises(CheckpointError) as caught:
        cm.load(cut)
    assert str(cut) in one_line(caught.value)


FLIP_AND_RUN = """
import random, sys
import numpy as np
from cm_runtime import load, sample
from cm_runtime.errors import ArtifactError, EngineError, RequestError

source, target, what, seeds = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
sound = open(source, "rb").read()
manifest = sound.index(b'{"format_version"')
places = {"anywhere": range(len(sound)), "nodes": range(NODES), "end": range(manifest, len(sound))}[what]
outcomes = {"ran": 0, "refused": 0}
for seed in range(seeds):
    draw = random.Random(seed)
    damaged = bytearray(sound)
    for _ in range(draw.choice((1, 1, 4, 64))):
        damaged[draw.choice(places)] ^= 1 << draw.randrange(8)
    open(target, "wb").write(damaged)
    print("seed", seed, file=sys.stderr, flush=True)
    try:
        sample(load(target, threads=1, backend="ort"), count=1, steps=1)
        outcomes["ran"] += 1
    except (ArtifactError, EngineError, RequestError) as error:
        assert len(str(error).splitlines()) == 1, repr(str(error))
        outcomes["refused"] += 1
print(outcomes["ran"], outcomes["refused"])
"""


@pytest.mark.process
@pytest.mark.parametrize(("what", "seeds"), [("anywhere", 30), ("nodes", 120), ("end", 120)])
def test_flipped_bits_end_in_an_error_of_ours_or_in_images(
    boundary: exports.Files, tmp_path: Path, what: str, seeds: int
) -> None:
    """In a process of its own, so that a crash of the engine would be seen.

    nodes: the graph's nodes, which lie before its weights; end: the manifest and the function behind them.
    """
    nodes = sum(node.ByteSize() for node in onnx.load(boundary.onnx).graph.node)
    script = FLIP_AND_RUN.replace("NODES", str(nodes))
    words = [sys.executable, "-c", script, str(boundary.onnx), str(tmp_path / "flipped.onnx"), what, str(seeds)]
    done = subprocess.run(words, capture_output=True, text=True, env=exports.environment(), timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    ran, refused = map(int, done.stdout.split())
    assert ran + refused == seeds
    assert refused > 0 or what == "anywhere"


# Manifests that lie


def lied(boundary: exports.Files, folder: Path, **changes: Any) -> Path:
    manifest = json.loads(onnx.load(boundary.onnx).metadata_props[0].value)
    return exports.with_metadata(boundary.onnx, folder / "lie.onnx", json.dumps({**manifest, **changes}))


LIES: dict[str, dict[str, Any]] = {
    "more channels": {"image_shape": [4, 8, 8]},
    "larger": {"image_shape": [3, 16, 16]},
    "oblong": {"image_shape": [3, 8, 16]},
    "no size": {"image_shape": [3, 0, 8]},
    "negative size": {"image_shape": [3, -8, -8]},
    "enormous": {"image_shape": [3, 1 << 20, 1 << 20]},
    "beyond memory": {"image_shape": [1 << 31, 1 << 31, 1 << 31]},
    "no classes": {"num_classes": 0},
    "more classes": {"num_classes": 1000},
    "endless classes": {"num_classes": 1 << 70},
    "negative classes": {"num_classes": -1},
    "another format": {"format_version": 2},
    "another graph": {"graph": "sampler"},
    "another form": {"precond": "trigflow"},
    "an unknown key": {"danger": True},
    "no noise": {"sigma_max": 0},
    "noise upside down": {"sigma_min": 90.0},
    "a bend that overflows": {"rho": 1e-5},
    "tuned for no level": {"sigmas": {"2": []}},
    "tuned below the range": {"sigmas": {"2": [80.0, 0.001]}},
    "tuned upwards": {"sigmas": {"2": [1.0, 80.0]}},
    "tuned to NaN": {"sigmas": {"2": [80.0, float("nan")]}},
    "tuned for another count": {"sigmas": {"2": [80.0, 2.0, 1.0]}},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_ends_in_one_line(boundary: exports.Files, tmp_path: Path, lie: str) -> None:
    path = lied(boundary, tmp_path, **LIES[lie])
    with pytest.raises(CmRuntimeError) as caught:
        cm.sample(cm.load(path), count=1000 if lie == "more classes" else 3, steps=2)
    one_line(caught.value)


@pytest.mark.parametrize(
    "manifest", ["", "{}", "null", "[1]", "not json", '{"format_version": 1', "\x00", "[" * 100_000, "9" * 100_000]
)
def test_a_manifest_that_is_none_is_an_artifact_error(boundary: exports.Files, tmp_path: Path, manifest: str) -> None:
    path = exports.with_metadata(boundary.onnx, tmp_path / "m.onnx", manifest)
    with pytest.raises(ArtifactError, match=r"m\.onnx") as caught:
        cm.load(path)
    one_line(caught.value)


@pytest.mark.process
def test_a_teacher_is_not_sampled_in_a_few_steps(boundary: exports.Files, tmp_path: Path) -> None:
    manifest = json.loads(onnx.load(boundary.onnx).metadata_props[0].value)
    teacher = lied(boundary, tmp_path, training={**manifest["training"], "method": "edm"})
    model = cm.load(teacher)
    assert model.denoise(np.zeros((1, 3, 8, 8), np.float32), 1.0, 0).shape == (1, 3, 8, 8)
    with pytest.raises(RequestError, match="teacher"):
        cm.sample(model, count=1)


def test_a_teachers_checkpoint_is_not_sampled_in_a_few_steps(tmp_path: Path) -> None:
    save_checkpoint(exports.checkpoint("edm", method="edm"), tmp_path / "teacher.pt")
    with pytest.raises(RequestError, match="teacher"):
        cm.sample(cm.load(tmp_path / "teacher.pt"), count=1)


# Graphs that do not fit our manifest

OUTPUTS: dict[str, tuple[list[Any], int, list[Any]]] = {
    "another size": (
        [helper.make_node("Concat", ["x", "x"], ["denoised"], axis=3)],
        TensorProto.FLOAT,
        ["N", 3, 8, 16],
    ),
    "another batch": (
        [helper.make_node("Concat", ["x", "x"], ["denoised"], axis=0)],
        TensorProto.FLOAT,
        ["M", 3, 8, 8],
    ),
    "one number": ([helper.make_node("ReduceMax", ["x"], ["denoised"], keepdims=0)], TensorProto.FLOAT, []),
    "words": (
        [helper.make_node("Cast", ["x"], ["denoised"], to=TensorProto.STRING)],
        TensorProto.STRING,
        ["N", 3, 8, 8],
    ),
    "a sequence": ([helper.make_node("SplitToSequence", ["x"], ["denoised"], axis=0)], 0, []),
    "not a number": (
        [helper.make_node("Sub", ["x", "x"], ["zero"]), helper.make_node("Div", ["zero", "zero"], ["denoised"])],
        TensorProto.FLOAT,
        ["N", 3, 8, 8],
    ),
    "another name": ([helper.make_node("Identity", ["x"], ["y"])], TensorProto.FLOAT, ["N", 3, 8, 8]),
}


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("what", OUTPUTS)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_graph_whose_output_is_no_image_ends_in_one_line(
    boundary: exports.Files, tmp_path: Path, what: str, steps: int
) -> None:
    nodes, kind, shape = OUTPUTS[what]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8]),
        helper.make_tensor_value_info("sigma", TensorProto.FLOAT, ["N"]),
        helper.make_tensor_value_info("label", TensorProto.INT64, ["N"]),
    ]
    name = nodes[-1].output[0]
    output = (
        helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None)
        if what == "a sequence"
        else helper.make_tensor_value_info(name, kind, shape)
    )
    graph = helper.make_graph(nodes, "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {"cm_runtime": onnx.load(boundary.onnx).metadata_props[0].value})
    onnx.save(model, tmp_path / "m.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))  # a sound graph in itself
    with pytest.raises(CmRuntimeError) as caught:
        cm.sample(cm.load(tmp_path / "m.onnx"), count=3, steps=steps)
    one_line(caught.value)
