"""The TensorRT adapter on a stand-in for the GPU; tests/stand_in_gpu.py says what that proves. No GPU ran any of it."""

from __future__ import annotations

import gc
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exports
import numpy as np
import onnx
import pytest
import stand_in_gpu
from onnx import TensorProto, helper

import cm_runtime as cm
from cm_runtime.backends import engine_file, tensorrt, tensorrt_log
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends.batch_profiles import Profile, parse_profiles
from cm_runtime.backends.engine_file import EngineManifest
from cm_runtime.backends.ort import OrtBackend
from cm_runtime.backends.tensorrt import TensorRtBackend
from cm_runtime.cuda import context
from cm_runtime.errors import ArtifactError, EngineError, MissingExtraError, OutOfMemoryError, RequestError
from cm_runtime.extras import EXTRAS
from cm_runtime.manifest import METADATA_KEY, Manifest, read_manifest

CONTENT = b"what the builder made"
SHAPE = (3, 8, 8)


@pytest.fixture
def gpu() -> Iterator[stand_in_gpu.Gpu]:
    with stand_in_gpu.installed(stand_in_gpu.Gpu()) as made:
        yield made


@pytest.fixture
def engine(boundary: exports.Files, tmp_path: Path) -> Path:
    return written(tmp_path / "model.engine", read_manifest(boundary.onnx))


@pytest.fixture
def trt(
    gpu: stand_in_gpu.Gpu, boundary: exports.Files, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> stand_in_gpu.TensorRt:
    made = stand_in_gpu.TensorRt(gpu, boundary.onnx, engine_file.read_engine_manifest(engine))
    monkeypatch.setattr(tensorrt, "module", lambda package: made)
    return made


@pytest.fixture
def backend(trt: stand_in_gpu.TensorRt, engine: Path) -> TensorRtBackend:
    return TensorRtBackend(engine)


def written(path: Path, model: Manifest, **changes: Any) -> Path:
    plain = {
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "bytes": len(CONTENT),
        "package": "tensorrt_rtx",
        "version": stand_in_gpu.VERSION,
        "gpus": ("8.9", "12.0"),
        "profiles": (Profile(min=2, opt=4, max=8),),
        "model": model,
        "onnx_sha256": "0" * 64,
        "plugin": False,
    }
    path.write_bytes(CONTENT)
    manifest = EngineManifest(**{**plain, **changes})
    engine_file.manifest_path(path).write_text(manifest.model_dump_json())
    return path


def image(n: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, *shape)).astype(np.float32)


@pytest.mark.process
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8])
def test_inputs_reach_the_engine_and_outputs_come_back(
    backend: TensorRtBackend, boundary: exports.Files, n: int
) -> None:
    """At every size of batch; those below the profile's least are filled up, and the rest is dropped."""
    sigma, label = np.geomspace(80, 0.01, n).astype(np.float32), np.arange(n) % exports.CLASSES
    made = backend.denoise(image(n), sigma, label)
    expected = OrtBackend(boundary.onnx).denoise(image(n), sigma, label)
    assert made.shape == (n, *SHAPE)
    assert np.allclose(made, expected, rtol=0, atol=1e-6)
    assert made.flags.writeable and made.flags.owndata


def test_it_says_what_it_is(backend: TensorRtBackend, boundary: exports.Files) -> None:
    assert (backend.name, backend.device) == ("tensorrt-rtx", "cuda:0")
    assert backend.version == f"tensorrt_rtx {stand_in_gpu.VERSION} on Stand-in 4090"
    assert backend.manifest == read_manifest(boundary.onnx)
    assert backend.layers() == '{"Layers": ["JSON"]}'


def test_batches_of_other_sizes_in_turn_do_not_mix(backend: TensorRtBackend) -> None:
    first = backend.denoise(image(3), 2.0, 1)
    kept = first.copy()
    for n in (8, 1, 5, 3):
        backend.denoise(image(n) + 1, 1.0, 0)
    assert np.array_equal(first, kept)
    assert np.array_equal(backend.denoise(image(3), 2.0, 1), kept)


@pytest.mark.process
def test_memory_is_taken_once_and_used_again(backend: TensorRtBackend, gpu: stand_in_gpu.Gpu) -> None:
    """Only a larger batch takes more, and what it outgrew is given back."""
    backend.denoise(image(4), 1.0, 0)
    assert sum(line.startswith("take") for line in gpu.log) == 5  # x, sigma, label, the output, and where it computes
    backend.denoise(image(4), 1.0, 0)
    backend.denoise(image(2), 1.0, 0)
    assert sum(line.startswith("take") for line in gpu.log) == 5
    backend.denoise(image(8), 1.0, 0)
    assert sum(line.startswith("take") for line in gpu.log) == 10
    shared = 1000 * (4 + 8)  # a context that is bound to an address keeps it
    assert sum(len(held) for held in gpu.held.values()) == 8 * (2 * 4 * 3 * 8 * 8 + 4 + 8) + shared
    assert [line for line in gpu.log if line.startswith("run")] == ["run 4", "run 4", "run 2", "run 8"]


@pytest.mark.process
def test_the_micro_batch_is_within_the_profile(
    trt: stand_in_gpu.TensorRt, boundary: exports.Files, tmp_path: Path
) -> None:
    """A GPU sees 256 images of 8x8 at once, if the engine takes them; never less than it is best at."""
    sizes = {"1:4:8": 8, "1:64:512": 256, "1:300:512": 300, "2": 2, "64,1": 64, "1,2:64:512": 256}
    for text, expected in sizes.items():
        path = written(tmp_path / "m.engine", read_manifest(boundary.onnx), profiles=parse_profiles(text))
        assert TensorRtBackend(path).micro_batch == expected


def test_a_batch_above_the_profile_names_it(backend: TensorRtBackend, gpu: stand_in_gpu.Gpu) -> None:
    with pytest.raises(RequestError, match=r"takes batches of 2:4:8 .* not 9; ask for --micro-batch 8") as caught:
        backend.denoise(image(9), 1.0, 0)
    assert "\n" not in str(caught.value)
    assert gpu.log == []


@pytest.mark.process
def test_images_are_drawn_as_on_any_engine(backend: TensorRtBackend, boundary: exports.Files) -> None:
    """cm.sample by its own micro-batches, the last of which is below the profile's least."""
    made = cm.sample(backend, count=17, steps=2, seed=3)
    expected = cm.sample(cm.load(boundary.onnx, "ort"), count=17, steps=2, seed=3)
    assert np.abs(made.astype(int) - expected).max() <= 1


# Sampler graphs


def sampler(path: Path) -> Path:
    """A graph with the interface of a sampler's: the sum of its noises as grey levels."""
    nodes = [
        helper.make_node("Constant", [], ["axes"], value_ints=[0]),
        helper.make_node("ReduceSum", ["noise", "axes"], ["sum"], keepdims=0),
        helper.make_node("Constant", [], ["low"], value_float=-1.0),
        helper.make_node("Constant", [], ["high"], value_float=1.0),
        helper.make_node("Clip", ["sum", "low", "high"], ["clipped"]),
        helper.make_node("Add", ["clipped", "high"], ["up"]),
        helper.make_node("Constant", [], ["half"], value_float=127.5),
        helper.make_node("Mul", ["up", "half"], ["grey"]),
        helper.make_node("Round", ["grey"], ["whole"]),
        helper.make_node("Transpose", ["whole"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("Cast", ["last"], ["images"], to=TensorProto.UINT8),
    ]
    noise = helper.make_tensor_value_info("noise", TensorProto.FLOAT, [2, "N", *SHAPE])
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 8, 8, 3])
    graph = helper.make_model(
        helper.make_graph(nodes, "sampler", [noise], [images]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    manifest = Manifest(
        graph="sampler",
        image_shape=SHAPE,
        num_classes=0,
        precond="boundary",
        sigma_boundary=0.002,
        sigmas={2: (80.0, 2.5)},
    )
    helper.set_model_props(graph, {METADATA_KEY: manifest.model_dump_json()})
    onnx.save(graph, path)
    return path


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_sampler_draws_images(trt: stand_in_gpu.TensorRt, tmp_path: Path, n: int) -> None:
    trt.onnx = sampler(tmp_path / "s.onnx")
    drawer = TensorRtBackend(written(tmp_path / "s.engine", read_manifest(trt.onnx)))
    noise = np.stack([image(n), image(n + 10)[:n]])
    expected = np.rint((np.clip(noise.sum(0), -1, 1) + 1) * np.float32(127.5)).astype(np.uint8)
    made = drawer.draw(noise)
    assert made.dtype == np.uint8
    assert np.array_equal(made, np.moveaxis(expected, 1, -1))
    with pytest.raises(RequestError, match="denoise needs"):
        drawer.denoise(image(2), 1.0)


# What is refused, and when


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "its first byte": (lambda path: path.write_bytes(b"W" + CONTENT[1:]), "not the engine"),
    "a byte within": (lambda path: path.write_bytes(CONTENT[:9] + b"\0" + CONTENT[10:]), "not the engine"),
    "its last byte": (lambda path: path.write_bytes(CONTENT[:-1] + b"!"), "not the engine"),
    "its length": (lambda path: path.write_bytes(CONTENT[:-1]), "cut short"),
    "no manifest": (lambda path: engine_file.manifest_path(path).unlink(), "is not beside it"),
    "no JSON": (lambda path: engine_file.manifest_path(path).write_text("{"), "not a valid engine manifest"),
    "another engine's": (lambda path: rewritten(path, sha256="0" * 64), "not the engine"),
    "another version": (lambda path: rewritten(path, version="1.7.1.115"), "and here is"),
    "another GPU": (lambda path: rewritten(path, gpus=("12.0",)), "this one has 8.9"),
}


def rewritten(path: Path, **changes: Any) -> None:
    manifest = engine_file.read_engine_manifest(path).model_copy(update=changes)
    engine_file.manifest_path(path).write_text(manifest.model_dump_json())


@pytest.mark.parametrize("kind", REFUSED)
def test_tensorrt_sees_no_byte_of_what_is_refused(trt: stand_in_gpu.TensorRt, engine: Path, kind: str) -> None:
    change, message = REFUSED[kind]
    change(engine)
    with pytest.raises(ArtifactError, match=message) as caught:
        TensorRtBackend(engine)
    assert trt.opened == []
    assert "\n" not in str(caught.value)
    assert "cm-runtime export CKPT --format tensorrt-rtx" in str(caught.value)


@pytest.mark.process
def test_bytes_are_checked_as_files_are(trt: stand_in_gpu.TensorRt, engine: Path) -> None:
    manifest = engine_file.read_engine_manifest(engine)
    with pytest.raises(ArtifactError, match="the built engine is not the engine"):
        TensorRtBackend(CONTENT[::-1], manifest)
    assert trt.opened == []
    assert TensorRtBackend(CONTENT, manifest).file == manifest
    assert trt.opened == [CONTENT]


def test_an_engine_of_the_other_package_is_refused(
    trt: stand_in_gpu.TensorRt, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "has_driver", lambda: True)
    with pytest.raises(ArtifactError, match="is an engine of tensorrt_rtx, not of tensorrt; "):
        TensorRtBackend(engine, options=EngineOptions(backend="tensorrt"))
    assert trt.opened == []


def test_an_engine_with_other_tensors_than_its_manifest_says_is_refused(
    trt: stand_in_gpu.TensorRt, boundary: exports.Files, engine: Path
) -> None:
    rewritten(engine, model=read_manifest(boundary.onnx).model_copy(update={"image_shape": (3, 16, 16)}))
    with pytest.raises(ArtifactError, match="are not those of its manifest"):
        TensorRtBackend(engine)


@pytest.mark.parametrize("device", ["cpu", "cuda:", "gpu", ""])
def test_another_device_is_refused(trt: stand_in_gpu.TensorRt, engine: Path, device: str) -> None:
    with pytest.raises(EngineError, match="device must be auto or cuda:N"):
        TensorRtBackend(engine, options=EngineOptions(device=device))
    assert trt.opened == []


# What TensorRT and CUDA refuse


def test_an_engine_that_does_not_open_is_one_line(trt: stand_in_gpu.TensorRt, engine: Path) -> None:
    trt.refuses = "open"
    with pytest.raises(EngineError, match=r"model\.engine: tensorrt_rtx cannot open it: ") as caught:
        TensorRtBackend(engine)
    assert "\n" not in str(caught.value)
    assert "Serialization assertion failed at line 48" in str(caught.value)


# As TensorRT writes them: the first two for want of memory, by its allocator and by CUDA
REASONS: dict[str, type[EngineError]] = {
    "Error Code 2: OutOfMemory (Requested size was 4096 bytes.)": OutOfMemoryError,
    "[resizingAllocator.cpp::allocate::74] Error Code 1: Cuda Runtime (out of memory)": OutOfMemoryError,
    "Requested amount of GPU memory (4096 bytes) could not be allocated.": OutOfMemoryError,
    "[engine.cpp::f::1] Error Code 5: Failed Allocation (nothing)": OutOfMemoryError,
    "IExecutionContext::enqueueV3: Error Code 3: API Usage Error\n(Parameter check failed)": EngineError,
    "": EngineError,
}


@pytest.mark.parametrize("when", ["context", "run"])
@pytest.mark.parametrize("reason", REASONS)
def test_what_tensorrt_refuses_is_for_want_of_memory_only_where_it_says_so(
    trt: stand_in_gpu.TensorRt, backend: TensorRtBackend, when: str, reason: str
) -> None:
    trt.refuses, trt.reason = when, reason
    with pytest.raises(EngineError, match=r"TensorRT refused (an execution context|to run).*: ") as caught:
        backend.denoise(image(4), 1.0, 0)
    assert type(caught.value) is REASONS[reason]
    assert str(caught.value).endswith(": " + (reason.replace("\n", " ") or "it gave no reason"))
    backend._device.finish()  # copies are queued


def test_an_error_of_before_is_not_the_reason(trt: stand_in_gpu.TensorRt, backend: TensorRtBackend) -> None:
    trt.refuses, trt.reason = "run", "Cuda Runtime (out of memory)"
    with pytest.raises(OutOfMemoryError):
        backend.denoise(image(4), 1.0, 0)
    trt.refuses = ""
    backend.denoise(image(4), 1.0, 0)
    trt.refuses, trt.reason = "run", ""
    with pytest.raises(EngineError, match="it gave no reason") as caught:
        backend.denoise(image(4), 1.0, 0)
    assert type(caught.value) is EngineError
    backend._device.finish()


@pytest.mark.process
def test_a_run_without_memory_halves_the_batch(
    trt: stand_in_gpu.TensorRt, backend: TensorRtBackend, caplog: pytest.LogCaptureFixture
) -> None:
    expected = cm.sample(backend, count=11, micro_batch=8, steps=2, seed=3)
    trt.most, trt.reason = 4, "Error Code 2: OutOfMemory (Requested size was 4096 bytes.)"
    backend = TensorRtBackend(CONTENT, backend.file)
    assert np.array_equal(cm.sample(backend, count=11, micro_batch=8, steps=2, seed=3), expected)
    lines = [line for line in caplog.messages if "images at once" in line]
    assert lines == [f"TensorRT refused to run: {trt.reason}; going on with 4 images at once in place of 8"]


def test_a_shape_that_tensorrt_refuses_is_one_line(trt: stand_in_gpu.TensorRt, backend: TensorRtBackend) -> None:
    trt.refuses = "shape"
    with pytest.raises(EngineError, match=r"TensorRT refused the shape \(4, 3, 8, 8\) of x: .* is not in the profile"):
        backend.denoise(image(4), 1.0, 0)


# Contexts: profiles, memory, compiled kernels


def test_the_profile_that_fits_runs(trt: stand_in_gpu.TensorRt, boundary: exports.Files, tmp_path: Path) -> None:
    """One profile a batch: 3 images are padded to 4, and each context is of the profile that takes its batch."""
    path = written(tmp_path / "m.engine", read_manifest(boundary.onnx), profiles=parse_profiles("1,4,8"))
    trt.manifest = engine_file.read_engine_manifest(path)
    backend = TensorRtBackend(path)
    expected = OrtBackend(boundary.onnx)
    for n in (3, 1, 8, 5):
        assert np.allclose(backend.denoise(image(n), 2.0, 1), expected.denoise(image(n), 2.0, 1), rtol=0, atol=1e-6)
    assert [line for line in trt.gpu.log if line.startswith("run")] == ["run 4", "run 1", "run 8", "run 8"]


def prepared(backend: TensorRtBackend, *sizes: int) -> Any:
    return [backend.bind(backend._device, size) for size in sizes]


def scratch(trt: stand_in_gpu.TensorRt, bytes_an_image: int) -> list[int]:
    return [len(held) // bytes_an_image for held in trt.gpu.held.values() if len(held) % bytes_an_image == 0]


def test_contexts_share_one_block_of_memory(trt: stand_in_gpu.TensorRt, backend: TensorRtBackend) -> None:
    """Five contexts that each had room for the largest batch were five blocks."""
    trt.scratch = 1 << 20
    contexts = prepared(backend, 8, 4, 2, 3, 8)
    assert scratch(trt, 1 << 20) == [8]
    assert {int(bound.scratch) for bound in contexts} == {int(contexts[0].scratch)}


def test_a_larger_batch_takes_a_larger_block_and_those_before_keep_theirs(
    trt: stand_in_gpu.TensorRt, backend: TensorRtBackend
) -> None:
    """A graph that was captured has the address of the smaller one in it."""
    trt.scratch = 1 << 20
    contexts = prepared(backend, 2, 8, 4)
    assert sorted(scratch(trt, 1 << 20)) == [2, 8]
    backend._device.finish()
    del contexts[0]
    assert scratch(trt, 1 << 20) == [8]
    contexts.clear()
    assert scratch(trt, 1 << 20) == []


def test_an_engine_that_needs_no_memory_has_some(trt: stand_in_gpu.TensorRt, backend: TensorRtBackend) -> None:
    trt.scratch = 0
    assert np.isfinite(backend.denoise(image(4), 1.0, 0)).all()


@pytest.mark.process
def test_an_engine_that_cannot_be_captured_runs_without_a_graph(
    trt: stand_in_gpu.TensorRt, backend: TensorRtBackend, caplog: pytest.LogCaptureFixture
) -> None:
    trt.is_capturable = False
    images = cm.sample(backend, count=20, micro_batch=8, steps=2, seed=3)
    lines = [line for line in caplog.messages if "CUDA graph" in line]
    assert lines == ["model.engine runs without a CUDA graph: tensorrt_rtx cannot capture it"]
    assert not any(line.startswith(("graph", "capture")) for line in trt.gpu.log)
    trt.is_capturable = True
    assert np.array_equal(images, cm.sample(backend, count=20, micro_batch=8, steps=2, seed=3))


@pytest.mark.process
def test_kernels_are_compiled_once_for_all_processes(
    trt: stand_in_gpu.TensorRt, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EAGER specialisation compiles before a shape's first run; the next process has what this one compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    TensorRtBackend(engine).denoise(image(4), 1.0, 0)
    cm.sample(TensorRtBackend(engine), count=11, micro_batch=8, steps=2)
    assert trt.compiled == {4, 8, 3}
    trt.compiled.clear()
    cm.sample(TensorRtBackend(engine), count=11, micro_batch=8, steps=2)
    assert trt.compiled == set()


@pytest.mark.parametrize("kind", ["garbage", "cut short", "empty", "a folder", "another version", "another engine"])
def test_kernels_that_do_not_fit_are_compiled_anew(
    trt: stand_in_gpu.TensorRt, engine: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    TensorRtBackend(engine).denoise(image(4), 1.0, 0)
    (cache,) = (tmp_path / "cm-runtime" / "tensorrt").iterdir()
    trt.compiled.clear()
    if kind == "garbage":
        cache.write_bytes(b"kernels of 9 for 4" * 9)
    elif kind == "cut short":
        cache.write_bytes(cache.read_bytes()[:-1])
    elif kind == "empty":
        cache.write_bytes(b"")
    elif kind == "a folder":
        cache.unlink()
        cache.mkdir()
    elif kind == "another version":
        content = cache.read_bytes()[32:].replace(b"1.7", b"1.6")
        cache.write_bytes(hashlib.sha256(content).digest() + content)
    else:
        path = tmp_path / "other.engine"
        path.write_bytes(CONTENT[::-1])
        changed = engine_file.read_engine_manifest(engine).model_copy(
            update={"sha256": hashlib.sha256(CONTENT[::-1]).hexdigest()}
        )
        engine_file.manifest_path(path).write_text(changed.model_dump_json())
        engine = path
    assert np.isfinite(TensorRtBackend(engine).denoise(image(4), 1.0, 0)).all()
    assert trt.compiled == {4}


def test_without_a_folder_for_caches_all_goes_on(
    trt: stand_in_gpu.TensorRt, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert np.isfinite(TensorRtBackend(engine).denoise(image(4), 1.0, 0)).all()


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("take", r"has no memory left while taking 0\.0 MB of GPU memory: CUDA_ERROR_OUT_OF_MEMORY"),
        ("fetch", "failed while computing deno"),
    ],
)
def test_what_cuda_refuses_is_one_line(
    gpu: stand_in_gpu.Gpu, backend: TensorRtBackend, when: str, message: str
) -> None:
    gpu.fail_at = when
    with pytest.raises(EngineError, match=f"CUDA {message}") as caught:
        backend.denoise(image(4), 1.0, 0)
    assert "\n" not in str(caught.value)
    gpu.fail_at = ""
    for stream in gpu.streams.values():
        stream.queue.clear()
    assert np.isfinite(backend.denoise(image(4), 1.0, 0)).all()


@pytest.mark.process
def test_memory_is_given_back_with_the_backend(trt: stand_in_gpu.TensorRt, engine: Path) -> None:
    backend = TensorRtBackend(engine)
    backend.denoise(image(4), 1.0, 0)
    assert trt.gpu.held
    del backend
    gc.collect()
    assert not trt.gpu.held


def test_without_a_driver_it_is_one_line(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(tensorrt, "module", lambda _: SimpleNamespace(__version__=stand_in_gpu.VERSION))
    with pytest.raises(EngineError, match="there is no NVIDIA GPU that CUDA can use: ") as caught:
        TensorRtBackend(engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("package", "extra"), [("cuda.bindings", "gpu"), ("tensorrt_rtx", "tensorrt-rtx")])
def test_a_missing_package_is_named(engine: Path, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, package, extra)

    class Hidden:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == package.partition(".")[0]:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for module in (context, tensorrt):
        monkeypatch.setattr(module, "has_driver", lambda: True)
    for name in [name for name in sys.modules if name.partition(".")[0] == package.partition(".")[0]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=rf"pip install 'cm-runtime\[{extra}\]'"):
        TensorRtBackend(engine)


def test_the_logger_keeps_what_it_hears() -> None:
    """Of the real package: the builder calls it from C++."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = tensorrt_log.listener(trt)
    logger.log(trt.ILogger.Severity.VERBOSE, "chatter")
    logger.log(trt.ILogger.Severity.WARNING, "beware")
    assert (list(logger.lines), logger.last()) == (["[WARNING] beware"], "it gave no reason")
    assert trt.Runtime(logger).deserialize_cuda_engine(b"no engine") is None  # what it says needs no driver
    assert any(line.startswith("[ERROR] ") for line in logger.lines)
    assert logger.last() in "".join(logger.lines)
    assert tensorrt_log.listener(trt) is logger  # TensorRT keeps the first that it is given
    assert not logger.lines
