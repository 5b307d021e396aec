"""Everything that can go wrong on the command line is one clear line and exit 1, with nothing half-written."""

import gzip
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from cm_runtime.backends.base import EngineOptions
from cm_runtime.cli import image_sources, main
from cm_runtime.cli.options import DrawFlags
from cm_runtime.errors import ArtifactError, EngineError
from cm_runtime.files.locks import claim

Cli = Callable[..., Any]
LONG = "x" * 100_000
Words = list[object]


@pytest.fixture
def place(boundary: exports.Files, tmp_path: Path) -> Path:
    """The folder that `cli` works in, with a model and a checkpoint of somebody's."""
    exports.copied(boundary.onnx, tmp_path)
    exports.copied(boundary.checkpoint, tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Files that are wrong


class Malice:
    """Pickled, it makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def truncated(folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    (folder / "cut.onnx").write_bytes(content[: len(content) // 2])


def foreign(folder: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph), folder / "foreign.onnx")


def plain_pickle(folder: Path) -> None:
    (folder / "evil.pt").write_bytes(pickle.dumps(Malice()))


def pickle_in_zip(folder: Path) -> None:
    torch.save({"format": "cm-runtime checkpoint 1", "config": Malice()}, folder / "evil.pt")


def corrupt_idx(folder: Path) -> None:
    (folder / "data").mkdir()
    images = struct.pack(">4I", 0x803, 60, 8, 8) + bytes(60 * 64 - 1)
    with gzip.open(folder / "data" / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(images)
    (folder / "data" / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 60) + bytes(60))


def broken_gzip(folder: Path) -> None:
    corrupt_idx(folder)
    path = folder / "data" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-10])


def unreadable_picture(folder: Path) -> None:
    (folder / "data").mkdir()
    for name in "ab":
        Image.fromarray(np.full((8, 8), 7, np.uint8)).save(folder / "data" / f"{name}.png")
    (folder / "data" / "c.png").write_bytes(b"\x89PNG\r\n\x1a\nand then nothing")


def nothing(folder: Path) -> None:
    pass


TRAIN: Words = ["train", "fashion-mnist", "--data", "data", "--out", "run"]
# name: (what is made beforehand, the command, what the line must say)
WRONG_FILES: dict[str, tuple[Callable[[Path], None], Words, str]] = {
    "no such model": (nothing, ["sample", "no.onnx"], "no.onnx: no such model"),
    "no such checkpoint": (nothing, ["sample", "no.pt"], "no.pt: no such model"),
    "info of no such file": (nothing, ["info", "no.onnx"], "no.onnx: no such file"),
    "info of no such checkpoint": (nothing, ["info", "no.pt"], "no.pt: no such file"),
    "export of no such checkpoint": (nothing, ["export", "no.pt"], "no.pt: no such file"),
    "truncated onnx": (truncated, ["sample", "cut.onnx"], "cut.onnx is not an ONNX file, or is truncated"),
    "info of truncated onnx": (truncated, ["info", "cut.onnx"], "cut.onnx is not an ONNX file, or is truncated"),
    "foreign onnx": (foreign, ["sample", "foreign.onnx"], "foreign.onnx was not exported by cm-runtime"),
    "info of foreign onnx": (foreign, ["info", "foreign.onnx"], "cm-runtime export CHECKPOINT"),
    "pickle": (plain_pickle, ["sample", "evil.pt"], "evil.pt is a pickle"),
    "pickle in a checkpoint": (pickle_in_zip, ["sample", "evil.pt"], "evil.pt is a pickle"),
    "export of a pickle": (pickle_in_zip, ["export", "evil.pt"], "evil.pt is a pickle"),
    "info of a pickle": (pickle_in_zip, ["info", "evil.pt"], "evil.pt is a pickle"),
    "corrupt IDX": (corrupt_idx, TRAIN, "train-images-idx3-ubyte.gz"),
    "broken gzip": (broken_gzip, TRAIN, "train-images-idx3-ubyte.gz"),
    "unreadable picture": (unreadable_picture, TRAIN, "c.png"),
    "no such data": (nothing, TRAIN, "data"),
    "no such preset": (nothing, ["train", "celebrities"], "fashion-mnist"),
    "no such config": (nothing, ["train", "no.toml"], "no.toml"),
    "a folder of images": (
        nothing,
        ["train", "."],
        ". is a folder: name a preset or a TOML file",
    ),
    "an unknown key": (nothing, [*TRAIN, "--set", "colour=1"], "colour"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_is_one_line_and_nothing_is_written(cli: Cli, place: Path, name: str) -> None:
    make, words, message = WRONG_FILES[name]
    make(place)
    before = contents(place)
    outcome = cli(*words)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert contents(place) == before
    assert not (place / "pwned").exists()
    assert not (place / "run").exists()


# Requests that are wrong

WRONG_REQUESTS: dict[str, tuple[Words, str]] = {
    "no steps": (["--steps", 0], "steps must be from 1 to 1000, not 0"),
    "negative steps": (["--steps", -1], "steps must be from 1 to 1000, not -1"),
    "endless steps": (["--steps", 1001], "steps must be from 1 to 1000, not 1001"),
    "steps and sigmas": (["--steps", 2, "--sigmas", "80,1"], "steps or sigmas, not both"),
    "sigmas ascending": (["--sigmas", "80,1,2"], "descend"),
    "sigmas equal": (["--sigmas", "80,1,1"], "descend"),
    "sigmas from below": (["--sigmas", "70,1"], "sigma_max 80"),
    "sigmas from above": (["--sigmas", "81,1"], "sigma_max 80"),
    "sigma at the bottom": (["--sigmas", "80,0.002"], "above the model's sigma_min 0.002"),
    "sigma zero": (["--sigmas", "80,0"], "above the model's sigma_min"),
    "sigma negative": (["--sigmas", "80,-1"], "above the model's sigma_min"),
    "sigma NaN": (["--sigmas", "80,nan"], "descend"),
    "first sigma NaN": (["--sigmas", "nan"], "sigma_max"),
    "sigma infinite": (["--sigmas", "inf,1"], "sigma_max"),
    "sigmas words": (["--sigmas", "a,b"], "numbers separated by commas, not 'a,b'"),
    "sigmas empty": (["--sigmas", ""], "numbers separated by commas"),
    "sigmas with a gap": (["--sigmas", "80,,1"], "numbers separated by commas"),
    "ts and steps": (["--ts", "0,39", "--grid", 40, "--steps", 1], "give steps or ts, not both"),
    "ts and sigmas": (["--ts", "0,39", "--grid", 40, "--sigmas", "80"], "give sigmas or ts, not both"),
    "ts and timesteps": (["--ts", "0,39", "--grid", 40, "--timesteps", "0"], "give ts or timesteps, not both"),
    "timesteps and steps": (["--timesteps", "0", "--grid", 40, "--steps", 1], "give steps or timesteps, not both"),
    "timesteps and sigmas": (["--timesteps", "0", "--sigmas", "80"], "give sigmas or timesteps, not both"),
    "three ways at once": (["--ts", "0,39", "--sigmas", "80", "--steps", 1], "steps or sigmas or ts, only one of them"),
    "ts without a grid": (["--ts", "0,39"], "--ts needs --grid, the points of the model's training grid: 40 for"),
    "timesteps without a grid": (["--timesteps", "0"], "--timesteps needs --grid"),
    "a grid alone": (["--grid", 40], "--grid is what --ts or --timesteps count in"),
    "a grid and steps": (["--grid", 40, "--steps", 2], "--grid is what --ts or --timesteps count in"),
    "a grid and sigmas": (["--grid", 40, "--sigmas", "80,1"], "--grid is what --ts or --timesteps count in"),
    "a grid of one": (["--ts", "0,0", "--grid", 1], "grid must be from 2 to 1000000 points, not 1"),
    "a grid of none": (["--timesteps", "0", "--grid", 0], "grid must be from 2 to 1000000 points, not 0"),
    "a negative grid": (["--ts", "0,1", "--grid", -2], "grid must be from 2 to 1000000 points, not -2"),
    "a grid too large": (["--ts", "0,39", "--grid", 1_000_001], "from 2 to 1000000 points, not 1000001"),
    "an endless grid": (["--timesteps", "0", "--grid", 10**30], "from 2 to 1000000 points"),
    "ts that stop early": (
        ["--ts", "0,22", "--grid", 40],
        "ts must end at 39, the grid's last; ending at 22 would leave",
    ),
    "ts of another grid": (["--ts", "0,22,39", "--grid", 201], "ts must end at 200"),
    "ts that start late": (["--ts", "5,39", "--grid", 40], "ts must start at 0, the first noise level being sigma_max"),
    "ts descending": (["--ts", "22,0", "--grid", 40], "are what --timesteps takes"),
    "ts equal": (["--ts", "0,22,22,39", "--grid", 40], "ascend strictly; 22 follows 22"),
    "ts in disorder": (["--ts", "0,30,22,39", "--grid", 40], "ascend strictly; 22 follows 30"),
    "ts of one index": (["--ts", "0", "--grid", 40], "at least two indices"),
    "ts beyond the grid": (["--ts", "0,22,40", "--grid", 40], "from 0 to 39, not 40"),
    "ts negative": (["--ts", "-1,22,39", "--grid", 40], "from 0 to 39, not -1"),
    "ts words": (["--ts", "a,b", "--grid", 40], "--ts takes whole numbers separated by commas, not 'a,b'"),
    "ts fractions": (["--ts", "0,22.5,39", "--grid", 40], "--ts takes whole numbers separated by commas"),
    "ts empty": (["--ts", "", "--grid", 40], "--ts takes whole numbers separated by commas, not ''"),
    "ts with a gap": (["--ts", "0,,39", "--grid", 40], "--ts takes whole numbers separated by commas"),
    "ts with a line break": (["--ts", "0\n,x", "--grid", 40], "--ts takes whole numbers separated by commas"),
    "timesteps short of 0": (["--timesteps", "22,1", "--grid", 40], "timesteps must end at 0"),
    "timesteps ascending": (["--timesteps", "0,22,39", "--grid", 40], "are what --ts takes"),
    "timesteps equal": (["--timesteps", "22,22,0", "--grid", 40], "descend strictly; 22 follows 22"),
    "timesteps in disorder": (["--timesteps", "22,30,0", "--grid", 40], "descend strictly; 30 follows 22"),
    "timesteps with the terminal": (["--timesteps", "39,22,0", "--grid", 40], "must leave out 39, the grid's last"),
    "timesteps beyond the grid": (["--timesteps", "40,0", "--grid", 40], "from 0 to 39, not 40"),
    "timesteps negative": (["--timesteps", "22,-1", "--grid", 40], "from 0 to 39, not -1"),
    "timesteps words": (["--timesteps", "x", "--grid", 40], "--timesteps takes whole numbers separated by commas"),
    "timesteps fractions": (["--timesteps", "22.0,0", "--grid", 40], "--timesteps takes whole numbers"),
    "timesteps too many": (["--timesteps", "0" * 5000, "--grid", 40], "--timesteps takes whole numbers"),
    "label too large": (["--labels", 5], "from 0 to 4, not 5"),
    "label in a list": (["--labels", "0,1,9"], "from 0 to 4, not 9"),
    "label negative": (["--labels=-1"], "from 0 to 4, not -1"),
    "label enormous": (["--labels", 10**30], "from 0 to 4"),
    "labels words": (["--labels", "x"], "not 'x'"),
    "labels empty": (["--labels", ""], "not ''"),
    "labels fraction": (["--labels", "1.5"], "not '1.5'"),
    "no batch": (["--batch", 0], "--batch must be at least 1, not 0"),
    "negative batch": (["--batch", -3], "--batch must be at least 1, not -3"),
    "no images": (["--count", 0], "count must be at least 1, not 0"),
    "fewer than no images": (["--count", -1], "count must be at least 1, not -1"),
    "no micro-batch": (["--micro-batch", 0], "micro-batch must be from 1 to 65536, not 0"),
    "negative micro-batch": (["--micro-batch", -1], "micro-batch must be from 1 to 65536, not -1"),
    "micro-batch a word": (["--micro-batch", "x"], "not 'x'"),
    "no threads": (["--threads", 0], "--threads must be at least 1, not 0"),
    "negative threads": (["--threads", -1], "--threads must be at least 1, not -1"),
    "endless threads": (["--threads", 1 << 40], "threads"),
    "negative seed": (["--seed", -1], "seed must be from 0 to 2^64-1, not -1"),
    "seed too large": (["--seed", 2**64], "seed must be from 0 to 2^64-1"),
    "negative start": (["--start", -1], "from 0 to 2^64-1"),
    "start overflows": (["--start", 2**64 - 255], "from 0 to 2^64-1"),
    "backend of checkpoints": (["--backend", "torch"], "checkpoints"),
    "unknown device": (["--device", "gpu"], "auto, cpu or cuda:N, not gpu"),
    "a picture too large": (["--count", 10**9], "write more with -o NAME.npz"),
    "float picture": (["--float"], "give -o NAME.npz"),
    "no memory": (["--count", 10**18, "--batch", 10**18, "--micro-batch", 10**18, "-o", "x.npz"], "micro-batch"),
}


@pytest.mark.parametrize("name", WRONG_REQUESTS)
def test_a_wrong_request_is_one_line_and_nothing_is_written(cli: Cli, place: Path, name: str) -> None:
    words, message = WRONG_REQUESTS[name]
    before = contents(place)
    outcome = cli("sample", "model.onnx", "-o", "x.png", *words)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert contents(place) == before


# name: (the options, what the line must say)
WRONG_SHARDS: dict[str, tuple[Words, str]] = {
    "shards in a picture": (
        ["-o", "x.png", "--shards", "wds"],
        "--shards is for a folder of shards, which x.png is not",
    ),
    "shards in arrays": (["-o", "x.npz", "--shards", "npz"], "--shards is for a folder of shards, which x.npz is not"),
    "shard size of a picture": (
        ["--shard-size", 3],
        "--shard-size is for a folder of shards, which samples.png is not",
    ),
    "no images in a shard of a picture": (["--shard-size", 0], "--shard-size is for a folder of shards"),
    "force of a picture": (["--force"], "--force is for a folder of shards"),
    "runner of a picture": (["--runner", "local"], "--runner is for a folder of shards"),
    "address of a picture": (["--ray-address", "auto"], "--ray-address is for a folder of shards"),
    "no images in a shard": (["-o", "out/", "--shard-size", 0], "--shard-size must be at least 1, not 0"),
    "an address without ray": (["-o", "out/", "--ray-address", "a:1"], "--ray-address is for --runner ray"),
    "a batch": (["-o", "out/", "--batch", 3], "give --count and --micro-batch, not --batch"),
    "floats in pictures": (["-o", "out/", "--shards", "wds", "--float"], "--float is for --shards npz, not wds"),
    "too many shards": (["-o", "out/", "--count", 10**15], "more than 1000000; give a larger --shard-size"),
    "no images": (["-o", "out/", "--count", 0], "count must be at least 1, not 0"),
    "no micro-batch": (["-o", "out/", "--micro-batch", 0], "micro-batch must be from 1 to 65536, not 0"),
    "past the last index": (["-o", "out/", "--start", 2**64 - 255], "from 0 to 2^64-1"),
    "a folder in no folder": (["-o", "missing/out/"], "there is no folder missing"),
    "a folder that is a file": (["-o", "model.onnx/"], "model.onnx"),
    "a folder in a file": (["-o", "model.onnx/out/"], "cannot be written"),
    "a folder nobody may make": (["-o", "/proc/out/"], "/proc/out"),
}


@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [
        ("--backend", "magic", "'tensorrt', 'tensorrt-rtx'"),
        ("--precision", "fp8", "'auto', 'fp32', 'tf32', 'bf16', 'fp16'"),
        ("--shards", "zip", "'npz', 'png', 'wds', 'parquet'"),
        ("--runner", "slurm", "'local', 'ray'"),
    ],
)
def test_what_is_no_choice_is_a_usage_error(cli: Cli, place: Path, option: str, value: str, choices: str) -> None:
    before = contents(place)
    outcome = cli("sample", "model.onnx", option, value)
    text = " ".join(outcome.err.replace("\u2502", " ").split())
    assert outcome.code == 2 and choices in text and f"'{value}'" in text
    assert contents(place) == before


@pytest.mark.parametrize("name", WRONG_SHARDS)
def test_shards_that_cannot_be_are_one_line_and_nothing_is_written(cli: Cli, place: Path, name: str) -> None:
    words, message = WRONG_SHARDS[name]
    before = contents(place)
    outcome = cli("sample", "model.onnx", *words)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert contents(place) == before
    assert not (place / "out").exists()


@pytest.mark.process
def test_a_folder_of_another_job_or_run_is_refused(cli: Cli, place: Path) -> None:
    options = ("sample", "model.onnx", "--count", 3, "--steps", 1, "-o", "out/")
    assert cli(*options).code == 0
    before = contents(place)
    outcome = cli(*options, "--seed", 2)
    assert outcome.err == "error: out holds another job: its seed is 0, not 2; give another folder, or --force\n"
    with claim(place / "out"):
        outcome = cli(*options)
    assert outcome.err == "error: out: another run is at work in it; wait for its end, or give another\n"
    (place / "out" / "shard-000000.npz").write_bytes(b"PK")
    outcome = cli(*options)
    assert "out/shard-000000.npz: is not the whole shard of that name" in outcome.err
    assert outcome.err.count("\n") == 1
    (place / "out" / "shard-000000.npz").unlink()
    assert cli(*options).code == 0
    assert contents(place) == before


@pytest.mark.process
def test_labels_for_a_model_without_classes_are_refused(cli: Cli, grey: exports.Files) -> None:
    for labels in ("all", "0", "random"):
        outcome = cli("sample", grey.onnx, "--labels", labels)
        assert (outcome.code, outcome.err) == (1, "error: this model has no classes; leave the labels out\n")


@pytest.mark.process
def test_a_teacher_is_refused(cli: Cli, place: Path) -> None:
    manifest = json.loads(onnx.load(place / "model.onnx").metadata_props[0].value)
    manifest["training"]["method"] = "edm"
    exports.with_metadata(place / "model.onnx", place / "teacher.onnx", json.dumps(manifest))
    outcome = cli("sample", "teacher.onnx")
    assert outcome.code == 1
    assert "EDM teacher" in outcome.err
    assert not (place / "samples.png").exists()


def test_weights_that_make_nonsense_write_no_picture(cli: Cli, place: Path) -> None:
    graph = onnx.load(place / "model.onnx")
    (bias,) = [weight for weight in graph.graph.initializer if weight.name.endswith("out.2.bias")]
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(tuple(bias.dims), np.nan, np.float32), bias.name))
    onnx.save(graph, place / "nan.onnx")
    before = contents(place)
    for name in ("x.png", "x.npz"):
        outcome = cli("sample", "nan.onnx", "--count", 3, "-o", name)
        assert outcome.code == 1
        assert "not finite" in outcome.err
        assert outcome.err.count("\n") == 1
    assert contents(place) == before


@pytest.mark.process
@pytest.mark.parametrize("engine", ["ort", "openvino", "auto"])
def test_a_sampler_that_makes_nonsense_writes_nothing(
    cli: Cli, boundary: exports.Files, tmp_path: Path, engine: str
) -> None:
    exports.with_weight(boundary.sampler, tmp_path / "nan.onnx", exports.LAST, np.nan, 1)
    before = contents(tmp_path)
    for words in (("-o", "x.png"), ("-o", "x.npz"), ("-o", "shards/", "--shards", "npz")):
        outcome = cli("sample", "nan.onnx", "--count", 3, "--backend", engine, *words)
        assert (outcome.code, outcome.out) == (1, "")
        assert outcome.err.splitlines()[-1].startswith("error: the model's output is not finite")
        assert not [name for name in contents(tmp_path) if name.endswith((".png", ".npz"))]
    assert contents(tmp_path).keys() - before.keys() <= {"shards/manifest.json"}  # of a job that may be resumed
    with pytest.raises(EngineError, match="not finite"):  # what eval measures
        list(
            image_sources.draw_images(
                tmp_path / "nan.onnx", DrawFlags(count=8), EngineOptions(engine, "cpu", threads=1)
            ).batches
        )


# Outputs that cannot be written


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("x.jpg", "ends in .png (a grid) or .npz (arrays)"),
        ("x", "ends in .png (a grid) or .npz (arrays)"),
        (".npz", "ends in .png (a grid) or .npz (arrays)"),
        ("missing/x.png", "there is no folder missing"),
        ("missing/x.npz", "there is no folder missing"),
        ("model.onnx/x.png", "cannot be written"),
        ("folder.png", "folder.png is a folder"),
        ("/proc/x.png", "/proc/x.png cannot be written"),
        ("/proc/x.npz", "/proc/x.npz cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line(cli: Cli, place: Path, output: str, message: str) -> None:
    (place / "folder.png").mkdir()
    before = contents(place)
    outcome = cli("sample", "model.onnx", "--count", 2, "-o", output)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert contents(place) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_line(cli: Cli, place: Path) -> None:
    (place / "sealed").mkdir(mode=0o500)
    outcome = cli("sample", "model.onnx", "--count", 2, "-o", "sealed/x.png")
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert "no permission" in outcome.err


def test_an_unwritable_output_is_refused_before_the_model_is_read(cli: Cli) -> None:
    assert "missing/x.png" in cli("sample", "no.onnx", "-o", "missing/x.png").err


FILL_THE_DISK = """
import contextlib, io, json, os, resource, sys
from cm_runtime.cli import main
model, name, whole = sys.argv[1], sys.argv[2], int(sys.argv[3])
outcomes = []
for limit in [0, 1, 100, whole // 2, whole - 2000, *range(whole - 1200, whole, 37), whole - 1, whole]:
    if limit < 0:
        continue
    open(name, "wb").close()
    os.unlink(name)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            main(["sample", model, "--count", "7", "-o", name])
        code = "no exit"
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException as error:
        code = repr(error)
    outcomes.append([limit, code, said.getvalue(), os.listdir(".")])
    if os.path.exists(name):
        os.unlink(name)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
print(json.dumps(outcomes))
"""


@pytest.mark.process
@pytest.mark.quick("x.png")
@pytest.mark.parametrize("name", ["x.npz", "x.png"])
def test_a_disk_that_fills_up_at_any_byte_leaves_no_file(boundary: exports.Files, tmp_path: Path, name: str) -> None:
    assert exports.command("sample", boundary.onnx, "--count", 7, "-o", name, cwd=tmp_path).returncode == 0
    whole = (tmp_path / name).stat().st_size
    (tmp_path / name).unlink()
    words = [sys.executable, "-c", FILL_THE_DISK, str(boundary.onnx), name, str(whole)]
    done = subprocess.run(
        words, cwd=tmp_path, env=exports.environment(), capture_output=True, text=True, timeout=240, check=True
    )
    *full, enough = json.loads(done.stdout)
    assert enough == [whole, 0, "", [name]]
    assert len(full) > 20
    for limit, code, error, left in full:
        assert (code, left) == (1, []), (limit, code, error)
        assert error == f"error: {name} cannot be written: File too large\n"


# Usage, and --debug


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "--nonsense"],
        ["sample", "a.onnx", "b.onnx"],
        ["sample", "--steps"],
        ["sample", "--steps", "two"],
        ["sample", "--batch", "1.5"],
        ["sample", "--ts", "0,39", "--grid", "4.5"],
        ["sample", "--seed", "x"],
        ["export"],
        ["train"],
        ["info", "--yaml"],
        ["draw"],
        ["--nonsense"],
    ],
)
def test_a_wrong_use_is_exit_2_with_a_usage_message(cli: Cli, tmp_path: Path, words: Words) -> None:
    outcome = cli(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Error" in outcome.err
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [["sample", "--steps", "x" * 100_000], ["sample", "--" + "x" * 100_000], ["x" * 100_000]]
)
def test_a_usage_message_is_of_moderate_length(cli: Cli, words: Words) -> None:
    outcome = cli(*words)
    assert outcome.code == 2 and len(outcome.err) < 4000


@pytest.mark.parametrize("position", [0, 1, 2, 4])
def test_debug_shows_where_an_error_comes_from_in_any_position(cli: Cli, position: int) -> None:
    words = ["sample", "no.onnx", "--steps", "2"]
    assert cli(*words).err.startswith("error: no.onnx")
    words.insert(position, "--debug")
    with pytest.raises(ArtifactError, match=r"no\.onnx"):
        main(words)


@pytest.mark.process
def test_debug_prints_a_traceback_in_a_process_and_the_exit_status_stays_1(tmp_path: Path) -> None:
    done = exports.command("info", "no.onnx", "--debug", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback (most recent call last)" in done.stderr
    assert "ArtifactError: no.onnx: no such file" in done.stderr
    plain = exports.command("info", "no.onnx", cwd=tmp_path)
    assert (plain.returncode, plain.stdout, plain.stderr) == (1, "", "error: no.onnx: no such file\n")


@pytest.mark.process
def test_a_reader_that_stops_listening_is_no_traceback(boundary: exports.Files, tmp_path: Path) -> None:
    """As in ``cm-runtime info model.onnx --json | head -0``."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "cm_runtime", "info", str(boundary.onnx), "--json"]
    environment = exports.environment()
    done = subprocess.run(words, cwd=tmp_path, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


# Extras that are not installed


@pytest.mark.quick(
    "onnxruntime-words0-onnxruntime: pip install 'cm-runtime[cpu]'", "onnx-words6-onnx: pip install 'cm-runtime[train]'"
)
@pytest.mark.process
@pytest.mark.parametrize(
    ("hidden", "words", "message"),
    [
        ("onnxruntime", ["sample", "model.onnx", "--backend", "ort"], "onnxruntime: pip install 'cm-runtime[cpu]'"),
        ("torch", ["sample", "ckpt.pt"], "torch: pip install 'cm-runtime[train]'"),
        ("torch", ["info", "ckpt.pt"], "torch: pip install 'cm-runtime[train]'"),
        ("torch", ["export", "ckpt.pt"], "torch: pip install 'cm-runtime[train]'"),
        ("torch", ["train", "fashion-mnist", "--out", "run"], "torch: pip install 'cm-runtime[train]'"),
        ("pyarrow", ["sample", "model.onnx", "--shards", "parquet"], "pyarrow: pip install 'cm-runtime[parquet]'"),
        ("onnx", ["export", "ckpt.pt"], "onnx: pip install 'cm-runtime[train]'"),
        ("onnxscript", ["export", "ckpt.pt", "--compare"], "onnxscript: pip install 'cm-runtime[train]'"),
        ("tomli_w", ["train", "fashion-mnist", "--out", "run"], "tomli_w: pip install 'cm-runtime[train]'"),
    ],
)
def test_a_missing_extra_is_one_line_with_the_pip_command(
    place: Path, hidden: str, words: list[str], message: str
) -> None:
    before = contents(place)
    done = exports.command(*words, cwd=place, start=exports.hiding(hidden))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(place) == before
    assert not (place / "run").exists()


@pytest.mark.process
@pytest.mark.parametrize("use", ["cm.load_checkpoint('ckpt.pt')", "cm.export.onnx(None, 'm.onnx')"])
def test_python_names_that_need_torch_say_so_too(place: Path, use: str) -> None:
    hide = exports.hiding("torch")[2].rpartition("from cm_runtime.cli")[0]
    script = f"{hide}\nimport cm_runtime as cm\ntry:\n    {use}\nexcept cm.errors.MissingExtraError as e:\n    print(e)"
    done = exports.command(cwd=place, start=[sys.executable, "-c", script])
    assert "needs torch: pip install 'cm-runtime[train]'" in done.stdout, done.stderr
