"""ONNX Runtime behind the Denoiser protocol: what goes in is checked, and what comes out is the caller's."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import onnxruntime
import pytest
from stand_in_gpu import OrtSession

from cm_runtime.backends import ort as ort_module
from cm_runtime.backends.base import EngineOptions, Interface
from cm_runtime.backends.ort import AddressBinding, GraphNumbers, MemoryBinding, OrtBackend
from cm_runtime.cuda import sampler
from cm_runtime.errors import ArtifactError, CmRuntimeError, EngineError, RequestError

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def backend(boundary: exports.Files) -> OrtBackend:
    return OrtBackend(boundary.onnx)


@pytest.fixture(scope="module")
def unlabelled(edm: exports.Files) -> OrtBackend:
    return OrtBackend(edm.onnx)


def image(n: int = 2, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, *shape)).astype(np.float32)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_it_computes_what_onnx_runtime_computes(backend: OrtBackend, boundary: exports.Files, n: int) -> None:
    session = onnxruntime.InferenceSession(str(boundary.onnx))
    sigma, label = np.geomspace(80, 0.01, n).astype(np.float32), np.arange(n) % exports.CLASSES
    (expected,) = session.run(None, {"x": image(n), "sigma": sigma, "label": label})
    assert np.allclose(backend.denoise(image(n), sigma, label), expected, rtol=0, atol=1e-6)


def test_outputs_are_not_clamped_and_belong_to_the_caller(backend: OrtBackend) -> None:
    far = image() * 50
    x0 = backend.denoise(far, 0.01, 0)
    assert x0.dtype == np.float32
    assert x0.flags.writeable
    assert np.abs(x0).max() > 10
    kept = x0.copy()
    backend.denoise(image(), 1.0, 1)
    assert np.array_equal(x0, kept)


def test_inputs_are_left_as_they_were(backend: OrtBackend) -> None:
    x, sigma, label = image(), np.array([1, 2], np.float32), np.array([0, 1])
    for array in (x, sigma, label):
        array.setflags(write=False)
    backend.denoise(x, sigma, label)
    assert np.array_equal(x, image())


@pytest.mark.parametrize(
    ("sigma", "label"),
    [
        (2.0, 3),
        (np.float64(2), np.int32(3)),
        (np.array(2.0), np.array(3, np.uint8)),
        ([2.0], [3]),
        (np.full(4, 2), (3, 3, 3, 3)),
    ],
)
def test_one_sigma_or_label_serves_every_image(backend: OrtBackend, sigma: Any, label: Any) -> None:
    each = backend.denoise(image(4), np.full(4, 2, np.float32), np.full(4, 3, np.int64))
    assert np.array_equal(backend.denoise(image(4), sigma, label), each)


def test_images_of_other_types_and_layouts_in_memory_are_taken(backend: OrtBackend) -> None:
    x = np.round(image(4) * 4)
    expected = backend.denoise(x, 2.0, 3)
    for same in (x.astype(np.float64), x.astype(np.int16), x.tolist(), np.asfortranarray(x), np.repeat(x, 2, 0)[::2]):
        assert np.array_equal(backend.denoise(same, 2.0, 3), expected)


BAD_INPUTS: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "x of other channels": (lambda: (image(shape=(1, 8, 8)), 1.0, 0), r"x must be \(N, 3, 8, 8\)"),
    "x of another size": (lambda: (image(shape=(3, 8, 9)), 1.0, 0), r"x must be .*not \(2, 3, 8, 9\)"),
    "x without a batch": (lambda: (image()[0], 1.0, 0), "x must be"),
    "x in another layout": (lambda: (np.moveaxis(image(), 1, -1), 1.0, 0), "x must be"),
    "no image": (lambda: (image(0), 1.0, 0), "x must be"),
    "x None": (lambda: (None, 1.0, 0), "x must be"),
    "x words": (lambda: ("image", 1.0, 0), "x must be"),
    "x ragged": (lambda: ([[1.0], [1.0, 2.0]], 1.0, 0), "x must be"),
    "x complex": (lambda: (image() * 1j, 1.0, 0), "x must be"),
    "x NaN": (lambda: (image() * np.nan, 1.0, 0), "x must be finite"),
    "sigma zero": (lambda: (image(), 0.0, 0), "sigma must be finite and above 0"),
    "sigma negative": (lambda: (image(), -1.0, 0), "sigma must be finite and above 0"),
    "one sigma negative": (lambda: (image(), [1.0, -1.0], 0), "sigma must be finite and above 0"),
    "sigma NaN": (lambda: (image(), float("nan"), 0), "sigma must be finite and above 0"),
    "sigma infinite": (lambda: (image(), float("inf"), 0), "sigma must be finite and above 0"),
    "sigma above float32": (lambda: (image(), 1e39, 0), "sigma must be finite and above 0"),
    "sigma below float32": (lambda: (image(), 1e-50, 0), "sigma must be finite and above 0"),
    "sigmas of another count": (lambda: (image(), [1.0, 1.0, 1.0], 0), r"sigma must be a scalar or \(2,\)"),
    "sigma a column": (lambda: (image(), np.ones((2, 1)), 0), "sigma must be a scalar"),
    "no sigmas": (lambda: (image(), [], 0), "sigma must be a scalar"),
    "sigma a word": (lambda: (image(), "loud", 0), "sigma must be"),
    "sigma None": (lambda: (image(), None, 0), "sigma must be"),
    "label missing": (lambda: (image(), 1.0, None), "5 classes; give a label"),
    "label too large": (lambda: (image(), 1.0, 5), "labels must be from 0 to 4"),
    "label negative": (lambda: (image(), 1.0, [-1, 0]), "labels must be from 0 to 4"),
    "label enormous": (lambda: (image(), 1.0, np.uint64(2**64 - 1)), "labels must be from 0 to 4"),
    "label beyond 64 bits": (lambda: (image(), 1.0, 2**70), "label"),
    "label a float": (lambda: (image(), 1.0, 1.0), "label must be an integer"),
    "label a truth value": (lambda: (image(), 1.0, True), "label must be an integer"),
    "label a word": (lambda: (image(), 1.0, "coat"), "label must be an integer"),
    "labels of another count": (lambda: (image(), 1.0, [0, 1, 2]), "label must be an integer or"),
    "labels ragged": (lambda: (image(), 1.0, [[0], [0, 1]]), "label must be an integer"),
    "no labels": (lambda: (image(), 1.0, np.zeros(0, np.int64)), "label must be an integer or"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_inputs_that_do_not_fit_are_one_line_that_says_why(backend: OrtBackend, name: str) -> None:
    given, message = BAD_INPUTS[name]
    with pytest.raises(RequestError, match=message) as caught:
        backend.denoise(*given())
    assert len(str(caught.value).splitlines()) == 1


def test_a_label_for_a_model_without_classes_is_refused(unlabelled: OrtBackend) -> None:
    assert unlabelled.denoise(image(3, (1, 8, 8)), 1.0).shape == (3, 1, 8, 8)
    with pytest.raises(RequestError, match="no classes"):
        unlabelled.denoise(image(3, (1, 8, 8)), 1.0, 0)


# Threads and devices

COUNT_THREADS = """
import os, sys
import onnxruntime
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends import ort as ort_module
from cm_runtime.backends.ort import MemoryBinding, OrtBackend
before = len(os.listdir("/proc/self/task"))
backend = OrtBackend(sys.argv[1], options=EngineOptions(device="cpu", threads=int(sys.argv[2])))
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_an_engine_of_n_threads_starts_one_less_beside_the_callers(boundary: exports.Files, threads: int) -> None:
    words = [sys.executable, "-c", COUNT_THREADS, str(boundary.onnx), str(threads)]
    environment = exports.environment()
    found = subprocess.run(words, capture_output=True, text=True, check=True, env=environment, timeout=120)
    assert int(found.stdout) == threads - 1


@pytest.mark.parametrize("threads", [-1, 1 << 40])
def test_a_number_of_threads_no_engine_takes_is_one_error(boundary: exports.Files, threads: int) -> None:
    with pytest.raises(CmRuntimeError, match="thread"):
        OrtBackend(boundary.onnx, options=EngineOptions(device="cpu", threads=threads))


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has CUDA"
)
def test_cuda_without_its_provider_is_an_error_and_not_the_cpu(
    boundary: exports.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (ort_module, sampler):
        monkeypatch.setattr(module, "has_driver", lambda: True)
    with pytest.raises(EngineError, match=r"cuda:0: pip install 'cm-runtime\[gpu\]'") as caught:
        OrtBackend(boundary.onnx, options=EngineOptions(device="cuda:0"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:0:1", "CPU", "", "cpu:0", "tpu:0"])
def test_a_device_that_is_no_device_is_one_error(boundary: exports.Files, device: str) -> None:
    with pytest.raises(EngineError, match=r"device|CUDA"):
        OrtBackend(boundary.onnx, options=EngineOptions(device=device))


def test_the_micro_batch_follows_the_size_of_the_images(boundary: exports.Files) -> None:
    """64 images of 32x32 at once on a CPU, as many pixels of other sizes, at most 256 images and at least one."""
    backend = OrtBackend(boundary.onnx)
    sizes = {8: 256, 16: 256, 28: 83, 32: 64, 64: 16, 256: 1, 1024: 1}
    for size, expected in sizes.items():
        backend.manifest = backend.manifest.model_copy(update={"image_shape": (3, size, size)})
        assert backend.micro_batch == expected


# Graphs that are not what their manifest says


def test_bytes_are_taken_with_a_manifest(boundary: exports.Files, backend: OrtBackend) -> None:
    from_bytes = OrtBackend(boundary.onnx.read_bytes(), backend.manifest)
    assert np.array_equal(from_bytes.denoise(image(), 1.0, 0), backend.denoise(image(), 1.0, 0))


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x00" * 100])
def test_bytes_that_are_no_graph_are_an_artifact_error(backend: OrtBackend, content: bytes) -> None:
    with pytest.raises(ArtifactError, match="exported graph"):
        OrtBackend(content, backend.manifest)


# Weights in a file beside the graph


def test_weights_beside_the_graph_compute_what_those_inside_do(backend: OrtBackend, boundary: exports.Files) -> None:
    beside = OrtBackend(boundary.apart)
    assert np.array_equal(beside.denoise(image(3), 2.0, 1), backend.denoise(image(3), 2.0, 1))


def test_a_missing_data_file_is_one_line_that_names_it(boundary: exports.Files, tmp_path: Path) -> None:
    path = exports.copied(boundary.apart, tmp_path)
    data = exports.data_file(path)
    data.unlink()
    for line in (rf"apart\.onnx: its weights are not there: put {data.name} ", rf"{data.name}: is a folder, not"):
        with pytest.raises(ArtifactError, match=line) as caught:
            OrtBackend(path)
        assert "\n" not in str(caught.value)
        data.mkdir(exist_ok=True)


@pytest.mark.parametrize("damage", ["cut in half", "a byte short", "empty", "another file"])
def test_a_damaged_data_file_is_one_line_that_names_it(
    boundary: exports.Files, tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m").mkdir()
    path = exports.copied(boundary.apart, tmp_path / "m")
    data = exports.data_file(path)
    whole = data.read_bytes()
    given = {"cut in half": whole[: len(whole) // 2], "a byte short": whole[:-1], "another file": b"<html>not found"}
    data.write_bytes(given.get(damage, b""))
    with pytest.raises(ArtifactError, match=rf"apart\.onnx: its weights in \S*{data.name} are damaged") as caught:
        OrtBackend(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("precision", "device", "line"),
    [("fp32", "cpu", "of GPUs; on the CPU take fp32"), ("fp16", "cuda:0", "of files in fp32, and this one is in fp16")],
)
def test_tf32_is_no_precision_of_a_cpu_or_of_a_half(
    boundary: exports.Files, precision: str, device: str, line: str
) -> None:
    path = boundary.exported(precision=precision) if precision == "fp16" else boundary.onnx
    with pytest.raises(RequestError, match=line) as caught:
        OrtBackend(path, options=EngineOptions(device=device, precision="tf32"))
    assert "\n" not in str(caught.value)


# A GPU's bound memory, on the CPU: the same calls, but for where the memory lies


def test_bound_inputs_and_outputs_compute_the_same(backend: OrtBackend) -> None:
    for n in (1, 3, 7):
        x, sigma, label = (np.random.default_rng(n).standard_normal((n, 3, 8, 8)), np.full(n, 2.0), np.arange(n) % 5)
        feed = {"x": x.astype(np.float32), "sigma": sigma.astype(np.float32), "label": label}
        bound = MemoryBinding(backend._session, feed, ["denoised"], "cpu", GraphNumbers())
        (first,) = bound.run(feed)
        assert np.array_equal(first, backend.evaluate(feed))
        other = feed | {"x": feed["x"] * np.float32(0.5)}
        (second,) = bound.run(other)
        assert np.array_equal(second, backend.evaluate(other))
        assert np.array_equal(first, backend.evaluate(feed))  # the first answer is the caller's


def test_memory_is_kept_for_a_few_batch_sizes(boundary: exports.Files, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = OrtBackend(boundary.onnx)
    made: list[int] = []

    class Recorded:
        def __init__(self, session: object, feed: Any, output: str, device: str, graphs: object) -> None:
            made.append(len(feed["x"]))

    monkeypatch.setattr(ort_module, "MemoryBinding", Recorded)
    for n in (1, 2, 1, 3, 4, 1, 5, 2, 1):
        backend._bind_memory({"x": np.zeros((n, 3, 8, 8), np.float32)})
    assert made == [1, 2, 3, 4, 5, 2]  # 2 was the longest unused when 5 came


def tensors(n: int, kind: str = "float32") -> Interface:
    return Interface({"x_in": (kind, (n, 3, 8, 8)), "c_noise": ("float32", (n,))}, {"F": ("float32", (n, 3, 8, 8))})


def test_bfloat16_is_bound_by_its_number() -> None:
    session = OrtSession("x_in", "c_noise", "F")
    run = AddressBinding(session, tensors(2, "bfloat16"), "cuda:1", GraphNumbers())
    run.evaluate({"x_in": 256, "c_noise": 512, "F": 1024, "label": 0})
    ((_, ports),) = session.captured.items()
    assert ports["x_in"] == ("cuda", 1, onnx.TensorProto.BFLOAT16, (2, 3, 8, 8), 256)
    assert ports["F"][2] == onnx.TensorProto.FLOAT


def test_the_same_addresses_have_the_same_graph_and_graphs_are_bounded() -> None:
    """However often memory is prepared anew: a session lets no graph go."""
    session, graphs = OrtSession("x_in", "c_noise", "F"), GraphNumbers()
    for _ in range(3):
        for n in (1, 3, 7):
            again = AddressBinding(session, tensors(n), "cuda:0", graphs)
            for k in range(2):
                again.evaluate({"x_in": 256 * n, "c_noise": 4096 + 256 * k, "F": 8192})
    assert session.runs == ["1", "2", "3", "4", "5", "6"] * 3
    same = {"x_in": 256, "c_noise": 4096, "F": 8192}  # as those of n = 1
    AddressBinding(session, tensors(255), "cuda:0", graphs).evaluate(same)
    assert session.runs[-1] == "7"
    for place in range(1, 256):
        AddressBinding(session, tensors(1), "cuda:0", graphs).evaluate({"x_in": place, "c_noise": 1, "F": 2})
    assert len(session.captured) == ort_module.MOST_GRAPHS
    assert session.runs[-1] == "-1"


def test_another_thread_captures_nothing() -> None:
    """Its capture would fail what a training loop asks of the GPU meanwhile, and be captured for that thread anew."""
    session = OrtSession("x_in", "c_noise", "F")
    run = AddressBinding(session, tensors(1), "cuda:0", GraphNumbers())
    places = {"x_in": 256, "c_noise": 512, "F": 1024}
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run.evaluate, places).result()
    run.evaluate(places)
    assert session.runs == ["-1", "1"]


def test_a_library_that_is_missing_is_named_on_one_line(
    boundary: exports.Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime prints it on standard output, and goes on with the CPU."""
    real = onnxruntime.InferenceSession

    def open_on_cpu(source: Any, options: Any, providers: Any, enable_fallback: int) -> Any:
        return real(source, options, providers=["CPUExecutionProvider"])

    line = "Failed to load libcublas.so.13: cannot open shared object file"
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_on_cpu)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print(line, "and more", sep="\n"), raising=False)
    monkeypatch.setattr(ort_module, "has_driver", lambda: True)
    with pytest.raises(EngineError) as caught:
        OrtBackend(boundary.onnx, options=EngineOptions(device="cuda:0"))
    assert str(caught.value).endswith(f"could not start on cuda:0; {line}: pip install 'cm-runtime[gpu]'")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("precision", ["auto", "fp32", "tf32"])
@pytest.mark.parametrize("captures", [True, False])
def test_a_graph_is_captured_where_it_can_be_and_one_line_says_where_not(
    boundary: exports.Files,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    captures: bool,
    precision: Any,
) -> None:
    """With a session that stands in for the CUDA provider's, which no machine of ours has."""
    asked: list[str] = []

    class Session:
        def __init__(self, source: object, options: object, providers: Any, enable_fallback: int) -> None:
            ((_, chosen),) = providers
            asked.append(chosen["enable_cuda_graph"])
            assert chosen["use_tf32"] == ("1" if precision == "tf32" else "0")  # float32 is float32
            if not captures and chosen["enable_cuda_graph"] == "1":
                raise RuntimeError("This session cannot use the graph capture feature as requested by the user")

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

        def get_outputs(self) -> list[Any]:
            return []

    path = boundary.onnx
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(ort_module, "has_driver", lambda: True)
    engine = OrtBackend(path, options=EngineOptions(device="cuda:0", precision=precision))
    assert engine.precision == ("tf32" if precision == "tf32" else "fp32")
    assert asked == (["1"] if captures else ["1", "0"])
    said = [record.getMessage().partition(": ")[0] for record in caplog.records]
    assert said == ([] if captures else [f"{boundary.onnx} runs without a CUDA graph"])
