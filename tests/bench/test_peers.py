"""bench/peers.py: other tools, given our noise and levels, draw the images that our sampler draws from our export."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import torch

import cm_runtime as cm
from cm_runtime.backends import DEFAULT_MODEL
from cm_runtime.bench import peers
from cm_runtime.bench.scenario import PEERS, Peer
from cm_runtime.checkpoints.native import read_checkpoint
from cm_runtime.errors import EngineError, MissingExtraError, RequestError
from cm_runtime.schedule import NoiseRange

LEVELS = {1: (80.0,), 2: (80.0, 1.38), 3: (80.0, 7.7, 0.31)}  # on no grid
KINDS = {"diffusers": ("boundary",), "torch.compile": ("boundary",)}  # the others take every form
QUICK = {"diffusers": "boundary", "torch": "edm", "onnx": "boundary", "openvino": "piecewise"}  # of each one form
CASES = [  # torch.compile takes 40 seconds for each size of batch
    pytest.param((name, kind), marks=[] if QUICK.get(name) == kind else pytest.mark.slow, id=f"{name}-{kind}")
    for name in PEERS
    for kind in KINDS.get(name, exports.KINDS)
]


@pytest.fixture(scope="module")
def boundary(tmp_path_factory: pytest.TempPathFactory) -> exports.Files:
    return exports.Files("boundary", tmp_path_factory)


@pytest.fixture(scope="module", params=CASES)
def drawn(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[peers.Drawer, exports.Files]:
    """A peer, and the files of the model that it draws."""
    name, kind = request.param
    files, work = exports.Files(kind, tmp_path_factory), tmp_path_factory.mktemp("work")
    made = peers.peer(name, files.checkpoint, work / "made", threads=1)
    assert list((work / "made").iterdir()) == []
    return made, files


def given(files: exports.Files, steps: int, batch: int) -> tuple[Any, Any, Any]:
    """Our model, noise for it, and the labels that it takes by itself: i mod classes."""
    model = cm.load(files.onnx, threads=1)
    manifest = model.manifest
    z = np.stack([cm.noise.normal(3, np.arange(batch, dtype=np.uint64), k, manifest.image_shape) for k in range(steps)])
    return model, z, np.arange(batch) % manifest.num_classes if manifest.num_classes else None


def apart(model: Any, drawer: peers.Drawer, z: Any, sigmas: Sequence[float], label: Any) -> float:
    """The largest difference of the peer's images from ours, which are made of ``z`` as it is."""
    theirs = drawer(z, sigmas, label)
    assert theirs.dtype == np.float32
    ours = cm.sample(model, noise=z, sigmas=sigmas, output="float32")
    assert theirs.shape == ours.shape
    return float(np.abs(ours - theirs).max())


@pytest.mark.covering(1)
@pytest.mark.process
@pytest.mark.parametrize("steps", LEVELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_peer_draws_our_images(drawn: tuple[peers.Drawer, exports.Files], steps: int, batch: int) -> None:
    drawer, files = drawn
    model, z, label = given(files, steps, batch)
    kept = z.copy()
    assert apart(model, drawer, z, LEVELS[steps], label) < 1e-4
    assert np.array_equal(z, kept)


def test_a_peer_that_is_given_something_else_draws_something_else(drawn: tuple[peers.Drawer, exports.Files]) -> None:
    """So the test above can fail: other noise at either step, another level, other labels."""
    drawer, files = drawn
    model, z, label = given(files, 2, 3)
    ours = cm.sample(model, noise=z, sigmas=LEVELS[2], output="float32")
    for k in range(2):
        changed = z.copy()
        changed[k, 0] *= -1
        apart_by = np.abs(drawer(changed, LEVELS[2], label) - ours).max(axis=(1, 2, 3))
        assert apart_by[0] > 0.02
        assert apart_by[1:].max() < 1e-4
    assert np.abs(drawer(z, (80.0, 1.5), label) - ours).max() > 1e-3
    if label is not None:
        assert np.abs(drawer(z, LEVELS[2], label[::-1].copy()) - ours).max() > 0.02


def test_its_packages_are_named(drawn: tuple[peers.Drawer, exports.Files], request: pytest.FixtureRequest) -> None:
    drawer, _ = drawn
    name = request.node.callspec.params["drawn"][0]
    first = {"diffusers": "diffusers ", "onnx": "onnxruntime ", "openvino": "openvino "}.get(name, "torch ")
    assert drawer.version.startswith(first)
    assert f"torch {torch.__version__}" in drawer.version


@pytest.mark.process
def test_many_steps_on_the_sampler_grid(boundary: exports.Files, tmp_path: Path) -> None:
    """More than diffusers' own grid of 40 has points."""
    drawer = peers.peer("diffusers", boundary.half_checkpoint, tmp_path, threads=1)
    model, z, label = given(boundary, 50, 1)
    sigmas = tuple(float(s) for s in NoiseRange().karras(51)[:-1])
    assert apart(model, drawer, z, sigmas, label) < 1e-4


@pytest.mark.process
def test_diffusers_is_left_as_it_was(boundary: exports.Files, tmp_path: Path) -> None:
    modules = [importlib.import_module(f"diffusers.{name}") for name in peers.RANDN]
    before = [module.randn_tensor for module in modules]
    drawer = peers.peer("diffusers", read_checkpoint(boundary.checkpoint), tmp_path)
    _, z, label = given(boundary, 1, 1)
    drawer(z, LEVELS[1], label)
    with pytest.raises(IndexError):
        drawer(z, (), label)
    assert [module.randn_tensor for module in modules] == before


@pytest.mark.parametrize(("kind", "reason"), [("edm", "has the boundary form alone"), ("piecewise", "piecewise form")])
def test_diffusers_refuses_what_it_cannot_express(
    kind: str, reason: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(RequestError, match=reason):
        peers.peer("diffusers", exports.Files(kind, tmp_path_factory).checkpoint, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_diffusers_refuses_patches(boundary: exports.Files, tmp_path: Path) -> None:
    whole = read_checkpoint(boundary.checkpoint)
    network = whole.config.network.model_copy(update={"patch": 2})
    patched = replace(whole, config=whole.config.model_copy(update={"network": network}))
    with pytest.raises(RequestError, match="cannot unshuffle pixels, as patch 2 does"):
        peers.peer("diffusers", patched, tmp_path)


@pytest.mark.process
def test_an_exported_file_gives_its_weights(tmp_path: Path) -> None:
    """The bundled model, whose checkpoint is not here."""
    model = cm.load(threads=1)
    drawer = peers.peer("torch", DEFAULT_MODEL, tmp_path, threads=1)
    z = np.stack([cm.noise.normal(0, np.arange(2, dtype=np.uint64), k, (1, 28, 28)) for k in range(2)])
    assert apart(model, drawer, z, (80.0, 1.1), np.arange(2)) < 1e-4


def test_what_is_missing_is_named(boundary: exports.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"peer diffusers needs diffusers: pip install 'cm-runtime\[bench\]'"):
        peers.peer("diffusers", boundary.checkpoint, tmp_path)


def test_an_unknown_peer_or_device_is_one_error(boundary: exports.Files, tmp_path: Path) -> None:
    unknown: Peer = "jax"  # type: ignore[assignment]
    with pytest.raises(RequestError, match="no peer 'jax'; they are diffusers, torch"):
        peers.peer(unknown, boundary.checkpoint, tmp_path)
    with pytest.raises(EngineError, match="torch cannot use device cuda:7"):
        peers.peer("torch", boundary.checkpoint, tmp_path, device="cuda:7")


@pytest.mark.slow
def test_a_compiler_that_is_missing_is_one_error(
    boundary: exports.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    drawer = peers.peer("torch.compile", boundary.checkpoint, tmp_path / "work", threads=1)
    _, z, label = given(boundary, 1, 1)
    with pytest.raises(EngineError, match=r"torch\.compile: .*compiler") as caught:
        drawer(z, LEVELS[1], label)
    assert "\n" not in str(caught.value)


# Precision


def test_fp32_is_no_tf32_for_a_peer_either(boundary: exports.Files, tmp_path: Path) -> None:
    """cuDNN's default is; a peer would be held to, and race, images of another precision."""
    seen: list[str] = []

    def draw(*_: Any) -> Any:
        seen.append(torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
        return np.zeros(1, np.float32)

    for precision in ("auto", "fp32", "bf16"):
        drawer = peers._compute_in(precision, torch.device("cpu"), peers.Drawer(draw, "none"))  # type: ignore[arg-type]
        drawer(np.zeros((1, 1)), (80.0,))
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match="tf32 is a precision of GPUs"):
        peers.peer("torch", boundary.checkpoint, tmp_path, precision="tf32")
    assert seen == ["ieee"] * 3
    assert before == torch.backends.cudnn.conv.fp32_precision != "ieee"  # type: ignore[attr-defined]


def test_a_half_precision_is_autocasts_and_plain_exports_have_none(boundary: exports.Files, tmp_path: Path) -> None:
    _, z, label = given(boundary, 1, 3)
    full, half = (peers.peer("torch", boundary.checkpoint, tmp_path, precision=p) for p in ("fp32", "bf16"))  # type: ignore[arg-type]
    difference = np.abs(full(z, (80.0,), label) - half(z, (80.0,), label))
    assert 1e-4 < difference.max() < 0.2
    with pytest.raises(RequestError, match=r"the peer onnx, a plain export, computes in fp32, not in bf16"):
        peers.peer("onnx", boundary.checkpoint, tmp_path, precision="bf16")
