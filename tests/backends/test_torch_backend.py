"""Eager torch behind the Denoiser protocol."""

import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import exports
import numpy as np
import pytest
import torch

from cm_runtime.backends import torch_settings
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends.torch import TorchBackend, TorchReference
from cm_runtime.backends.torch_settings import products
from cm_runtime.checkpoints.native import read_checkpoint
from cm_runtime.errors import EngineError, OutOfMemoryError, RequestError


@pytest.fixture
def backend(boundary: exports.Files) -> TorchBackend:
    ours = read_checkpoint(boundary.checkpoint)
    return TorchBackend(ours.model(), ours.manifest())


def image(n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, 3, 8, 8)).astype(np.float32)


@pytest.mark.process
def test_it_computes_c_skip_x_plus_c_out_F_in_float64(backend: TorchBackend, boundary: exports.Files) -> None:
    """The network itself in float64, and arXiv 2303.01469's coefficients written out."""
    sigma, label = np.array([80.0, 1.5, 0.01]), np.array([4, 0, 2])
    F = boundary.model().F.double()
    s = sigma.reshape(-1, 1, 1, 1)
    c_in, c_noise = 1 / np.sqrt(s**2 + 0.25), 250 * np.log(sigma)
    # the embedding of c_noise is float32 in the network
    answer = F.time_embed.register_forward_pre_hook(lambda _, given: (given[0].double(),))
    with torch.inference_mode():
        F_x = F(torch.from_numpy(c_in * image()), torch.from_numpy(c_noise), torch.from_numpy(label)).numpy()
    answer.remove()
    c_skip = 0.25 / ((s - 0.002) ** 2 + 0.25)
    c_out = 0.5 * (s - 0.002) / np.sqrt(s**2 + 0.25)
    x0 = backend.denoise(image(), sigma, label)
    assert x0.dtype == np.float32
    assert np.abs(x0 - (c_skip * image() + c_out * F_x)).max() < 5e-4


def test_one_sigma_and_one_label_serve_every_image(backend: TorchBackend) -> None:
    each = backend.denoise(image(), [2.0, 2.0, 2.0], [1, 1, 1])
    assert np.array_equal(backend.denoise(image(), 2.0, 1), each)


def test_dropout_is_off_while_it_is_asked_and_the_module_stays_as_it_was(boundary: exports.Files) -> None:
    """Training draws its sample grids through this backend, from a module in training mode."""
    ours = read_checkpoint(boundary.checkpoint)
    model = ours.model().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    asked = TorchBackend(model, ours.manifest())
    assert np.array_equal(asked.denoise(image(), 2.0, 1), asked.denoise(image(), 2.0, 1))
    assert model.training
    assert all(module.training for module in model.modules())


def test_a_refused_input_leaves_the_module_as_it_was(boundary: exports.Files) -> None:
    ours = read_checkpoint(boundary.checkpoint)
    model = ours.model().train()
    with pytest.raises(RequestError, match="sigma"):
        TorchBackend(model, ours.manifest()).denoise(image(), -1.0, 1)
    assert model.training


def test_the_answer_belongs_to_the_caller_and_inputs_may_be_read_only(backend: TorchBackend) -> None:
    x = image()
    x.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x0 = backend.denoise(x, 2.0, 1)
    assert x0.flags.writeable
    x0[:] = 0
    assert np.abs(backend.denoise(x, 2.0, 1)).max() > 0.1


def test_no_gradient_is_kept(boundary: exports.Files) -> None:
    ours = read_checkpoint(boundary.checkpoint)
    model = ours.model().requires_grad_(True)
    x0 = TorchBackend(model, ours.manifest()).denoise(image(), 2.0, 1)
    assert isinstance(x0, np.ndarray)
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda:0", "cuda", "cuda:99"])
def test_cuda_without_a_gpu_is_one_error_and_not_the_cpu(boundary: exports.Files, device: str) -> None:
    ours = read_checkpoint(boundary.checkpoint)
    with pytest.raises(EngineError, match=f"torch cannot use device {device}") as caught:
        TorchBackend(ours.model(), ours.manifest(), EngineOptions(device=device))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "cpu:x", "0", "tpu", "xla", "meta", "mps", "xpu"])
def test_a_device_that_is_no_device_is_one_error(boundary: exports.Files, device: str) -> None:
    ours = read_checkpoint(boundary.checkpoint)
    with pytest.raises(EngineError, match="device") as caught:
        TorchBackend(ours.model(), ours.manifest(), EngineOptions(device=device))
    assert len(str(caught.value).splitlines()) == 1


def test_a_network_of_another_shape_than_the_manifest_says_is_an_engine_error(boundary: exports.Files) -> None:
    ours = read_checkpoint(boundary.checkpoint)
    lying = ours.manifest().model_copy(update={"image_shape": (4, 8, 8)})
    with pytest.raises(EngineError, match="torch: ") as caught:
        TorchBackend(ours.model(), lying).denoise(np.zeros((1, 4, 8, 8), np.float32), 1.0, 0)
    assert len(str(caught.value).splitlines()) == 1


def test_large_images_come_in_small_batches(backend: TorchBackend) -> None:
    """256x256 images 64 at a time, of a published network, would take some 30 GB."""
    for size, expected in {8: 256, 28: 83, 32: 64, 64: 16, 256: 1}.items():
        backend.manifest = backend.manifest.model_copy(update={"image_shape": (3, size, size)})
        assert backend.micro_batch == expected


@pytest.mark.parametrize(("precision", "least"), [("bf16", 40), ("fp16", 55)])
def test_half_precision_keeps_its_decibels_at_every_noise_level(
    boundary: exports.Files, precision: Any, least: float
) -> None:
    """Half weights, with the last convolution, norms and embeddings in float32."""
    full = TorchBackend(boundary.model(), read_checkpoint(boundary.checkpoint).manifest())
    half = TorchBackend(boundary.model(), full.manifest, EngineOptions(device="cpu", precision=precision))
    sigma = np.geomspace(0.002, 80, 7).astype(np.float32)
    x = np.random.default_rng(0).standard_normal((7, 3, 8, 8)) * np.hypot(sigma, 0.5)[:, None, None, None]
    label = np.arange(7) % exports.CLASSES
    error = half.denoise(x.astype(np.float32), sigma, label) - full.denoise(x.astype(np.float32), sigma, label)
    assert np.abs(error).max() > 1e-5
    assert 10 * np.log10(4 / np.maximum(np.mean(error**2, axis=(1, 2, 3)), 1e-20)).min() >= least
    assert half._f.F.last.weight.dtype == torch.float32


def test_a_module_may_serve_two_backends(boundary: exports.Files) -> None:
    """It is not changed, and in fp32 computes what it did."""
    manifest, model = read_checkpoint(boundary.checkpoint).manifest(), boundary.model()
    full = TorchBackend(model, manifest)
    wanted = full.denoise(image(), 2.0, 1)
    one, other = (
        TorchBackend(model, manifest, EngineOptions(device="cpu", precision="bf16")).denoise(image(), 2.0, 1)
        for _ in range(2)
    )
    assert np.array_equal(one, other)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert np.array_equal(full.denoise(image(), 2.0, 1), wanted)
    assert (full.name, full.version) == ("torch", f"torch {torch.__version__}")


def test_a_compiler_that_fails_is_one_line(boundary: exports.Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: object, **__: object) -> object:
        raise OSError("backend='inductor' raised:\nno C++ compiler was found\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiled)
    ours = read_checkpoint(boundary.checkpoint)
    backend = TorchBackend(ours.model(), ours.manifest(), EngineOptions(device="cpu", backend="torch.compile"))
    assert backend.name == "torch.compile"
    with pytest.raises(EngineError) as caught:
        backend.denoise(image(), 1.0, 0)
    assert str(caught.value) == "torch.compile: backend='inductor' raised: no C++ compiler was found"


@pytest.mark.slow
@pytest.mark.timeout(900)  # ten compilations
def test_compiled_it_computes_the_same_for_more_batch_sizes_than_torch_allows_by_itself(
    boundary: exports.Files,
) -> None:
    ours = read_checkpoint(boundary.checkpoint)
    eager, compiled = (
        TorchBackend(
            ours.model(),
            ours.manifest(),
            EngineOptions(device="cpu", backend="torch.compile" if c else "torch"),
        )
        for c in (False, True)
    )
    for n in range(1, 11):
        x = np.random.default_rng(n).standard_normal((n, 3, 8, 8)).astype(np.float32)
        assert np.abs(eager.denoise(x, 1.0, 0) - compiled.denoise(x, 1.0, 0)).max() < 1e-4


def float32_settings() -> list[str]:
    """The old name, and cuDNN's, cuBLAS' and oneDNN's."""
    places = torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return [torch.get_float32_matmul_precision(), *(str(place.fp32_precision) for place in places)]


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_float32_is_ieee_while_it_computes_and_settings_stay(backend: TorchBackend, precision: str) -> None:
    """A process may allow bfloat16 for float32 products, and cuDNN takes TF32 by default."""
    seen = []
    backend._f.F.register_forward_pre_hook(lambda *_: seen.append(float32_settings()))
    torch.set_float32_matmul_precision(precision)
    try:
        before = float32_settings()
        backend.denoise(image(), 1.0, 0)
        assert seen == [["highest", "ieee", "ieee", "ieee"]]
        assert float32_settings() == before
        assert torch.backends.cudnn.allow_tf32 is True  # can still be asked by its old name
    finally:
        torch.set_float32_matmul_precision("highest")


def test_float32_is_ieee_in_evaluations_that_a_gpu_is_given(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those at addresses, as they are run and as they are captured."""
    seen, network = [], backend._network()
    monkeypatch.setattr(
        backend, "_network", lambda: lambda *inputs: (seen.append(float32_settings()), network(*inputs))[1]
    )
    before, device = float32_settings(), SimpleNamespace(stream=0)
    arrays = {"x_in": np.ascontiguousarray(image().transpose(0, 2, 3, 1)), "c_noise": np.zeros(3, np.float32)}
    arrays |= {"label": np.zeros(3, np.int64), "F": np.zeros((3, 8, 8, 3), np.float32)}
    backend.bind(device, 3)({name: array.ctypes.data for name, array in arrays.items()})  # type: ignore[arg-type]
    assert seen == [["highest", "ieee", "ieee", "ieee"]]
    assert float32_settings() == before != seen[0]
    assert arrays["F"].any()


def test_settings_stay_where_two_threads_compute_in_turn() -> None:
    """The one that began first ends first, as a thread that draws ahead may."""
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.benchmark
    one, other = products("ieee"), products("ieee")
    one.__enter__()
    other.__enter__()
    assert torch.backends.cudnn.allow_tf32 is False  # can be asked meanwhile
    one.__exit__(None, None, None)
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cudnn.benchmark
    other.__exit__(None, None, None)
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.benchmark) == before
    assert torch.backends.cudnn.allow_tf32 is True


def test_other_products_wait_for_those_that_are_computed() -> None:
    """They are the process's: TF32 may not come into an evaluation in float32."""
    seen = []

    def compute() -> None:
        with products("tf32"):
            places = torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.conv
            seen.extend(str(place.fp32_precision) for place in places)

    other = threading.Thread(target=compute)
    with products("ieee"):
        other.start()
        other.join(0.05)
        assert other.is_alive()
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    other.join()
    assert seen == ["tf32", "tf32", "ieee"]


# Of all, of a library, of an operation, each by its owner's where it is none.
PLACES = [
    *[("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("mkldnn", "conv")],
    *[("cuda", "conv"), ("cuda", "rnn"), ("cuda", "matmul"), ("mkldnn", "matmul")],
]


@pytest.mark.parametrize("kind", ["ieee", "tf32"])
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("cuda", "matmul"), "tf32"),  # torch.backends.cuda.matmul.fp32_precision
        (("generic", "all"), "tf32"),  # torch.backends.fp32_precision
        (("cuda", "all"), "tf32"),  # torch.backends.cudnn.fp32_precision
        (("mkldnn", "matmul"), "bf16"),  # torch.backends.mkldnn.matmul.fp32_precision
    ],
)
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_settings_by_new_names_stay(place: tuple[str, str], value: str, kind: Any, precision: str) -> None:
    """torch refuses the old name where they contradict it, and an operation goes on to take its owner's."""
    api: Any = torch._C
    get, put = api._get_fp32_precision_getter, api._set_fp32_precision_setter

    def settings() -> list[str]:
        return [get(*each) for each in PLACES]

    saved = settings()
    torch.set_float32_matmul_precision(precision)
    put("cuda", "matmul", "none")
    put("mkldnn", "matmul", "none")
    own = settings()
    try:
        put(*place, value)
        before = settings()
        with products(kind):
            assert [get("cuda", "conv"), get("cuda", "matmul"), get("mkldnn", "matmul")] == [kind, kind, "ieee"]
            assert torch.get_float32_matmul_precision() == {"ieee": "highest", "tf32": "high"}[kind]
        assert settings() == before
        put(*place, "none")
        assert settings() == own
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
        for each, was in zip(PLACES, saved, strict=True):
            put(*each, was)


def test_settings_that_cannot_be_read_leave_nothing_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch_settings, "_read", raises(RuntimeError("a mix")))
        with pytest.raises(RuntimeError, match="a mix"), products("ieee"):
            pytest.fail("nothing was saved")
    with products("tf32"):  # waits for nobody
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert torch.backends.cudnn.allow_tf32 is True


def conv_products() -> str:
    return str(torch.backends.cudnn.conv.fp32_precision)


@pytest.mark.timeout(20)
def test_other_products_inside_of_an_evaluation_are_its_threads_alone(backend: TorchBackend) -> None:
    """As where a file is exported, and held to the reference in float32, between requests in TF32."""
    seen = []
    backend._f.F.register_forward_pre_hook(lambda *_: seen.append(conv_products()))
    with products("tf32"), products("tf32"):
        backend.denoise(image(), 1.0, 0)
        assert [*seen, conv_products()] == ["ieee", "tf32"]
        with products("ieee"), products("tf32"):
            assert conv_products() == "tf32"
        assert conv_products() == "tf32"
    assert torch.backends.cudnn.allow_tf32 is True


@pytest.mark.timeout(20)
def test_other_products_are_refused_where_another_thread_computes_too() -> None:
    """One that waited for both to end would wait for itself."""
    is_inside, may_end = threading.Event(), threading.Event()

    def compute() -> None:
        with products("ieee"):
            is_inside.set()
            may_end.wait()

    other = threading.Thread(target=compute)
    with products("ieee"):
        other.start()
        is_inside.wait()
        with pytest.raises(EngineError, match=r"^torch cannot compute in tf32 inside of what"), products("tf32"):
            pytest.fail("another thread computes in ieee")
        may_end.set()
        other.join()
        with products("tf32"):
            assert conv_products() == "tf32"
    assert torch.backends.cudnn.allow_tf32 is True


def test_tf32_is_no_precision_of_a_cpu(boundary: exports.Files) -> None:
    ours = read_checkpoint(boundary.checkpoint)
    with pytest.raises(EngineError, match=r"^tf32 is a precision of GPUs; on the CPU take fp32$"):
        TorchBackend(ours.model(), ours.manifest(), EngineOptions(device="cpu", precision="tf32"))


def test_the_reference_is_the_module_itself(boundary: exports.Files) -> None:
    """Training draws by it, on a GPU too: never by a copy, nor by kernels that its GPU may lack."""
    model = boundary.model()
    reference = TorchReference(model, read_checkpoint(boundary.checkpoint).manifest())
    assert reference._f is model
    assert reference.batches(None) is None  # type: ignore[arg-type]


class Device:
    """`cuda.device.Device` whose captures fail once for each of ``errors``, or as the body does; log: its calls."""

    stream = 7

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.log = list(errors), []

    def capture(self, body: Callable[[], Any]) -> Any:
        self.log.append("capture")
        body()
        if self.errors:
            raise self.errors.pop(0)
        return SimpleNamespace(launch=lambda: self.log.append("launch"))

    def finish(self) -> None:
        self.log.append("finish")


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet[Any]:
    """Those of torch's allocator that live."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Pool:
        def __init__(self) -> None:
            alive.add(self)

    monkeypatch.setattr(torch.cuda, "MemPool", Pool)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda pool: nullcontext())
    return alive


@pytest.mark.usefixtures("pools")
@pytest.mark.parametrize(
    ("errors", "body"),
    [
        ([RuntimeError("CUDA error: operation not permitted\nmore of it")], None),
        ([EngineError("CUDA error: operation not permitted")], None),
        ([], EngineError("CUDA error: operation not permitted")),
    ],
)
def test_it_goes_on_without_a_graph_and_says_so(
    backend: TorchBackend, caplog: pytest.LogCaptureFixture, errors: list[Exception], body: Exception | None
) -> None:
    device: Any = Device(*errors)
    with caplog.at_level("WARNING"):
        assert backend.capture(device, raises(body)) is None
    assert caplog.messages == ["torch evaluates without a CUDA graph: CUDA error: operation not permitted"]
    assert device.log == ["capture"]


@pytest.mark.parametrize("failures", [1, 2])
def test_a_capture_for_which_memory_ends_is_tried_once_more(
    backend: TorchBackend, pools: weakref.WeakSet[Any], monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """With what torch keeps of the run before it, which it gives back outside of captures alone; then batches halve."""
    device: Any = Device(*(OutOfMemoryError("torch: no memory") for _ in range(failures)))

    def empty_cache() -> None:
        assert not pools, "the failed capture's pool would be kept"
        device.log.append("trim")

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    if failures == 1:
        graph = backend.capture(device, raises(None))
        assert graph is not None and len(pools) == 1
    else:
        with pytest.raises(OutOfMemoryError, match=r"^torch: no memory$"):
            backend.capture(device, raises(None))
    assert device.log == ["capture", "finish", "trim", "capture"]


def raises(error: Exception | None) -> Callable[[], None]:
    def body() -> None:
        if error is not None:
            raise error

    return body


def test_a_fork_is_told_that_torchs_threads_are_not_there(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP would wait for them for ever; with one thread it needs none."""
    alone = backend.denoise(image(), 1.0, 0)
    backend._process += 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(EngineError, match="before this process was forked"):
        backend.denoise(image(), 1.0, 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert np.allclose(backend.denoise(image(), 1.0, 0), alone, rtol=0, atol=1e-5)
