"""OpenVINO: the files as they are, float32 that is float32, bfloat16 that keeps what it must, and damaged files."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import exported
import numpy as np
import pytest

from cm_runtime import export, noise
from cm_runtime.artifact import Manifest
from cm_runtime.backends import openvino as module
from cm_runtime.backends.openvino import OpenVinoBackend, split
from cm_runtime.backends.torch import TorchBackend
from cm_runtime.checkpoint import read_checkpoint
from cm_runtime.errors import ArtifactError, EngineError, MissingExtraError, RequestError

Array = np.ndarray[Any, Any]
LEVELS = np.geomspace(0.002, 80, 7).astype(np.float32)


@pytest.fixture(scope="module", params=exported.KINDS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> exported.Files:
    return exported.Files(request.param, tmp_path_factory)


def inputs(manifest: Manifest, n: int) -> tuple[Array, Array, Array | None]:
    sigma = np.resize(LEVELS, n)
    spread = np.hypot(sigma, manifest.sigma_data)[:, None, None, None]
    x = (noise.normal(n, np.arange(n), 0, manifest.image_shape) * spread).astype(np.float32)
    return x, sigma, np.arange(n) % manifest.num_classes if manifest.num_classes else None


def reference(files: exported.Files) -> TorchBackend:
    ours = read_checkpoint(files.checkpoint)
    return TorchBackend(ours.model(), ours.manifest())


def psnr(found: Array, wanted: Array) -> Array:
    """dB of each image, on [-1, 1] data."""
    error = np.mean((found.astype(np.float64) - wanted) ** 2, axis=(1, 2, 3))
    return 10 * np.log10(4 / np.maximum(error, 1e-20))  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["onnx", "inline", "half", "apart", "half_apart", "inline_apart"])
def test_every_form_of_a_file_computes_what_torch_computes(each: exported.Files, form: str) -> None:
    """In batches that grow and shrink; float32 is float32, whatever the processor would rather."""
    engine, torch = OpenVinoBackend(getattr(each, form)), reference(each)
    for n in (1, 3, 7, 1):
        given = inputs(engine.manifest, n)
        assert np.abs(engine.denoise(*given) - torch.denoise(*given)).max() < 1e-5


def test_an_answer_is_the_callers_and_inputs_may_be_read_only(boundary: exported.Files) -> None:
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


def test_threads_take_turns(boundary: exported.Files) -> None:
    """A request of OpenVINO serves one at a time, and would raise for the other."""
    engine = OpenVinoBackend(boundary.onnx, threads=1)
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


needs_bf16 = pytest.mark.skipif(not module.has_bf16(), reason="this processor has no bfloat16 for OpenVINO")


@needs_bf16
@pytest.mark.parametrize("form", ["onnx", "inline", "apart"])
def test_bfloat16_keeps_40_dB_at_every_noise_level(each: exported.Files, form: str) -> None:
    engine, torch = OpenVinoBackend(getattr(each, form), precision="bf16"), reference(each)
    given = inputs(engine.manifest, 7)
    wanted, found = torch.denoise(*given), engine.denoise(*given)
    assert psnr(found, wanted).min() >= 40
    assert np.abs(found - wanted).max() > 1e-4  # and is bfloat16


@needs_bf16
def test_without_the_split_bfloat16_loses_the_noise_level(boundary: exported.Files) -> None:
    """What the split is for: 1095, which c_noise is at sigma 80, lies between two numbers of bfloat16."""
    core = module.package().Core()
    core.add_extension(module._skip_scale_extension())
    whole = core.compile_model(core.read_model(str(boundary.onnx)), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    engine = OpenVinoBackend(boundary.onnx, precision="bf16")
    x, sigma, label = inputs(engine.manifest, 7)
    wanted = reference(boundary).denoise(x, sigma, label)
    assert psnr(whole({"x": x, "sigma": sigma, "label": label})["denoised"], wanted).min() < 40
    assert psnr(engine.denoise(x, sigma, label), wanted).min() > 45


def test_the_split_is_where_the_images_come_in(each: exported.Files) -> None:
    """Both parts together compute the whole, and the second knows neither sigma nor label."""
    core = module.package().Core()
    core.add_extension(module._skip_scale_extension())
    graph = core.read_model(str(each.onnx))
    before, rest, names = split(graph, "x")
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


@needs_bf16
def test_a_sampler_without_classes_has_nothing_to_split_off(tmp_path: Path, edm: exported.Files) -> None:
    export.onnx(read_checkpoint(edm.checkpoint), tmp_path / "m.onnx", graph="sampler", steps=2)
    engine = OpenVinoBackend(tmp_path / "m.onnx", precision="bf16")
    assert engine._apart == []
    z = noise.normals(0, np.arange(3, dtype=np.uint64), 2, engine.manifest.image_shape)
    full = OpenVinoBackend(tmp_path / "m.onnx").draw(z)
    assert full.std() > 10
    assert psnr(engine.draw(z) / 127.5, full / 127.5).min() >= 40


# What is refused


def test_another_device_is_one_line(boundary: exported.Files) -> None:
    for device in ("cuda:0", "GPU", "nonsense"):
        with pytest.raises(RequestError, match="OpenVINO runs on the CPU here"):
            OpenVinoBackend(boundary.onnx, device=device)


def test_a_processor_without_bfloat16_is_one_line(boundary: exported.Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_bf16", lambda: False)
    with pytest.raises(EngineError, match="this one does not: use fp32"):
        OpenVinoBackend(boundary.onnx, precision="bf16")


def test_a_missing_package_names_the_pip_command(boundary: exported.Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises((MissingExtraError, ImportError), match="openvino"):
        OpenVinoBackend(boundary.onnx)


def test_a_table_smaller_than_the_manifests_classes_is_refused(boundary: exported.Files) -> None:
    """OpenVINO itself would read beside it."""
    honest = OpenVinoBackend(boundary.onnx).manifest
    for classes in (exported.CLASSES + 1, 1000, exported.CLASSES - 1):
        with pytest.raises(ArtifactError, match=f"not for the {classes} classes"):
            OpenVinoBackend(boundary.onnx, honest.model_copy(update={"num_classes": classes}))


@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_a_truncated_file_is_one_line(boundary: exported.Files, tmp_path: Path, share: float) -> None:
    content, manifest = boundary.onnx.read_bytes(), OpenVinoBackend(boundary.onnx).manifest
    (tmp_path / "m.onnx").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ArtifactError) as caught:
        OpenVinoBackend(tmp_path / "m.onnx", manifest)
    assert len(str(caught.value).splitlines()) == 1


def test_a_data_file_cut_short_is_one_line(boundary: exported.Files, tmp_path: Path) -> None:
    path = exported.copied(boundary.apart, tmp_path)
    data = exported.data_file(path)
    data.write_bytes(data.read_bytes()[: -(1 << 12)])
    with pytest.raises(ArtifactError) as caught:
        OpenVinoBackend(path)
    assert len(str(caught.value).splitlines()) == 1


FLIP = """
import random, sys
import numpy as np
from cm_runtime.backends.openvino import OpenVinoBackend
from cm_runtime.errors import CmRuntimeError

source, target, seeds = sys.argv[1], sys.argv[2], int(sys.argv[3])
sound = open(source, "rb").read()
ran = refused = 0
for seed in range(seeds):
    draw = random.Random(seed)
    damaged = bytearray(sound)
    for _ in range(draw.choice((1, 4, 64))):
        damaged[draw.randrange(len(sound) if seed % 2 else 40000)] ^= 1 << draw.randrange(8)
    open(target, "wb").write(damaged)
    try:
        OpenVinoBackend(target, threads=1).denoise(np.zeros((1, 3, 8, 8), np.float32), 1.0, 0)
        ran += 1
    except CmRuntimeError as error:
        assert len(str(error).splitlines()) == 1
        refused += 1
print(ran, refused)
"""


def test_flipped_bits_end_in_an_error_of_ours_or_in_images(boundary: exported.Files, tmp_path: Path) -> None:
    """In a process of its own, so that a crash of the engine would be seen."""
    words = [sys.executable, "-c", FLIP, str(boundary.onnx), str(tmp_path / "m.onnx"), "40"]
    done = subprocess.run(words, capture_output=True, text=True, env=exported.environment(), timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    ran, refused = map(int, done.stdout.split())
    assert ran + refused == 40 and refused > 5


def test_nothing_is_sent_or_written_or_printed(boundary: exported.Files, tmp_path: Path) -> None:
    """Its telemetry would leave files in the home folder."""
    code = (
        "import sys; from cm_runtime.backends.openvino import OpenVinoBackend, has_bf16; has_bf16();"
        "OpenVinoBackend(sys.argv[1]); assert 'openvino_telemetry' not in sys.modules"
    )
    environment = {**exported.environment(), "HOME": str(tmp_path)}
    words = [sys.executable, "-c", code, str(boundary.onnx)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
