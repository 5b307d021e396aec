"""cm_runtime/training/lpips.py and lpips_weights.py: against LPIPS in plain float64 NumPy, and files as published.

No published weights are at hand: they are random here, under the published names, in the published formats.
"""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from cm_runtime.errors import CheckpointError, MissingExtraError, RequestError
from cm_runtime.training.lpips import Lpips, load_lpips
from cm_runtime.training.lpips_weights import read_weights

pytestmark = pytest.mark.usefixtures("one_thread")

Weights = dict[str, Tensor]
# VGG16, configuration D (arXiv 1409.1556, table 1), by torchvision's numbers: (layer, inputs, outputs)
VGG16 = [(0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256)]
VGG16 += [(17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512)]
HEADS = [64, 128, 256, 512, 512]
SMALL = 32  # pixels, in place of 224


@pytest.fixture(scope="module")
def vgg() -> Weights:
    """torchvision's state dict, its classifier cut short; He's scale keeps the features alive to the last layer."""
    generator = torch.Generator().manual_seed(1)
    weights = {"classifier.0.weight": torch.full((2, 3), torch.nan), "classifier.0.bias": torch.zeros(2)}
    for layer, inputs, outputs in VGG16:
        scale = (2 / (9 * inputs)) ** 0.5
        weights[f"features.{layer}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * scale
        weights[f"features.{layer}.bias"] = torch.randn(outputs, generator=generator) * 0.1
    return weights


@pytest.fixture(scope="module")
def heads() -> Weights:
    """The lpips package's state dict."""
    generator = torch.Generator().manual_seed(2)
    return {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for k, c in enumerate(HEADS)}


@pytest.fixture(scope="module")
def weights(vgg: Weights, heads: Weights) -> Weights:
    """As ``read_weights`` returns them."""
    features = {name: tensor for name, tensor in vgg.items() if name.startswith("features.")}
    return {**features, **{name: tensor.flatten() for name, tensor in heads.items()}}


@pytest.fixture(scope="module")
def small(weights: Weights) -> Lpips:
    return Lpips(weights, size=SMALL)


@pytest.fixture(scope="module")
def full(weights: Weights) -> Lpips:
    return Lpips(weights)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- the distance -----------------------------------------------------------------------------------------------------


def bilinear(x: np.ndarray, size: int) -> np.ndarray:
    """(C, H, W) -> (C, size, size): pixel centres at i + 1/2, edges repeated."""
    for axis in (1, 2):
        length = x.shape[axis]
        place = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
        low = np.floor(place).astype(int)
        share = (place - low).reshape([-1 if i == axis else 1 for i in range(3)])
        x = x.take(low, axis) * (1 - share) + x.take(np.minimum(low + 1, length - 1), axis) * share
    return x


def convolved(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    windows = sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1))), (3, 3), axis=(1, 2))
    return np.einsum("chwij,ocij->ohw", windows, kernel, optimize=True) + bias[:, None, None]


def reference(weights: Weights, a: Tensor, b: Tensor, size: int) -> float:
    """LPIPS of two images (C, H, W) as arXiv 1801.03924, equation 1 writes it, with average pooling, in float64."""
    features = []
    for image in (a, b):
        x = (image.double().numpy() + 1) / 2
        x = bilinear(x, size) if x.shape[1] < size else x
        x = np.concatenate([x] * (3 // len(x)))
        x = (x - np.array([[[0.485]], [[0.456]], [[0.406]]])) / np.array([[[0.229]], [[0.224]], [[0.225]]])
        for layer, _, outputs in VGG16:
            kernel, bias = (weights[f"features.{layer}.{part}"].double().numpy() for part in ("weight", "bias"))
            x = np.maximum(convolved(x, kernel, bias), 0)
            if layer in (2, 7, 14, 21, 28):
                features.append(x / (np.sqrt((x**2).sum(0)) + 1e-10))
                _, h, w = x.shape
                x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(outputs, h // 2, 2, w // 2, 2).mean((2, 4))
    total = 0.0
    for stage in range(5):
        head = weights[f"lin{stage}.model.1.weight"].double().numpy()
        difference = (features[stage] - features[5 + stage]) ** 2
        total += (head[:, None, None] * difference).sum(0).mean()
    return float(total)


@pytest.mark.process
@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (3, 1, 28, 28), (1, 3, 32, 32), (1, 3, 39, 33)], ids=str)
def test_it_is_the_formula_of_the_paper(small: Lpips, weights: Weights, shape: Sequence[int]) -> None:
    a, b = pictures(*shape), pictures(*shape, seed=1)
    expected = [reference(weights, *pair, SMALL) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(small(a, b).numpy(), expected, rtol=2e-5)
    assert min(expected) > 0.01


@pytest.mark.process
@pytest.mark.parametrize("n", [1, 3, 7])
def test_every_image_of_a_batch_is_by_itself(small: Lpips, n: int) -> None:
    a, b = pictures(n, 3, 32, 32), pictures(n, 3, 32, 32, seed=1)
    d = small(a, b)
    assert d.shape == (n,) and d.dtype == torch.float32
    one_by_one = torch.cat([small(a[i : i + 1], b[i : i + 1]) for i in range(n)])
    torch.testing.assert_close(d, one_by_one, rtol=1e-5, atol=0)


@pytest.mark.process
def test_small_images_are_seen_at_224_pixels(full: Lpips) -> None:
    for channels, side in ((1, 28), (3, 32)):
        a, b = pictures(1, channels, side, side), pictures(1, channels, side, side, seed=1)
        large = [
            torch.from_numpy(bilinear(x[0].double().numpy(), 224)).float()[None].expand(1, 3, 224, 224) for x in (a, b)
        ]
        torch.testing.assert_close(full(a, b), full(*large), rtol=1e-4, atol=0)


def test_large_images_are_left_as_they_are(full: Lpips, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "interpolate", None)
    a, b = pictures(1, 3, 40, 48), pictures(1, 3, 40, 48, seed=1)
    assert Lpips(weights, size=40)(a, b) > 0
    assert full.size == 224


@pytest.mark.process
def test_it_is_a_distance(small: Lpips) -> None:
    a, b = pictures(3, 3, 32, 32), pictures(3, 3, 32, 32, seed=1)
    assert torch.equal(small(a, a), torch.zeros(3))
    assert torch.equal(small(a, b), small(b, a))
    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    by_noise = torch.stack([small(a, a + sigma * noise) for sigma in (0.01, 0.03, 0.1, 0.3, 1)])
    assert bool((by_noise.diff(dim=0) > 0).all())


@pytest.mark.process
def test_the_gradient_is_that_of_the_formula(weights: Weights) -> None:
    lpips = Lpips(weights, size=16).double()
    a, b = pictures(1, 3, 16, 16).double().requires_grad_(), pictures(1, 3, 16, 16, seed=1).double().requires_grad_()
    by_a, by_b = torch.autograd.grad(lpips(a, b).sum(), (a, b))
    step = 1e-6 * torch.randn(a.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        along_a = (lpips(a + step, b) - lpips(a - step, b)).item()
        along_b = (lpips(a, b + step) - lpips(a, b - step)).item()
    assert along_a == pytest.approx(2 * (by_a * step).sum().item(), rel=1e-4)
    assert along_b == pytest.approx(2 * (by_b * step).sum().item(), rel=1e-4)


def test_the_gradient_is_zero_where_the_images_are_equal(small: Lpips) -> None:
    a = pictures(1, 3, 32, 32).requires_grad_()
    small(a, a.detach()).sum().backward()
    assert a.grad is not None and torch.equal(a.grad, torch.zeros_like(a))


def test_silent_features_send_back_no_nan(weights: Weights) -> None:
    """A first layer that only sees brightness is silent on black, where a plain root's gradient is NaN."""
    kernel = torch.zeros(64, 3, 3, 3)
    kernel[:, :, 1, 1] = 1.0
    silent = {"features.0.weight": kernel, "features.0.bias": torch.zeros(64), "features.2.bias": torch.zeros(64)}
    lpips = Lpips(weights | silent, size=16)
    black = torch.full((1, 3, 16, 16), -1.0).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # looks at every step back, not at the last one alone
        for other in (black.detach(), pictures(1, 3, 16, 16)):
            d = lpips(black, other)
            (gradient,) = torch.autograd.grad(d.sum(), black)
            assert bool(torch.isfinite(d).all()) and torch.equal(gradient, torch.zeros_like(black))


@pytest.mark.process
def test_autocast_changes_nothing(small: Lpips) -> None:
    a, b = pictures(1, 3, 32, 32).requires_grad_(), pictures(1, 3, 32, 32, seed=1)
    plain = small(a, b)
    (gradient,) = torch.autograd.grad(plain.sum(), a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = small(a, b)
    assert cast.dtype == torch.float32 and torch.equal(cast, plain)
    assert torch.equal(torch.autograd.grad(cast.sum(), a)[0], gradient)
    half = a.detach().bfloat16()
    assert torch.equal(small(half, b), small(half.float(), b))


def test_a_detached_target_keeps_no_graph(small: Lpips) -> None:
    """What autograd holds on to is as much for a pair as twice a target of no gradient would make it for one image."""
    a, b = pictures(1, 3, 32, 32), pictures(1, 3, 32, 32, seed=1)

    def kept(a: Tensor, b: Tensor) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            small(a, b)
        parameters = sum(w.numel() for w in small.kernels)
        return sum(sizes) - parameters * (a.requires_grad + b.requires_grad)

    assert kept(a, b) <= 0 and not small(a, b).requires_grad
    one, both = kept(a.clone().requires_grad_(), b), kept(a.clone().requires_grad_(), b.clone().requires_grad_())
    assert 0 < one < 0.6 * both


def test_it_is_frozen_and_stays_in_evaluation(small: Lpips) -> None:
    assert not small.train().training and not any(module.training for module in small.modules())
    assert not any(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2, 2, 32, 32), torch.zeros(2, 2, 32, 32)),
        (torch.zeros(2, 4, 32, 32), torch.zeros(2, 4, 32, 32)),
        (torch.zeros(3, 32, 32), torch.zeros(3, 32, 32)),
        (torch.zeros(2, 3, 32, 32), torch.zeros(1, 3, 32, 32)),
        (torch.zeros(2, 3, 32, 32), torch.zeros(2, 1, 32, 32)),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)),
    ],
    ids=["two channels", "four channels", "no batch", "batches", "grey and colour", "bytes"],
)
def test_what_cannot_be_compared_is_refused(small: Lpips, a: Tensor, b: Tensor) -> None:
    with pytest.raises(RequestError, match="LPIPS takes"):
        small(a, b)


def test_a_size_below_16_is_refused(weights: Weights) -> None:
    with pytest.raises(RequestError, match="needs 16 pixels, not 15"):
        Lpips(weights, size=15)


# --- published files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(vgg: Weights, heads: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files as they are published: torchvision's and lpips' are older than torch's zip format."""
    where = tmp_path_factory.mktemp("published")
    torch.save(vgg, where / "vgg16.pth", _use_new_zipfile_serialization=False)
    torch.save(heads, where / "vgg.pth", _use_new_zipfile_serialization=False)
    torch.save(list(heads.values()), where / "lpips_weights.pt")
    torch.save(vgg | heads, where / "merged.pt")
    return where


def equal(found: Weights, expected: Weights) -> bool:
    return sorted(found) == sorted(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.process
@pytest.mark.parametrize(
    "names", [("vgg16.pth", "vgg.pth"), ("lpips_weights.pt", "vgg16.pth"), ("merged.pt",)], ids=" and ".join
)
def test_published_files_are_read(folder: Path, small: Lpips, weights: Weights, names: tuple[str, ...]) -> None:
    paths = [folder / name for name in names]
    assert equal(read_weights(paths), weights)
    loaded = load_lpips(paths, "cpu")
    assert loaded.size == 224
    loaded.size = SMALL
    a, b = pictures(1, 3, 32, 32), pictures(1, 3, 32, 32, seed=1)
    assert torch.equal(loaded(a, b), small(a, b))


@pytest.mark.process
def test_safetensors_are_read(tmp_path: Path, vgg: Weights, heads: Weights, weights: Weights) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "merged.safetensors"
    save_file(vgg | heads, path)
    assert equal(read_weights([path]), weights)
    path.write_bytes(path.read_bytes()[:-7])
    assert "is not a safetensors file, or is damaged" in refusal(path)
    assert "no such file" in refusal(tmp_path / "none.safetensors")


def test_without_the_package_safetensors_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=r"x.safetensors needs safetensors: pip install 'cm-runtime\[train\]'"):
        read_weights([tmp_path / "x.safetensors"])


# --- hostile files and wrong ones -------------------------------------------------------------------------------------


def refusal(*paths: Path) -> str:
    """The one line with which files are refused."""
    with pytest.raises(CheckpointError) as caught:
        read_weights(paths)
    message = str(caught.value)
    assert "\n" not in message and str(paths[-1]) in message and len(message) < 1000
    return message


@pytest.fixture(scope="module")
def hollow(vgg: Weights, heads: Weights) -> Weights:
    """Tensors of the right shapes in half the bytes: every number is zero."""
    return {name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in (vgg | heads).items()}


def test_views_that_claim_more_than_is_stored_are_refused(tmp_path: Path, vgg: Weights, heads: Weights) -> None:
    torch.save({name: torch.zeros(()).expand(tensor.shape) for name, tensor in (vgg | heads).items()}, tmp_path / "x")
    assert "classifier.0.weight claims 24 bytes of the 4 that are stored" in refusal(tmp_path / "x")


class Bomb:
    """Unpickled, it would touch a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.canary),)


@pytest.mark.parametrize("layout", ["zip", "before 1.6", "pickle"])
@pytest.mark.parametrize("whole", [False, True], ids=["a tensor", "the whole"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, hollow: Weights, layout: str, whole: bool) -> None:
    canary, path = tmp_path / "canary", tmp_path / "x.pt"
    hostile = Bomb(canary) if whole else {**hollow, "features.0.bias": Bomb(canary)}
    if layout == "pickle":
        path.write_bytes(pickle.dumps(hostile, protocol=2))
    else:
        torch.save(hostile, path, _use_new_zipfile_serialization=layout == "zip")
    message = refusal(path)
    assert not canary.exists()
    assert "could run code, which cm-runtime never does" in message


@pytest.mark.parametrize("share", [0, 1e-4, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_a_truncated_file_is_refused(tmp_path: Path, heads: Weights, share: float, zipped: bool) -> None:
    path = tmp_path / "x.pt"
    torch.save(heads, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "is not a torch checkpoint, or is damaged" in refusal(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damages_to_an_old_file_raise_nothing_but_the_refusal(
    tmp_path: Path, heads: Weights, rng: np.random.Generator
) -> None:
    """None of them can be accepted: there is no VGG16 in the file."""
    path = tmp_path / "x.pt"
    torch.save(heads, path, _use_new_zipfile_serialization=False)
    good = path.read_bytes()
    for _ in range(80):
        damaged = bytearray(good)
        for place in rng.integers(0, 1500, rng.integers(1, 6)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            read_weights([path])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("claim", [10**9, 10**15])
def test_an_old_file_that_claims_more_than_it_holds_is_refused(tmp_path: Path, claim: int) -> None:
    path = tmp_path / "x.pt"
    torch.save({"features.0.bias": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    good = path.read_bytes()
    thousand = b"M" + (1000).to_bytes(2, "little")
    assert good.count(thousand) == 2  # the storage's length and the tensor's
    path.write_bytes(good.replace(thousand, b"\x8a\x08" + claim.to_bytes(8, "little")))
    assert "is not a torch checkpoint, or is damaged" in refusal(path)


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(1 << 22))
    assert "it claims" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "content",
    [b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02.", bytes(10240), b"PK\x03\x04"],
    ids=repr,
)
def test_files_of_other_programs_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    assert "is not a torch checkpoint, or is damaged" in refusal(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [7, None, "text", torch.zeros(3), {"a": 1}, {1: torch.zeros(1)}, [1, 2]], ids=repr)
def test_other_content_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert "holds no tensors by name" in refusal(tmp_path / "x.pt")


def test_paths_that_hold_no_file_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.pth")
    assert "is a folder, not a regular file" in refusal(tmp_path)
    with pytest.raises(CheckpointError, match="no file: not the weights of LPIPS: missing"):
        read_weights([])


Change = Callable[[Weights], dict[str, Tensor]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: {k: t for k, t in w.items() if k != "features.28.bias"}, "missing features.28.bias"),
        (lambda w: {k: t for k, t in w.items() if "lin" not in k}, "missing lin4.model.1.weight"),
        (lambda w: {**w, "features.1.weight": torch.zeros(64)}, "unexpected features.1.weight"),
        (lambda w: {**w, "features.0.bias": torch.zeros(63)}, r"features.0.bias is (63,) and should be of (64,)"),
        (lambda w: {**w, "features.0.weight": torch.zeros(64, 1, 3, 3)}, "features.0.weight is (64, 1, 3, 3) and"),
        (lambda w: {**w, "lin2.model.1.weight": torch.zeros(1, 64, 1, 1)}, "lin2.model.1.weight is (1, 64, 1, 1) and"),
        (lambda w: {**w, "features.5.bias": torch.full((128,), torch.nan)}, "features.5.bias is not finite"),
        (lambda w: {**w, "lin0.model.1.weight": torch.full((1, 64, 1, 1), torch.inf)}, "lin0.model.1.weight is not"),
        (lambda w: {**w, "features.5.bias": torch.zeros(128).long()}, "features.5.bias is not a dense tensor of"),
        (lambda w: {**w, "features.5.bias": torch.zeros(128).to_sparse()}, "features.5.bias is not a dense tensor of"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, hollow: Weights, change: Change, said: str) -> None:
    torch.save(change(hollow), tmp_path / "x.pt")
    message = refusal(tmp_path / "x.pt")
    assert said in message and "vgg16-397923af.pth" in message


@pytest.mark.process
def test_a_tensor_in_two_files_and_a_sixth_head_are_named(tmp_path: Path, hollow: Weights, heads: Weights) -> None:
    torch.save(hollow, tmp_path / "merged.pt")
    torch.save([*heads.values(), torch.zeros(1, 7, 1, 1)], tmp_path / "heads.pt")
    message = refusal(tmp_path / "merged.pt", tmp_path / "heads.pt")
    assert "lin0.model.1.weight is there twice" in message
    vgg_only = {name: tensor for name, tensor in hollow.items() if not name.startswith("lin")}
    torch.save(vgg_only, tmp_path / "vgg.pt")
    assert "unexpected lin5.model.1.weight" in refusal(tmp_path / "vgg.pt", tmp_path / "heads.pt")
