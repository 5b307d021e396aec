"""OpenVINO: the files as they are, float32 that is float32, bfloat16 that keeps what it must, and damaged files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import cm_runtime as cm
from cm_runtime import noise, onnx_graph
from cm_runtime.backends import openvino as module
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends.openvino import OpenVinoBackend, split
from cm_runtime.backends.torch import TorchBackend
from cm_runtime.checkpoints.native import read_checkpoint
from cm_runtime.errors import ArtifactError, EngineError, MissingExtraError, RequestError
from cm_runtime.manifest import Manifest, read_manifest

Array = np.ndarray[Any, Any]
LEVELS = np.geomspace(0.002, 80, 7).astype(np.float32)


@pytest.fixture(scope="module", params=exports.KINDS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> exports.Files:
    return exports.Files(request.param, tmp_path_factory)


def inputs(manifest: Manifest, n: int) -> tuple[Array, Array, Array | None]:
    sigma = np.resize(LEVELS, n)
    spread = np.hypot(sigma, manifest.sigma_data)[:, None, None, None]
    x = (noise.normal(n, np.arange(n), 0, manifest.image_shape) * spread).astype(np.float32)
    return x, sigma, np.arange(n) % manifest.num_classes if manifest.num_classes else None


def reference(files: exports.Files) -> TorchBackend:
    ours = read_checkpoint(files.checkpoint)
    return TorchBackend(ours.model(), ours.manifest())


def psnr(found: Array, wanted: Array) -> Array:
    """dB of each image, on [-1, 1] data."""
    error = np.mean((found.astype(np.float64) - wanted) ** 2, axis=(1, 2, 3))
    return 10 * np.log10(4 / np.maximum(error, 1e-20))  # type: ignore[no-any-return]


@pytest.mark.process
@pytest.mark.covering(1)
@pytest.mark.parametrize("form", ["onnx", "inline", "half", "apart", "half_apart", "inline_apart"])
def test_every_form_of_a_file_computes_what_torch_computes(each: exports.Files, form: str) -> None:
    """In batches that grow and shrink; float32 is float32, whatever the processor would rather."""
    engine, torch = OpenVinoBackend(getattr(each, form)), reference(each)
    for n in (1, 3, 7, 1):
        given = inputs(engine.manifest, n)
        assert np.abs(engine.denoise(*given) - torch.denoise(*given)).max() < 1e-5


@pytest.mark.process
@pytest.mark.covering(1)
@pytest.mark.parametrize("precision", exports.HALVES)
def test_a_file_of_half_types_computes_in_full_or_half(each: exports.Files, precision: Any) -> None:
    path = each.exported(precision=precision)
    torch = reference(each)
    for computed in ("fp32", "bf16") if module.has_bf16() else ("fp32",):
        engine = OpenVinoBackend(path, options=EngineOptions(device="cpu", precision=computed))  # type: ignore[arg-type]
        for n in (7, 1, 3):
            given = inputs(engine.manifest, n)
            found = engine.denoise(*given)
            assert found.dtype == np.float32
            assert psnr(found, torch.denoise(*given)).min() >= 40


@pytest.mark.process
@pytest.mark.covering(1)
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=exports.needs_bf16)])
def test_a_sampler_draws_what_the_loop_draws(each: exports.Files, precision: Any) -> None:
    """In fp32 to one grey level."""
    path = each.exported(graph="sampler", sigmas=(80.0, 1.5))
    engine, torch = OpenVinoBackend(path, options=EngineOptions(device="cpu", precision=precision)), reference(each)
    for n in (1, 3, 7, 1):
        z = noise.normals(1, np.arange(n, dtype=np.uint64), 2, engine.manifest.image_shape)
        label = inputs(engine.manifest, n)[2]
        listed = None if label is None else label.tolist()
        wanted = cm.sample(torch, noise=z, sigmas=(80.0, 1.5), labels=listed, micro_batch=n)
        found = engine.draw(z, label)
        assert found.flags.writeable
        if precision == "fp32":
            assert np.abs(found.astype(int) - wanted).max() <= 1
        else:
            assert psnr(found / 127.5, wanted / 127.5).min() >= 40


@pytest.mark.process
def test_it_computes_with_the_threads_it_is_given(boundary: exports.Files) -> None:
    for precision in ("fp32", "bf16") if module.has_bf16() else ("fp32",):
        for threads in (1, 2):
            engine = OpenVinoBackend(
                boundary.onnx, options=EngineOptions(device="cpu", threads=threads, precision=precision)
            )  # type: ignore[arg-type]
            for compiled in filter(None, (engine._request.get_compiled_model(), engine._prefix)):
                assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
    for threads in (-1, 1 << 40):
        with pytest.raises(RequestError, match="threads"):
            OpenVinoBackend(boundary.onnx, options=EngineOptions(device="cpu", threads=threads))


@pytest.mark.process
def test_an_answer_is_the_callers_and_inputs_may_be_read_only(boundary: exports.Files) -> None:
    engine = OpenVinoBackend(boundary.onnx)
    x, sigma, label = inputs(engine.manifest, 3)
    before = x.copy()
    x.setflags(write=False)
    first = engine.denoise(x, sigma, label)
    kept = first.copy()
    engine.denoise(x * 0.5, sigma, label)
    assert np.array_equal(first, kept)
    first[:] = 0
    assert np.array_equal(x, before)
    assert np.array_equal(engine.denoise(x, sigma, label), kept)


@pytest.mark.process
def test_threads_take_turns(boundary: exports.Files) -> None:
    """A request of OpenVINO serves one at a time, and would raise for the other."""
    engine = OpenVinoBackend(boundary.onnx, options=EngineOptions(device="cpu", threads=1))
    given = inputs(engine.manifest, 7)
    wanted, wrong = engine.denoise(*given), []

    def work() -> None:
        for _ in range(10):
            try:
                if not np.array_equal(engine.denoise(*given), wanted):
                    wrong.append("another answer")
            except Exception as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.process
@pytest.mark.covering(1)
@exports.needs_bf16
@pytest.mark.parametrize("form", ["onnx", "inline", "apart"])
def test_bfloat16_keeps_40_dB_at_every_noise_level(each: exports.Files, form: str) -> None:
    engine, torch = (
        OpenVinoBackend(getattr(each, form), options=EngineOptions(device="cpu", precision="bf16")),
        reference(each),
    )
    given = inputs(engine.manifest, 7)
    wanted, found = torch.denoise(*given), engine.denoise(*given)
    assert psnr(found, wanted).min() >= 40
    assert np.abs(found - wanted).max() > 1e-4  # and is bfloat16


@pytest.mark.process
@exports.needs_bf16
def test_without_the_split_bfloat16_loses_the_noise_level(boundary: exports.Files) -> None:
    """What the split is for: 1095, which c_noise is at sigma 80, lies between two numbers of bfloat16."""
    core = module.core()
    whole = core.compile_model(module.read_model(boundary.onnx), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    engine = OpenVinoBackend(boundary.onnx, options=EngineOptions(device="cpu", precision="bf16"))
    x, sigma, label = inputs(engine.manifest, 7)
    wanted = reference(boundary).denoise(x, sigma, label)
    assert psnr(whole({"x": x, "sigma": sigma, "label": label})["denoised"], wanted).min() < 40
    assert psnr(engine.denoise(x, sigma, label), wanted).min() > 45


@pytest.mark.process
def test_the_split_is_where_the_images_come_in(each: exports.Files) -> None:
    """Both parts together compute the whole, and the second knows neither sigma nor label."""
    core = module.core()
    before, rest, names = split(module.read_model(each.onnx), "x")
    assert {p.get_any_name() for p in before.inputs} <= {"sigma", "label"}
    assert {p.get_any_name() for p in rest.inputs} == {"x", *names}
    assert {"Log", "Sin", "Cos"} <= {node.get_type_name() for node in before.get_ops()}
    assert not {"Log", "Sin", "Cos"} & {node.get_type_name() for node in rest.get_ops()}
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    first, second = (core.compile_model(part, "CPU", options) for part in (before, rest))
    x, sigma, label = inputs(OpenVinoBackend(each.onnx).manifest, 7)
    given = {"sigma": sigma} | ({} if label is None else {"label": label})
    made = first({name: given[name] for name in (p.get_any_name() for p in first.inputs)})
    found = second({"x": x, **{name: made[i] for i, name in enumerate(names)}})["denoised"]
    assert np.abs(found - reference(each).denoise(x, sigma, label)).max() < 1e-5


def test_the_rest_is_of_the_images_alone(each: exports.Files) -> None:
    """What it is given goes into nodes that the images go into too: nothing else could have been computed before."""
    before, rest, names = split(module.read_model(each.onnx), "x")
    assert [port.get_any_name() for port in rest.inputs] == ["x", *names]
    assert len(set(names)) == len(before.outputs)
    late, given = set(), set()
    for node in rest.get_ordered_ops():
        sources = {node.input_value(i).get_node().get_name() for i in range(node.get_input_size())}
        if node.get_type_name() == "Parameter":
            (late if "x" in node.output(0).get_names() else given).add(node.get_name())
        elif sources & late:
            late.add(node.get_name())
        else:
            assert not sources & given, node.get_friendly_name()


@pytest.mark.process
@exports.needs_bf16
def test_nodes_of_one_name_are_split_apart(boundary: exports.Files, tmp_path: Path) -> None:
    model = onnx.load(boundary.onnx)
    for node in model.graph.node:
        node.name = "same"
    onnx.save(model, tmp_path / "m.onnx")
    plain, same = (
        OpenVinoBackend(path, options=EngineOptions(device="cpu", precision="bf16"))
        for path in (boundary.onnx, tmp_path / "m.onnx")
    )
    given = inputs(plain.manifest, 7)
    assert np.array_equal(plain.denoise(*given), same.denoise(*given))


@pytest.mark.process
@exports.needs_bf16
def test_a_sampler_without_classes_has_nothing_to_split_off(edm: exports.Files) -> None:
    path = edm.exported(graph="sampler", steps=2)
    engine = OpenVinoBackend(path, options=EngineOptions(device="cpu", precision="bf16"))
    assert engine._cut_names == []
    z = noise.normals(0, np.arange(3, dtype=np.uint64), 2, engine.manifest.image_shape)
    full = OpenVinoBackend(path).draw(z)
    assert full.std() > 10
    assert psnr(engine.draw(z) / 127.5, full / 127.5).min() >= 40


# What is refused


def test_another_device_is_one_line(boundary: exports.Files) -> None:
    for device in ("cuda:0", "GPU", "nonsense"):
        with pytest.raises(RequestError, match="OpenVINO runs on the CPU here"):
            OpenVinoBackend(boundary.onnx, options=EngineOptions(device=device))


def test_a_processor_without_bfloat16_is_one_line(boundary: exports.Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_bf16", lambda: False)
    with pytest.raises(EngineError, match="this one does not: use fp32"):
        OpenVinoBackend(boundary.onnx, options=EngineOptions(device="cpu", precision="bf16"))


def test_a_missing_package_names_the_pip_command(boundary: exports.Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"needs openvino: pip install 'cm-runtime\[openvino\]'"):
        OpenVinoBackend(boundary.onnx)


@pytest.mark.process
def test_a_table_smaller_than_the_manifests_classes_is_refused(boundary: exports.Files) -> None:
    """OpenVINO itself makes zeros of a label beyond it."""
    honest = OpenVinoBackend(boundary.onnx).manifest
    for classes in (exports.CLASSES + 1, 1000, exports.CLASSES - 1):
        with pytest.raises(ArtifactError, match=f"not for the {classes} classes"):
            OpenVinoBackend(boundary.onnx, honest.model_copy(update={"num_classes": classes}))


def test_a_truncated_file_is_one_line(boundary: exports.Files, tmp_path: Path) -> None:
    """In the graph, a weight, the manifest and just before the end, with and without a manifest to believe."""
    content, manifest, path = boundary.onnx.read_bytes(), read_manifest(boundary.onnx), tmp_path / "m.onnx"
    start = content.index(b'{"format_version"')
    for place in (0, 1, 10, 1000, 40_000, len(content) // 2, start - 40, start + 30, len(content) - 1, None):
        path.unlink() if place is None else path.write_bytes(content[:place])
        for believed in (manifest, None):
            with pytest.raises(ArtifactError, match=r"m\.onnx") as caught:
                OpenVinoBackend(path, believed)
            assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("damage", ["a page short", "a byte short", "empty", "gone"])
def test_a_damaged_data_file_is_one_line(boundary: exports.Files, tmp_path: Path, damage: str) -> None:
    path = exports.copied(boundary.apart, tmp_path)
    data = exports.data_file(path)
    whole = data.read_bytes()
    data.write_bytes({"a page short": whole[: -(1 << 12)], "a byte short": whole[:-1]}.get(damage, b""))
    if damage == "gone":
        data.unlink()
    with pytest.raises(ArtifactError, match=rf"apart\.onnx: its weights .*{data.name}") as caught:
        OpenVinoBackend(path)
    assert len(str(caught.value).splitlines()) == 1


ELSEWHERE = [("location", each) for each in ("/etc/passwd", "../out.data", "link.data", "/dev/zero", "nothing.data")]
BEYOND = [("offset", "-4096"), ("offset", str((1 << 64) - 4096)), ("offset", "9" * 40), ("offset", "x")]


@pytest.mark.parametrize(("key", "value"), [*ELSEWHERE, *BEYOND, ("length", "4"), ("length", "-1"), ("length", "x")])
def test_weights_that_lie_elsewhere_are_refused(boundary: exports.Files, tmp_path: Path, key: str, value: str) -> None:
    """Nothing is read outside of the file's own folder, or beyond the data file's end."""
    (tmp_path / "m").mkdir()
    path = exports.copied(boundary.apart, tmp_path / "m")
    (tmp_path / "out.data").write_bytes(exports.data_file(path).read_bytes())
    (tmp_path / "m" / "link.data").symlink_to("../out.data")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError) as caught:
        OpenVinoBackend(path)
    assert len(str(caught.value).splitlines()) == 1


# Each of these was a segmentation fault in the reader of OpenVINO
FATAL = ("Conv", "GlobalAveragePool", "GlobalMaxPool", "LogSoftmax", "Max", "Mean", "Min", "Pad", "Sum")
NODES: dict[str, tuple[str, str, list[str]]] = {
    **{f"{kind} of nothing": (kind, "", []) for kind in FATAL},
    "Clip of empty names": ("Clip", "", ["", ""]),
    "Conv without a filter": ("Conv", "", ["x"]),
    "Pad without a size": ("Pad", "", ["x"]),
    "another domain": ("Conv", "com.microsoft", ["x", "x"]),
}


@pytest.mark.parametrize("what", NODES)
def test_a_node_that_would_end_the_process_is_refused(boundary: exports.Files, tmp_path: Path, what: str) -> None:
    kind, domain, given = NODES[what]
    for in_function in (False, True):
        model = onnx.load(boundary.onnx)
        nodes = model.functions[0].node if in_function else model.graph.node
        nodes.append(helper.make_node(kind, given, ["more"], domain=domain))
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ArtifactError, match=r"its graph|OpenVINO runs only graphs as"):
            OpenVinoBackend(tmp_path / "m.onnx")


def test_a_graph_inside_a_node_is_refused(boundary: exports.Files, tmp_path: Path) -> None:
    model = onnx.load(boundary.onnx)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Conv", [], ["y"])], "branch", [], [out])
    model.graph.node.append(helper.make_node("If", ["x"], ["more"], then_branch=branch, else_branch=branch))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="a graph inside a node"):
        OpenVinoBackend(tmp_path / "m.onnx")


@pytest.mark.parametrize("port", ["x", "sigma", "label", "denoised"])
def test_other_inputs_or_outputs_than_the_manifests_are_refused(
    boundary: exports.Files, tmp_path: Path, port: str
) -> None:
    model = onnx.load(boundary.onnx)
    for value in (*model.graph.input, *model.graph.output):
        value.name = "other" if value.name == port else value.name
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["other" if name == port else name for name in names]
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="inputs and outputs are not those of its manifest"):
        OpenVinoBackend(tmp_path / "m.onnx")


def test_a_table_that_is_a_number_is_refused(boundary: exports.Files, tmp_path: Path) -> None:
    model = onnx.load(boundary.onnx)
    (table,) = (tensor for tensor in model.graph.initializer if tensor.name == "F.label_emb.weight")
    table.CopyFrom(helper.make_tensor(table.name, TensorProto.FLOAT, [], [1.0]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError) as caught:
        OpenVinoBackend(tmp_path / "m.onnx")
    assert len(str(caught.value).splitlines()) == 1


def test_of_what_it_says_the_line_that_tells_is_told(boundary: exports.Files, tmp_path: Path) -> None:
    model = onnx.load(boundary.onnx)
    model.graph.node[5].input[0] = "nothing"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    verdict = onnx_graph.check(boundary.onnx, read_manifest(boundary.onnx))  # of another file: this one has no good one
    with pytest.raises(ArtifactError, match='cannot load it: Input tensor isn\'t found for node "nothing"'):
        OpenVinoBackend(tmp_path / "m.onnx", verdict=verdict)


FLIP = """
import random, sys
import numpy as np
from cm_runtime.manifest import read_manifest
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends.openvino import OpenVinoBackend
from cm_runtime.errors import CmRuntimeError

source, target, seeds = sys.argv[1], sys.argv[2], int(sys.argv[3])
sound, manifest = open(source, "rb").read(), read_manifest(source)
ran = refused = 0
for seed in range(seeds):
    draw = random.Random(seed)
    damaged = bytearray(sound)
    for _ in range(draw.choice((1, 1, 4, 64))):
        damaged[draw.randrange(len(sound) if seed % 3 == 0 else 40000)] ^= 1 << draw.randrange(8)
    if seed == 1:
        damaged[0] ^= 255  # no ONNX at all, which other readers of OpenVINO would print of
    open(target, "wb").write(damaged)
    try:
        engine = OpenVinoBackend(target, manifest if seed % 2 else None, EngineOptions(device="cpu", threads=1))
        engine.denoise(np.zeros((1, 3, 8, 8), np.float32), 1.0, 0)
        ran += 1
    except CmRuntimeError as error:
        assert len(str(error).splitlines()) == 1
        refused += 1
print(ran, refused)
"""


@pytest.mark.process
@pytest.mark.quick("apart")
@pytest.mark.parametrize("form", ["onnx", "inline", "apart"])
def test_flipped_bits_end_in_an_error_of_ours_or_in_images(boundary: exports.Files, tmp_path: Path, form: str) -> None:
    """In a process of its own, so that a crash of the engine would be seen, and what it prints."""
    path = exports.copied(getattr(boundary, form), tmp_path)
    words = [sys.executable, "-c", FLIP, str(path), str(tmp_path / "m.onnx"), "60"]
    done = subprocess.run(words, capture_output=True, text=True, env=exports.environment(), timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    ran, refused = map(int, done.stdout.split())
    assert ran + refused == 60
    assert refused > 5


@pytest.mark.process
def test_nothing_is_sent_or_written_or_printed(boundary: exports.Files, tmp_path: Path) -> None:
    """Its telemetry would leave files in the home folder."""
    code = (
        "import sys; from cm_runtime.backends.openvino import OpenVinoBackend, has_bf16; has_bf16();"
        "OpenVinoBackend(sys.argv[1]); assert 'openvino_telemetry' not in sys.modules"
    )
    environment = {**exports.environment(), "HOME": str(tmp_path)}
    words = [sys.executable, "-c", code, str(boundary.onnx)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_signal_finds_its_stack_when_engines_have_come_and_gone(boundary: exports.Files) -> None:
    """Two plugins would leave the main thread with an unmapped stack for its signal handlers."""
    code = (
        "import os, signal, sys; from cm_runtime.backends.openvino import OpenVinoBackend, has_bf16; has_bf16();"
        "old = OpenVinoBackend(sys.argv[1]); new = OpenVinoBackend(sys.argv[1]); del old; del new;"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled')); os.kill(os.getpid(), signal.SIGUSR1)"
    )
    words = [sys.executable, "-c", code, str(boundary.onnx)]
    done = subprocess.run(words, capture_output=True, text=True, env=exports.environment(), timeout=120)
    assert (done.returncode, done.stdout) == (0, "handled\n")


@pytest.mark.process
def test_memory_does_not_grow_with_every_new_batch_size(boundary: exports.Files) -> None:
    """A cache of what is made for each shape would take 3 MB a size here, and far more of a real network."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

    engine = OpenVinoBackend(boundary.onnx, options=EngineOptions(device="cpu", threads=1))
    sizes = [100, *range(1, 46)]
    grown = []
    for n in sizes:
        engine.evaluate(
            {"x": np.zeros((n, 3, 8, 8), np.float32), "sigma": np.ones(n, np.float32), "label": np.zeros(n, np.int64)}
        )
        grown.append(resident())
    assert grown[-1] - grown[30] < 20
