"""Tiny checkpoints with weights that matter, and their exports, made once a session.

A fresh network ends in zeros; here every weight is random, so that a wrong node or a lost label changes the outputs.
The weights are float16-representable, so that a checkpoint and its float16 copy hold the same numbers.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from cm_runtime import export
from cm_runtime.backends.openvino import has_bf16
from cm_runtime.checkpoints.native import Checkpoint, read_checkpoint, save_checkpoint
from cm_runtime.export import to_onnx
from cm_runtime.manifest import TrainingSummary, read_manifest
from cm_runtime.networks.consistency import ConsistencyModel, ModelConfig, build
from cm_runtime.networks.unet import UNetConfig

ROOT = Path(__file__).parents[1]
CLASSES = 5
KINDS = ("boundary", "edm", "piecewise")

needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="this processor has no bfloat16 for OpenVINO")
HALVES = ("fp16", pytest.param("bf16", marks=needs_bf16))


def checkpoint(kind: str, method: str = "ect") -> Checkpoint:
    """boundary: 3 channels, classes. edm: grey, patch 2, resampled by blocks. piecewise: classes, patch 2."""
    choices: dict[str, dict[str, Any]] = {
        "boundary": {"image_channels": 3, "num_classes": CLASSES},
        "edm": {"image_channels": 1, "patch": 2, "resample": "resblock", "scale_shift": False, "attention": (2,)},
        "piecewise": {"image_channels": 3, "num_classes": CLASSES, "patch": 2},
    }
    network = UNetConfig(
        image_size=8, channels=32, channel_mult=(1, 2), res_blocks=1, head_channels=32, **choices[kind]
    )
    config = ModelConfig(network=network, precond=kind, sigma_boundary=0 if kind == "edm" else 0.002)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in build(config, "meta").state_dict().items():
        fan_in = max(tensor[0].numel(), 1)
        scale = 0.1 if tensor.ndim == 1 else fan_in**-0.5
        random = torch.randn(tensor.shape, generator=generator) * scale
        is_norm = tensor.ndim == 1 and name.endswith("weight")
        weights[name] = (random + 1 if is_norm else random).half().float()
    training = TrainingSummary(method=method, data="none", steps=3, images=24, seconds=1.5, config={"seed": 0})
    return Checkpoint(config, "0.999", {"0.999": weights}, training)


def halved(full: Checkpoint) -> Checkpoint:
    """The same numbers, stored as float16."""
    return replace(full, ema={rate: {k: v.half() for k, v in w.items()} for rate, w in full.ema.items()})


@dataclass(frozen=True)
class Files:
    """One kind's files, each made through the public functions when it is first asked for. Tests must not change them.

    ckpt.pt and half.pt hold the same numbers in float32 and float16; model.onnx, inline.onnx and half.onnx are exports,
    and so are those with apart in their name, whose weights are in a data file beside them.
    """

    kind: str
    factory: pytest.TempPathFactory

    @property
    def checkpoint(self) -> Path:
        return self._made("ckpt.pt", lambda path: save_checkpoint(checkpoint(self.kind), path))

    @property
    def half_checkpoint(self) -> Path:
        return self._made("half.pt", lambda path: save_checkpoint(halved(checkpoint(self.kind)), path))

    @property
    def onnx(self) -> Path:
        return self._made("model.onnx", lambda path: _export(self.checkpoint, path))

    @property
    def inline(self) -> Path:
        return self._made("inline.onnx", lambda path: _export(self.checkpoint, path, inline=True))

    @property
    def half(self) -> Path:
        return self._made("half.onnx", lambda path: _export(self.half_checkpoint, path))

    @property
    def apart(self) -> Path:
        return self._made("apart.onnx", lambda path: _export(self.checkpoint, path, inside=0))

    @property
    def half_inline(self) -> Path:
        return self._made("half-inline.onnx", lambda path: _export(self.half_checkpoint, path, inline=True))

    @property
    def sampler(self) -> Path:
        """In two steps."""
        return self.exported(graph="sampler", steps=2)

    @property
    def half_sampler(self) -> Path:
        """In two steps, in fp16."""
        return self.exported(graph="sampler", steps=2, precision="fp16")

    @property
    def half_apart(self) -> Path:
        return self._made("half-apart.onnx", lambda path: _export(self.half_checkpoint, path, inside=0))

    @property
    def inline_apart(self) -> Path:
        return self._made("inline-apart.onnx", lambda path: _export(self.checkpoint, path, inline=True, inside=0))

    def exported(self, **how: Any) -> Path:
        """The checkpoint as `export.onnx` writes it with those options."""
        how = {key: value for key, value in how.items() if (key, value) != ("graph", "denoiser")}
        name = "-".join(f"{key}={value}" for key, value in sorted(how.items())).replace("/", "_").replace(" ", "")
        return self._made(f"{name or 'model'}.onnx", lambda path: _export(self.checkpoint, path, **how))

    def model(self) -> ConsistencyModel:
        return read_checkpoint(self.checkpoint).model()

    def _made(self, name: str, write: Callable[[Path], object]) -> Path:
        """The file, made by the first of pytest's workers that wants it."""
        session = self.factory.getbasetemp()
        folder = (session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / f"exported-{self.kind}"
        folder.mkdir(exist_ok=True)
        path = folder / name
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                write(path)
        return path


def _export(source: Path, target: Path, inside: int = to_onnx.LARGEST_INSIDE, **how: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "LARGEST_INSIDE", inside)
        export.onnx(read_checkpoint(source), target, **how)


def environment() -> dict[str, str]:
    """For subprocesses: this checkout is importable and nothing is a terminal."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1"}


def hiding(*packages: str) -> list[str]:
    """The start of a command line that runs cm-runtime where ``packages`` are not installed."""
    code = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {packages!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from cm_runtime.cli import main\n"
        "main()\n"
    )
    return [sys.executable, "-c", code]


def command(*arguments: object, cwd: Path, start: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m cm_runtime`` in a process of its own."""
    words = [*(start or [sys.executable, "-m", "cm_runtime"]), *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120)


def with_metadata(source: Path, target: Path, manifest: str) -> Path:
    """A copy of an exported file that tells another story about itself."""
    graph = onnx.load(source)
    onnx.helper.set_model_props(graph, {"cm_runtime": manifest})
    onnx.save(graph, target)
    return target


LAST, FIRST = "F.out.2.weight", "F.input_blocks.0.0.weight"  # convolutions


def with_weight(source: Path, target: Path, name: str, value: float, count: int | None = None) -> Path:
    """A copy of an exported file, the first ``count`` numbers of one of whose weights, or all of them, are another."""
    model = onnx.load(source)
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    array = onnx.numpy_helper.to_array(weight).copy()
    array.reshape(-1)[:count] = value
    weight.CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, target)
    return target


def without_finite(source: Path, target: Path) -> Path:
    """A sampler file as exports of before wrote it."""
    model = onnx.load(source)
    nodes = list(model.graph.node)
    del model.graph.output[1], model.graph.node[:]
    wanted, kept = {"images"}, []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    model.graph.node.extend(reversed(kept))
    onnx.save(model, target)
    return target


def copied(source: Path, folder: Path) -> Path:
    """A copy that a test may damage, with its data file if it has one."""
    if source.suffix == ".onnx" and (name := read_manifest(source).data_file):
        shutil.copy(source.with_name(name), folder / name)
    return Path(shutil.copy(source, folder / source.name))


def data_file(path: Path) -> Path:
    """The file that holds an export's weights."""
    name = read_manifest(path).data_file
    assert name
    return path.with_name(name)
