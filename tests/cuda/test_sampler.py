"""Sampling that stays on a GPU, on a stand-in for one, with the kernels themselves; tests/stand_in_gpu.py says what
that proves. ONNX Runtime and torch work on the stand-in's memory in their CPU forms. No GPU ran any of it.
"""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exports
import numpy as np
import pytest
import stand_in_gpu

import cm_runtime as cm
from cm_runtime import editing, kernels, noise, sampling
from cm_runtime.backends import tensorrt
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends.batch_profiles import Profile
from cm_runtime.backends.engine_file import EngineManifest
from cm_runtime.backends.ort import OrtBackend
from cm_runtime.backends.tensorrt import TensorRtBackend
from cm_runtime.backends.torch import TorchBackend
from cm_runtime.cuda import context, sampler
from cm_runtime.cuda.device import Device
from cm_runtime.cuda.sampler import OnDevice
from cm_runtime.errors import EngineError, OutOfMemoryError, RequestError
from cm_runtime.kernels import launches
from cm_runtime.manifest import read_manifest
from cm_runtime.request import Draw, sampling_request

CONTENT = b"what the builder made"
GRAPHS = ("denoiser", "network", "sampler")


@pytest.fixture
def gpu() -> Iterator[stand_in_gpu.Gpu]:
    with stand_in_gpu.installed(stand_in_gpu.Gpu()) as made:
        yield made
        gc.collect()


@pytest.fixture(scope="module", params=exports.KINDS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> exports.Files:
    return exports.Files(request.param, tmp_path_factory)


def on_tensorrt(
    gpu: stand_in_gpu.Gpu, path: Path, patch: pytest.MonkeyPatch, profile: Profile | None = None
) -> TensorRtBackend:
    """An engine of ``path``, whose evaluations ONNX Runtime does."""
    profile = profile or Profile(min=1, opt=4, max=64)
    manifest = EngineManifest(
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        bytes=len(CONTENT),
        package="tensorrt_rtx",
        version=stand_in_gpu.VERSION,
        gpus=("8.9",),
        profiles=(profile,),
        model=read_manifest(path),
        onnx_sha256="0" * 64,
        plugin=False,
    )
    patch.setattr(tensorrt, "module", lambda package: stand_in_gpu.TensorRt(gpu, path, manifest))
    return TensorRtBackend(CONTENT, manifest)


@dataclass
class InStream:
    """A backend on the host whose evaluations wait in the stand-in's stream, as those of a GPU do."""

    engine: Any
    gpu: stand_in_gpu.Gpu

    def __post_init__(self) -> None:
        self._sampler = OnDevice(Device())

    @property
    def manifest(self) -> Any:
        return self.engine.manifest

    @property
    def micro_batch(self) -> int:
        return 4

    @property
    def graph(self) -> Any:
        return self.engine.graph

    @property
    def outputs(self) -> Any:
        return self.engine.outputs

    def images(self, count: int) -> Any:
        return self.engine.images(count)

    def bind(self, device: Device, count: int) -> Callable[[Mapping[str, int]], None]:
        evaluate = self.engine.bind(device, count)
        stream = self.gpu.streams[device.stream]
        return lambda addresses: stream.add(lambda: evaluate(addresses))

    def capture(self, device: Device, body: Callable[[], Any]) -> Any:
        return self.engine.capture(device, body) if isinstance(self.engine, OrtBackend) else device.capture(body)

    def batches(self, chosen: Any, noise: Any = None) -> Iterator[sampling.Batch]:
        return self._sampler.batches(self, chosen, noise)


def opened(
    kind: str,
    gpu: stand_in_gpu.Gpu,
    files: exports.Files,
    path: Path,
    patch: pytest.MonkeyPatch,
    precision: Any = "fp32",
) -> Any:
    if kind == "tensorrt":
        return on_tensorrt(gpu, path, patch)
    options = EngineOptions(device="cpu", precision=precision)
    engine = OrtBackend(path) if kind == "ort" else TorchBackend(files.model(), read_manifest(files.onnx), options)
    return InStream(engine, gpu)


def written(files: exports.Files, graph: str, steps: int = 2, **options: Any) -> Path:
    return files.exported(graph=graph, **({"steps": steps} if graph == "sampler" else {}), **options)


def labels(files: exports.Files, listed: list[int]) -> Any:
    return listed if read_manifest(files.onnx).num_classes else None


@pytest.mark.process
@pytest.mark.covering(2)
@pytest.mark.parametrize("engine", ["tensorrt", "ort"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_it_draws_what_the_host_draws(
    gpu: stand_in_gpu.Gpu,
    each: exports.Files,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    graph: str,
) -> None:
    """Whole batches and a shorter last one, twice, of other seeds, places and labels: the same graph, once captured."""
    for steps in (1, 2, 4):
        model = opened(engine, gpu, each, written(each, graph, steps), monkeypatch)
        host = OrtBackend(each.onnx)
        for seed, start, listed in ((0, 0, [0, 1, 2]), ((1 << 64) - 1, (1 << 33) - 2, [4])):
            options: Any = {
                "steps": steps,
                "seed": seed,
                "start": start,
                "labels": labels(each, listed),
                "micro_batch": 3,
            }
            found = cm.sample(model, 7, **options)
            wanted = cm.sample(host, 7, **options)
            assert found.dtype == np.uint8
            assert np.abs(found.astype(int) - wanted).max() <= 1
        captured = [line for line in gpu.log if line.startswith("capture")]
        assert len(captured) == (2 if engine == "tensorrt" else 0)  # of batches of 3 and of 1
        assert gpu.log.count("graph") == (4 if engine == "tensorrt" else 0)
        gpu.log.clear()


@pytest.mark.process
@pytest.mark.parametrize("engine", ["tensorrt", "ort"])
def test_a_sampler_whose_numbers_are_not_finite_is_an_error(
    gpu: stand_in_gpu.Gpu, edm: exports.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """By the flags that leave with the images; a file without them draws what one with them does."""
    good = cm.sample(opened(engine, gpu, edm, edm.sampler, monkeypatch), 7, micro_batch=3)
    old = exports.without_finite(edm.sampler, tmp_path / "old.onnx")
    assert np.array_equal(cm.sample(opened(engine, gpu, edm, old, monkeypatch), 7, micro_batch=3), good)
    path = exports.with_weight(edm.sampler, tmp_path / "m.onnx", exports.LAST, np.nan, 1)
    model = opened(engine, gpu, edm, path, monkeypatch)
    with pytest.raises(EngineError, match=r"not finite; .* \(3 of 3 images\)$"):
        cm.sample(model, 7, micro_batch=3)
    if engine == "tensorrt":
        with pytest.raises(EngineError, match=r"not finite; .* \(3 of 3 images\)$"):
            cm.sample(model, 7, micro_batch=3, output="device")
        # and where its images go through the host
        with pytest.raises(EngineError, match=r"not finite; .* \(5 of 5 images\)$"):
            model.draw(noise.normals(0, np.arange(5, dtype=np.uint64), 2, (1, 8, 8)))


@pytest.mark.process
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_torch_does_so_too(
    gpu: stand_in_gpu.Gpu, each: exports.Files, monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    """F by the module in NHWC, everything else by the kernels; images equal those of the host, in each precision."""
    model = opened("torch", gpu, each, each.onnx, monkeypatch, precision)
    host = TorchBackend(each.model(), model.manifest, EngineOptions(device="cpu", precision=precision))
    options: Any = {"steps": 2, "seed": 3, "labels": labels(each, [4, 0, 2]), "micro_batch": 3}
    found, wanted = cm.sample(model, 7, **options), cm.sample(host, 7, **options)
    assert np.abs(found.astype(int) - wanted).max() <= (1 if precision == "fp32" else 4)
    full = cm.sample(OrtBackend(each.onnx), 7, **options)
    assert np.abs(found.astype(int) - full).mean() <= {"fp32": 0.1, "fp16": 0.5, "bf16": 3}[precision]
    kind = {"fp32": "float", "fp16": "half_float", "bf16": "bfloat16_float"}[precision]
    layout = "nchw" if model.manifest.image_shape[0] == 1 else "nhwc"  # which of one channel are one
    assert f"cm_step_{kind}_{layout}" in gpu.log


@pytest.mark.process
@pytest.mark.parametrize("precision", ["fp16"])
def test_a_network_in_half_types_reads_half_types(
    gpu: stand_in_gpu.Gpu, boundary: exports.Files, monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    model = on_tensorrt(gpu, written(boundary, "network", precision=precision), monkeypatch)
    found = cm.sample(model, 5, micro_batch=4)
    wanted = cm.sample(OrtBackend(boundary.onnx), 5)
    assert "cm_step_half_float_nchw" in gpu.log
    assert np.abs(found.astype(int) - wanted).max() <= 4
    assert (found != wanted).mean() < 0.5


@pytest.mark.process
@pytest.mark.parametrize("graph", ["denoiser", "network"])
def test_noise_levels_clip_and_output_arrive(
    gpu: stand_in_gpu.Gpu, boundary: exports.Files, monkeypatch: pytest.MonkeyPatch, graph: str
) -> None:
    """The graph that was captured for other levels draws at these: they are in memory."""
    model = on_tensorrt(gpu, written(boundary, graph), monkeypatch)
    host = OrtBackend(boundary.onnx)
    for sigmas in ((80.0, 24.0), (80.0, 0.6)):
        for clip in (True, False):
            options: Any = {"sigmas": sigmas, "clip": clip, "output": "float32", "micro_batch": 2}
            found, wanted = cm.sample(model, 4, **options), cm.sample(host, 4, **options)
            assert found.dtype == np.float32
            assert np.abs(found - wanted).max() < 1e-4
            assert sigmas[1] > 1 or (np.abs(found).max() > 1) != clip
    assert len([line for line in gpu.log if line.startswith("capture")]) == 2


@pytest.mark.process
@pytest.mark.parametrize("graph", GRAPHS)
def test_the_callers_noise_is_used(
    gpu: stand_in_gpu.Gpu, boundary: exports.Files, monkeypatch: pytest.MonkeyPatch, graph: str
) -> None:
    model = on_tensorrt(gpu, written(boundary, graph), monkeypatch)
    z = noise.normals(5, np.arange(7, dtype=np.uint64), 2, model.manifest.image_shape)
    found = cm.sample(model, noise=z, micro_batch=3)
    assert np.abs(found.astype(int) - cm.sample(OrtBackend(boundary.onnx), noise=z)).max() <= 1
    device = Device()
    data = device.send("z", z), True
    device.finish()
    there = SimpleNamespace(
        __cuda_array_interface__={"shape": z.shape, "typestr": "<f4", "data": data, "strides": None, "version": 2}
    )
    assert np.array_equal(cm.sample(model, noise=there, micro_batch=3, output="device"), found)


@pytest.mark.process
def test_a_thread_that_draws_ahead_has_the_context(
    gpu: stand_in_gpu.Gpu, boundary: exports.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_tensorrt(gpu, written(boundary, "sampler"), monkeypatch)
    found = np.concatenate([part.images for part in cm.stream(model, 7, micro_batch=3)])
    assert np.array_equal(found, cm.sample(model, 7, micro_batch=3))
    assert len(gpu.contexts) == 2 and not any(gpu.contexts.values())  # and gives it back


def edits(model: Any, rng: np.random.Generator) -> dict[str, Callable[..., Any]]:
    """Every edit of three images of ``model``, by what is asked of `editing`."""
    m = read_manifest(model)
    c, h, w = m.image_shape
    y = rng.uniform(-1, 1, (3, h, w, c)).astype(np.float32)
    hole = rng.integers(0, 2, (3, h, w))
    made: dict[str, Callable[..., Any]] = {
        "mask": lambda engine, **how: editing.inpaint(engine, y, hole[0], **how),
        "masks": lambda engine, **how: editing.inpaint(engine, y, hole, **how),
        "patch 2": lambda engine, **how: editing.superres(engine, y[:, ::2, ::2], 2, **how),
        "patch 4": lambda engine, **how: editing.superres(engine, y[:, ::4, ::4], 4, **how),
        "stroke": lambda engine, **how: editing.stroke(engine, y, 3.0, **how),
        "denoise": lambda engine, **how: editing.denoise(engine, y, 0.5, steps=2, **how),
    }
    if c == 3:
        made["luma"] = lambda engine, **how: editing.colorize(engine, y[..., :1], **how)
    return made


@pytest.mark.process
@pytest.mark.covering(1)
@pytest.mark.parametrize(("engine", "graph"), [("tensorrt", "denoiser"), ("tensorrt", "network"), ("torch", "network")])
def test_edits_stay_there_too(
    gpu: stand_in_gpu.Gpu,
    each: exports.Files,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
    engine: str,
    graph: str,
) -> None:
    """Batches that end within an image's answers; the graph of one edit serves the next one of its kind."""
    model = opened(engine, gpu, each, written(each, graph), monkeypatch)
    host = OrtBackend(each.onnx)
    for name, edit in edits(each.onnx, rng).items():
        gpu.log.clear()
        for seed, listed in ((3, [1, 4, 0]), (2**64 - 1, [2, 2, 3])):
            options: Any = {
                "seed": seed,
                "start": 2**32 - 2,
                "answers": 2,
                "labels": labels(each, listed),
                "micro_batch": 4,
            }
            found, wanted = (edit(on, output="float32", **options) for on in (model, host))
            assert np.abs(found - wanted).max() < 1e-4, name
            assert np.abs(edit(model, **options).astype(int) - edit(host, **options)).max() <= 1
        launched = {line for line in gpu.log if line.startswith("cm_")}
        assert not any("first_noise" in line for line in launched)
        assert any(name.partition(" ")[0].removesuffix("s") in line for line in launched) == (
            name not in ("stroke", "denoise")
        )
        captured = len([line for line in gpu.log if line.startswith("capture")])
        if engine == "tensorrt":  # 4 and 2 images, floats and bytes; what has no projection has one graph
            assert captured == (0 if name == "denoise" else 4)
            assert gpu.log.count("graph") == 8 - captured


@pytest.mark.process
def test_an_edit_of_a_network_in_half_types_begins_with_what_it_was_given(
    gpu: stand_in_gpu.Gpu, boundary: exports.Files, monkeypatch: pytest.MonkeyPatch, rng: Any
) -> None:
    """In float32: what is known of an image is not rounded to half."""
    model = on_tensorrt(gpu, written(boundary, "network", precision="fp16"), monkeypatch)
    y = rng.uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    hole = rng.integers(0, 2, (8, 8))
    found, wanted = (
        editing.inpaint(on, y, hole, labels=1, output="float32", steps=2) for on in (model, OrtBackend(boundary.onnx))
    )
    np.testing.assert_array_equal(found[:, hole == 0], y[:, hole == 0])
    assert np.abs(found - wanted).max() < 0.05
    assert "cm_step_half_float_nchw" in gpu.log


@pytest.mark.process
def test_patches_are_of_what_the_kernels_have(
    gpu: stand_in_gpu.Gpu, boundary: exports.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_tensorrt(gpu, written(boundary, "denoiser"), monkeypatch)
    made = editing.superres(model, np.zeros((1, 1, 1, 3), np.float32), 8, labels=0, output="float32")
    assert np.abs(made.mean(axis=(1, 2))).max() < 1e-5
    assert any(line.startswith("cm_finish_patch") for line in gpu.log)


@pytest.mark.process
def test_a_step_is_one_launch(gpu: stand_in_gpu.Gpu, boundary: exports.Files, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_tensorrt(gpu, written(boundary, "network"), monkeypatch)
    cm.sample(model, 8, steps=3, micro_batch=4)
    launched = [line for line in gpu.log if line.startswith("cm_")]
    once = ["cm_first_noise_float_nchw", *["cm_step_float_nchw"] * 2, "cm_finish_float_nchw"]
    assert launched == [*once, *once]  # as it is, and into the graph
    assert "capture 8" in gpu.log  # a cleared flag, four kernels, three evaluations


@pytest.mark.process
def test_the_next_batch_is_on_its_way_while_one_leaves(
    gpu: stand_in_gpu.Gpu, boundary: exports.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_tensorrt(gpu, written(boundary, "network"), monkeypatch)
    chosen = sampling_request(model.manifest, Draw(count=20, micro_batch=4))
    parts = sampling.batches(model, chosen)
    next(parts)
    for later in range(4):
        started = gpu.log.count("graph")
        assert started == min(1 + later, 4)  # the first batch was drawn without one
        if started < 4:
            next(parts)
    rest = [part.images for part in parts]
    assert len(rest) == 1


@pytest.mark.process
def test_a_caller_that_stops_early_leaves_nothing_behind(
    gpu: stand_in_gpu.Gpu, boundary: exports.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_tensorrt(gpu, written(boundary, "network"), monkeypatch)
    chosen = sampling_request(model.manifest, Draw(count=20, micro_batch=4))
    parts = sampling.batches(model, chosen)
    first = next(parts)
    parts.close()
    again = next(sampling.batches(model, chosen))
    assert np.array_equal(first.images, again.images)


@pytest.mark.process
def test_images_that_nobody_asks_for_any_more_are_no_error(
    gpu: stand_in_gpu.Gpu, boundary: exports.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_tensorrt(gpu, written(boundary, "network"), monkeypatch)
    z = noise.normals(5, np.arange(12, dtype=np.uint64), 2, model.manifest.image_shape)
    z[1, 6, 0, 0, 0] = np.inf
    parts = sampling.batches(model, sampling_request(model.manifest, Draw(count=12, micro_batch=4)), z)
    next(parts)
    parts.close()


@pytest.mark.process
@pytest.mark.parametrize("n", [1, 3, 5])
def test_an_engine_of_the_network_denoises_as_any_other(
    gpu: stand_in_gpu.Gpu, boundary: exports.Files, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """With its coefficients around it on the host, as export asks it to prove itself."""
    path = written(boundary, "network")
    model = on_tensorrt(gpu, path, monkeypatch, Profile(min=2, opt=4, max=8))
    x = np.random.default_rng(n).standard_normal((n, *model.manifest.image_shape)).astype(np.float32)
    sigma = np.geomspace(0.01, 80, n).astype(np.float32)
    wanted = OrtBackend(boundary.onnx).denoise(x, sigma, np.arange(n) % exports.CLASSES)
    assert np.abs(model.denoise(x, sigma, np.arange(n) % exports.CLASSES) - wanted).max() < 1e-5


@pytest.mark.process
def test_an_engine_that_takes_no_fewer_is_given_more(
    gpu: stand_in_gpu.Gpu, boundary: exports.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(boundary, "network")
    model = on_tensorrt(gpu, path, monkeypatch, Profile(min=3, opt=4, max=5))
    assert np.abs(cm.sample(model, 1).astype(int) - cm.sample(OrtBackend(boundary.onnx), 1)).max() <= 1
    with pytest.raises(RequestError, match=r"takes batches of 3:4:5 .* not 6"):
        cm.sample(model, 6, micro_batch=6)


# Failures


@pytest.mark.process
def test_a_model_whose_images_are_not_finite_is_refused(
    gpu: stand_in_gpu.Gpu, boundary: exports.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first batch or the second; the one in front of it is drawn."""
    model = on_tensorrt(gpu, written(boundary, "network"), monkeypatch)
    z = noise.normals(5, np.arange(8, dtype=np.uint64), 2, model.manifest.image_shape)
    z[1, 6, 0, 0, 0] = np.inf
    chosen = sampling_request(model.manifest, Draw(count=8, micro_batch=4))
    parts = sampling.batches(model, chosen, z)
    next(parts)
    with pytest.raises(EngineError, match="output is not finite"):
        next(parts)
    assert np.isfinite(cm.sample(model, 4, micro_batch=4)).all()  # the flag is cleared


@pytest.mark.process
def test_where_memory_does_not_last_the_batch_halves_and_says_so(
    gpu: stand_in_gpu.Gpu,
    boundary: exports.Files,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = on_tensorrt(gpu, written(boundary, "network"), monkeypatch)
    gpu.room = 36_000
    with caplog.at_level(logging.WARNING, "cm_runtime"):
        found = cm.sample(model, 21, micro_batch=16)
    lines = [record.getMessage() for record in caplog.records]
    assert lines and all("no memory left" in line and "\n" not in line for line in lines)
    assert lines[0].endswith("going on with 8 images at once in place of 16")
    assert np.abs(found.astype(int) - cm.sample(OrtBackend(boundary.onnx), 21)).max() <= 1
    gpu.room = sum(map(len, gpu.held.values())) + 3000
    with pytest.raises(OutOfMemoryError, match="CUDA has no memory left while taking"):
        cm.sample(model, 1, steps=4)


@pytest.mark.process
def test_a_capture_that_fails_is_one_line(
    gpu: stand_in_gpu.Gpu, boundary: exports.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_tensorrt(gpu, written(boundary, "network"), monkeypatch)
    gpu.fail_at = "capture"
    reason = r"^CUDA failed while capturing a graph: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED in cuStreamEndCapture$"
    with pytest.raises(EngineError, match=reason):
        cm.sample(model, 8, micro_batch=4)
    gpu.fail_at = ""
    assert cm.sample(model, 8, micro_batch=4).shape == (8, 8, 8, 3)


@pytest.mark.process
def test_a_gpu_or_a_driver_too_old_for_the_kernels_is_named(gpu: stand_in_gpu.Gpu) -> None:
    work = launches.first_noise(launches.Images(1, 1, 4, 4), launches.Arrays())

    def load() -> None:
        context._contexts.clear()
        Device().launch(work)

    gpu.capability = "7.5"
    with pytest.raises(EngineError, match=r"compute capability 7\.5; the kernels need 8\.0 \(Ampere\) or newer"):
        load()
    gpu.capability, gpu.fail_at, gpu.driver_version = "9.0", "load", 12040
    with pytest.raises(EngineError, match=r"driver is of CUDA 12\.4; the kernels need one of CUDA 13 \(580 or newer\)"):
        load()
    gpu.driver_version = 13000
    with pytest.raises(EngineError, match=r"\(compute capability 9\.0\) refused the kernels: CUDA_ERROR_INVALID_IMAGE"):
        load()


def test_where_images_cannot_stay_a_line_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sampler, "has", lambda _: False)
    monkeypatch.setattr(sampler, "has_driver", lambda: True)
    assert not any(map(sampler.can_stay, ("cpu", "cuda:", "cuda:x"))) and not caplog.records
    assert not sampler.can_stay("cuda:1")
    (record,) = caplog.records
    assert record.getMessage().endswith("cuda.bindings is missing: pip install 'cm-runtime[gpu]'")
    monkeypatch.setattr(sampler, "has", lambda _: True)
    assert all(map(sampler.can_stay, ("cuda", "cuda:0", "cuda:3")))


def test_a_kernel_for_every_launch() -> None:
    """What launches.py can name is in the binary."""
    names = kernels.build_report()["kernels"].keys()
    for type in ("fp32", "fp16", "bf16"):
        for layout in ("nchw", "nhwc"):
            for made in (None, "fp32"):
                images = launches.Images(2, 3, 8, 8, type, layout, made)  # type: ignore[arg-type]
                assert f"cm_step_{images.suffix(images.type, images.F_type)}" in names
                assert f"cm_finish_{images.suffix(images.F_type)}" in names
