"""A fuzz target for each reader of files: real files to begin with, and what reads them."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import Progress

TARGETS: dict[str, Target] = {}
RANDOM = np.random.default_rng(7)


@dataclass(frozen=True)
class Target:
    """make: writes real files, or folders of them, into an empty folder; read: of one of them, changed."""

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    mutates: Callable[[Path], bool] = lambda part: True


def target(make: Callable[[Path], object], mutates: Callable[[Path], bool] = lambda part: True) -> Any:
    """Registers a reader under its name."""

    def register(read: Callable[[Path], object]) -> Callable[[Path], object]:
        name = read.__name__.strip("_")
        TARGETS[name] = Target(name, make, read, mutates)
        return read

    return register


# Exported files


def _exports(folder: Path) -> None:
    from exports import checkpoint

    from cm_runtime import export

    export.onnx(checkpoint("boundary"), folder / "boundary.onnx")
    export.onnx(checkpoint("edm"), folder / "inline.onnx", inline=True)
    export.onnx(checkpoint("boundary"), folder / "sampler.onnx", graph="sampler", steps=2)


@target(_exports)
def manifest(path: Path) -> None:
    from cm_runtime.manifest import read_manifest
    from cm_runtime.onnx_graph.export_writer import write_manifest

    write_manifest(path, path.with_name("copy.onnx"), read_manifest(path), force=True)


def _draw(path: Path, engine: Any) -> None:
    import cm_runtime as cm

    model = cm.load(path, backend=engine, device="cpu", threads=1)
    steps = model.manifest.steps if model.manifest.graph == "sampler" else 2
    images = cm.sample(model, count=3, steps=steps)
    assert images.shape[0] == 3 and images.dtype == np.uint8


@target(_exports)
def onnxruntime(path: Path) -> None:
    _draw(path, "ort")


@target(_exports)
def openvino(path: Path) -> None:
    _draw(path, "openvino")


def _extractors(folder: Path) -> None:
    from extractors import OURS, linear

    linear(folder / "own.onnx", metadata=json.dumps(OURS))
    linear(folder / "fixed.onnx", shape=(4, 8, 8, 1))


@target(_extractors)
def extractor(path: Path) -> None:
    from cm_runtime.evaluate.extractor import Extractor

    made = Extractor(path, device="cpu", threads=1)
    made(np.zeros((3, 8, 8, made.channels), np.uint8))


@target(_exports)
def flops(path: Path) -> None:
    from cm_runtime.bench.flops import gflop

    if path.name != "sampler.onnx":
        gflop(path)


# Checkpoints


def _ours(folder: Path) -> None:
    from exports import checkpoint, halved

    from cm_runtime.checkpoints.native import save_checkpoint

    save_checkpoint(checkpoint("boundary"), folder / "full.pt")
    save_checkpoint(halved(checkpoint("edm")), folder / "half.pt")


@target(_ours)
def checkpoint(path: Path) -> None:
    from cm_runtime.checkpoints.load import load_checkpoint
    from cm_runtime.cli.info import info

    load_checkpoint(path).model()
    info(path)


def _openai(folder: Path) -> None:
    import torch

    from cm_runtime.networks.unet import UNet, UNetConfig

    config = UNetConfig(
        image_size=16,
        image_channels=3,
        num_classes=7,
        channels=32,
        channel_mult=(1, 2),
        res_blocks=1,
        attention=(8,),
        head_channels=16,
        resample="resblock",
    )
    torch.manual_seed(0)
    weights = UNet(config).state_dict()
    torch.save(weights, folder / "zip.pt")
    torch.save(weights, folder / "legacy.pt", _use_new_zipfile_serialization=False)


@target(_openai)
def openai(path: Path) -> None:
    from cm_runtime.checkpoints.load import load_checkpoint

    load_checkpoint(path, precond="boundary", head_channels=16, image_size=16).model()


def _trees(folder: Path) -> None:
    """Content of our checkpoints, as JSON: `contents` puts the tensors in."""
    from exports import checkpoint

    made = checkpoint("boundary")
    content = {
        "config": made.config.model_dump(mode="json"),
        "default_ema": made.default_ema,
        "ema": {"0.999": {name: list(tensor.shape) for name, tensor in made.ema["0.999"].items()}},
        "training": made.training.model_dump(mode="json"),
        "sigmas": {"2": [80.0, 1.5]},
    }
    (folder / "content.json").write_text(json.dumps(content))


@target(_trees)
def contents(path: Path) -> None:
    """Checkpoints that torch reads and whose content is another."""
    import torch

    from cm_runtime.checkpoints.load import load_checkpoint
    from cm_runtime.checkpoints.native import FORMAT

    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    if not isinstance(content, dict):
        return
    random = Random(path.read_bytes())
    weights = content.get("ema", {}).get("0.999", {}) if isinstance(content.get("ema"), dict) else {}
    for name, shape in weights.items() if isinstance(weights, dict) else ():
        with_shape = isinstance(shape, list) and len(shape) < 5 and all(type(n) is int and 0 < n < 999 for n in shape)
        weights[name] = torch.zeros(shape) if with_shape else shape
        if random.random() < 0.003:
            odd = torch.zeros(1).expand(1000, 1000), torch.zeros(3, dtype=torch.int8), torch.eye(3).to_sparse()
            weights[name] = random.choice([*odd, torch.full((2,), torch.nan), torch.zeros(2, device="meta")])
    if isinstance(content.get("sigmas"), dict):
        content["sigmas"] = {int(k) if k.isdigit() and len(k) < 9 else k: v for k, v in content["sigmas"].items()}
    file = path.with_name("content.pt")
    try:
        torch.save({"format": FORMAT, **content}, file)
    except (RecursionError, ValueError, OverflowError, UnicodeError, RuntimeError):
        return  # what torch itself does not write
    load_checkpoint(file).model()


def _safetensors(folder: Path) -> None:
    from exports import checkpoint
    from safetensors.torch import save_file

    save_file(dict(checkpoint("boundary").ema["0.999"]), folder / "model.safetensors")


@target(_safetensors)
def safetensors(path: Path) -> None:
    from cm_runtime.checkpoints.native import load_safetensors

    for tensor in load_safetensors(path).values():
        tensor.float().sum()


def _diffusers(folder: Path) -> None:
    from foreign import GREY, save_pipeline

    save_pipeline(folder / "whole", GREY)
    save_pipeline(folder / "parts", GREY, max_shard_size="200KB")


@target(_diffusers, mutates=lambda part: part.suffix == ".json" or part.stat().st_size < 300_000)
def diffusers(path: Path) -> None:
    from cm_runtime.checkpoints.load import load_checkpoint

    load_checkpoint(path).model()


# Arrays, pictures and data sets


def _arrays(folder: Path) -> None:
    images = RANDOM.integers(0, 256, (5, 8, 8, 3), np.uint8)
    np.savez(folder / "stored.npz", arr_0=images, arr_1=np.arange(5))
    np.savez_compressed(folder / "deflated.npz", arr_0=images.astype(np.float32) / 128 - 1, arr_1=np.arange(5))
    np.savez(folder / "named.npz", images=images, labels=np.arange(5))


@target(_arrays)
def data_npz(path: Path) -> None:
    from cm_runtime.training.data.npz import read_npz

    if path.name == "named.npz":
        read_npz(path, "named")


@target(_arrays)
def samples_npz(path: Path) -> None:
    from cm_runtime.evaluate.sources import is_samples, open_samples

    if path.name == "stored.npz":
        is_samples(path)
        for _ in open_samples(path).batches():
            pass


@target(_arrays)
def edited_npz(path: Path) -> None:
    from cm_runtime.files import inputs

    if path.name != "named.npz":
        inputs.read([path], 3, [(8, 8)])


def _statistics(folder: Path) -> None:
    from cm_runtime.evaluate.statistics import Statistics, write_statistics

    write_statistics(folder / "own.npz", Statistics(np.zeros(5), np.eye(5), 77, "ab" * 32))
    np.savez(folder / "foreign.npz", mu=np.ones(5), sigma=np.eye(5))


@target(_statistics)
def statistics(path: Path) -> None:
    from cm_runtime.evaluate.frechet import frechet_distance
    from cm_runtime.evaluate.statistics import is_statistics, read_statistics

    is_statistics(path)
    read = read_statistics(path)
    if len(read.mean) == 5:
        frechet_distance((read.mean, read.covariance), (np.zeros(5), np.eye(5)))


def _pictures(folder: Path) -> None:
    colour = Image.fromarray(RANDOM.integers(0, 256, (12, 9, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for ending in ("png", "jpg", "webp", "bmp"):
        colour.save(folder / f"colour.{ending}", exif=exif)
        colour.convert("L").save(folder / f"grey.{ending}")
    colour.convert("P").save(folder / "palette.png")
    colour.convert("RGBA").save(folder / "alpha.png")
    colour.save(folder / "progressive.jpg", progressive=True)
    colour.convert("CMYK").save(folder / "cmyk.jpg")


@target(_pictures)
def pictures(path: Path) -> None:
    from cm_runtime.errors import CmRuntimeError
    from cm_runtime.files import image_reader as reader
    from cm_runtime.files import inputs

    for read in (reader.is_grey, reader.size_of, lambda file: inputs.read_mask(file, [], (12, 9))):
        try:
            read(path)
        except CmRuntimeError as error:
            assert "\n" not in str(error)
    reader.read(path, 3)
    reader.read(path, 1, (8, 8))


def _pictures_of_classes(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / "data" / name).mkdir(parents=True)
        for n in range(2):
            Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / "data" / name / f"{n}.png")


@target(_pictures_of_classes)
def picture_folder(path: Path) -> None:
    from cm_runtime.training.data.folder import read_folder

    read_folder(path, "train", "data", image_size=8, bar=Progress(disable=True))


def _idx(folder: Path) -> None:
    head = b"\0\0\x08"
    images = head + b"\x03" + np.array([3, 28, 28], ">u4").tobytes() + bytes(RANDOM.integers(0, 256, 3 * 784, np.uint8))
    (folder / "images").write_bytes(images)
    (folder / "images.gz").write_bytes(gzip.compress(images, mtime=0))
    (folder / "images.xz").write_bytes(lzma.compress(images))


@target(_idx)
def idx(path: Path) -> None:
    from cm_runtime.training.data.idx import read_idx_images

    read_idx_images(path, "idx")


def _cifar(folder: Path) -> None:
    record = lambda label: bytes([label]) + RANDOM.bytes(3072)  # noqa: E731
    for packed in ("tar", "tar.gz"):
        with tarfile.open(folder / f"cifar.{packed}", f"w:{packed[4:]}") as archive:
            for n in range(1, 6):
                info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{n}.bin")
                content = record(n)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@target(_cifar)
def cifar(path: Path) -> None:
    from cm_runtime.training.data.cifar import read_cifar_archive

    read_cifar_archive(path, "train", "cifar")


# Text


def _configs(folder: Path) -> None:
    from cm_runtime.training.config import PRESETS

    for preset in sorted(PRESETS.glob("*.toml"))[::6]:
        shutil.copyfile(preset, folder / preset.name)


@target(_configs)
def config(path: Path) -> None:
    from cm_runtime.training.config import load_config

    load_config(path)


@target(_configs)
def settings(path: Path) -> None:
    """A line of the file, as --set takes it."""
    from cm_runtime.training.config import load_config

    lines = [line for line in path.read_bytes().decode(errors="replace").splitlines() if "=" in line]
    if lines:
        line = Random(path.read_bytes()).choice(lines).replace(" = ", "=")
        if path.read_bytes() not in [each.read_bytes() for each in Path(path.parents[1] / "seeds").glob("*")]:
            load_config("fashion-mnist-tiny", [Random(line).choice(("", "phase.0.", "network.")) + line])


def _suites(folder: Path) -> None:
    from cm_runtime.bench import scenario

    for suite in Path(scenario.__file__).parent.glob("suites/*.toml"):
        shutil.copyfile(suite, folder / suite.name)


@target(_suites)
def suite(path: Path) -> None:
    from cm_runtime.bench.scenario import read_suite

    suite = read_suite(str(path))
    suite.scenarios()
    suite.scenarios(quick=True)


def _results(folder: Path) -> None:
    root = Path(__file__).parents[2]
    for n, result in enumerate(sorted((root / "benchmarks" / "results").glob("**/*.json"))):
        if b'"scenarios"' in result.read_bytes() and result.stat().st_size < 500_000:
            shutil.copyfile(result, folder / f"{n}.json")


@target(_results)
def results(path: Path) -> None:
    from cm_runtime.bench import compare
    from cm_runtime.bench import results as reader
    from cm_runtime.bench.report import markdown
    from cm_runtime.errors import CmRuntimeError

    late = reader.read(path)
    original = next(each for each in (path.parents[1] / "seeds").iterdir() if each.name == path.name)
    for act in (
        lambda: compare.compare_builds(late, 0.05),
        lambda: compare.compare_runs(reader.read(original), late, 0.05, allow_different=True),
        lambda: compare.compare_runs(late, reader.read(original), 0.05, allow_different=True),
        lambda: markdown.summary(late),
    ):
        try:
            act()
        except CmRuntimeError as error:
            assert "\n" not in str(error)


def _engines(folder: Path) -> None:
    from cm_runtime.backends.batch_profiles import Profile
    from cm_runtime.backends.engine_file import EngineManifest, manifest_path
    from cm_runtime.manifest import Manifest

    model = Manifest(graph="denoiser", image_shape=(1, 3, 7), num_classes=0, precond="boundary", sigma_boundary=0.002)
    made = EngineManifest(
        sha256="0" * 64,
        bytes=4,
        package="tensorrt_rtx",
        version="1.7.1.116",
        gpus=("8.9",),
        profiles=(Profile(min=1, opt=8, max=16),),
        model=model,
        onnx_sha256="0" * 64,
        plugin=False,
        log="model.engine.log",
    )
    home = folder / "engine"
    home.mkdir()
    (home / "model.engine").write_bytes(b"1234")
    manifest_path(home / "model.engine").write_text(made.model_dump_json())


@target(_engines, mutates=lambda part: part.suffix == ".json")
def engine_manifest(path: Path) -> None:
    from cm_runtime.backends.engine_file import read_engine_manifest

    read_engine_manifest(path / "model.engine")


# Folders of ours


def _shard_folders(folder: Path) -> None:
    from cm_runtime.cli import main

    for kind in ("npz", "png", "wds", "parquet"):
        words = ["sample", "--count", "5", "--shard-size", "3", "--shards", kind, "--backend", "ort", "--threads", "1"]
        try:
            main([*words, "--device", "cpu", "--micro-batch", "3", "-o", f"{folder}/{kind}/"])
        except SystemExit as end:
            assert not end.code


@target(_shard_folders)
def shards(path: Path) -> None:
    from cm_runtime.generation import job

    read = job.load_job(path)
    if read is not None:
        job.missing_shards(read, path)


def _runs(folder: Path) -> None:
    data = folder.parent / "data.npz"
    np.savez(data, images=np.full((8, 4, 4, 1), 100, np.uint8))
    _train(data, folder / "run")


def _train(data: Path, out: Path, resume: bool = False) -> None:
    from cm_runtime.training.config import parse_config
    from cm_runtime.training.data import open_data
    from cm_runtime.training.loop import train

    phase = {"method": "edm", "steps": 2, "batch": 4, "learning_rate": 1e-3, "ema": [0.5]}
    network = {"channels": 32, "channel_mult": [1], "res_blocks": 1, "head_channels": 32}
    tree = {"data": {"source": str(data)}, "network": network, "phase": [phase], "device": "cpu", "tensorboard": False}
    train(parse_config(tree, "toy"), open_data(data), out, resume=resume)


@target(_runs, mutates=lambda part: part.name in ("state.pt", "run.json", "log.jsonl"))
def run_folder(path: Path) -> None:
    _train(path.parents[1] / "data.npz", path, resume=True)


def _wheels(folder: Path) -> None:
    with zipfile.ZipFile(folder / "cm_runtime-0.1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for name in ("__init__.py", "cli/__init__.py"):
            wheel.writestr(f"cm_runtime/{name}", '__version__ = "0.1.0"\n')
        wheel.writestr("cm_runtime-0.1.0.dist-info/METADATA", "Name: cm-runtime\n")


@target(_wheels)
def wheel(path: Path) -> None:
    from cm_runtime.bench.builds import base_build

    work = path.with_name("work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    base_build(str(path), work)


def _choices(folder: Path) -> None:
    (folder / "choice.json").write_text(json.dumps({"seconds": {"ort": 0.1, "openvino": 0.2}, "batch": 8}))


@target(_choices)
def choice(path: Path) -> None:
    """What auto remembers: whatever is there, it is taken or measured anew."""
    from cm_runtime.backends import DEFAULT_MODEL, auto, measurements
    from cm_runtime.manifest import read_manifest

    question = auto.question(DEFAULT_MODEL, read_manifest(DEFAULT_MODEL), "cpu")
    kept = Path(os.environ["XDG_CACHE_HOME"]) / "cm-runtime" / "engines" / f"{question.key}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, kept)
    measurements.load(question)


def _words(folder: Path) -> None:
    words = [
        "80,1.4",
        "all",
        "random",
        "0,1,2",
        "3:100,7:50",
        "1:8:16",
        "5%",
        "auto",
        "64",
        "22,0",
        "-1:1",
        "8,10,12,12",
    ]
    (folder / "words").write_text("\n".join(words))


@target(_words)
def options(path: Path) -> None:
    """Values of options, each as every parser takes it."""
    from cm_runtime.backends import DEFAULT_MODEL
    from cm_runtime.backends.batch_profiles import parse_profiles
    from cm_runtime.cli import parsing
    from cm_runtime.cli.options import DrawFlags
    from cm_runtime.errors import CmRuntimeError
    from cm_runtime.manifest import read_manifest

    m = read_manifest(DEFAULT_MODEL)
    for word in path.read_bytes().decode(errors="replace").split("\n"):
        for parse in (
            parsing.labels,
            lambda text: parsing.numbers("--sigmas", text),
            lambda text: DrawFlags(ts=text, grid=40).levels(m),
            lambda text: DrawFlags(timesteps=text, grid=40).levels(m),
            lambda text: parsing.micro_batch(text, 256, 64),
            lambda text: parsing.share("--fail-above", text),
            parse_profiles,
        ):
            try:
                parse(word)
            except CmRuntimeError as error:
                assert "\n" not in str(error)
