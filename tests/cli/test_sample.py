"""``cm-runtime sample``: which images it draws, and what it writes about them."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from PIL import Image

from cm_runtime import noise
from cm_runtime.backends import DEFAULT_MODEL

Cli = Callable[..., Any]
TS = ("--ts", "0,22,39", "--grid", 40)
TIMESTEPS = ("--timesteps", "22,0", "--grid", 40)


def drawn(cli: Cli, model: Path, *options: object) -> dict[str, NDArray[Any]]:
    outcome = cli("sample", model, *options, "-o", "x.npz")
    assert (outcome.code, outcome.err) == (0, "")
    with np.load("x.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def said(path: str | Path) -> dict[str, Any]:
    """What a picture says of itself, read by Pillow."""
    with Image.open(path) as picture:
        text: dict[str, Any] = json.loads(picture.text["cm_runtime"])  # type: ignore[attr-defined]
    return text


def sha256(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


# What is drawn


def test_the_images_are_those_of_algorithm_1_written_out(cli: Cli, boundary: exports.Files) -> None:
    """arXiv 2303.01469, algorithm 1, on a session of our own: seed 9, images 4 to 10, three levels."""
    session = onnxruntime.InferenceSession(str(boundary.onnx))
    index = np.arange(4, 11)
    x0: NDArray[np.float32] = np.zeros((7, 3, 8, 8), np.float32)
    for k, sigma in enumerate([80.0, 3.0, 0.7]):
        spread = np.float32(np.sqrt(sigma**2 - 0.002**2) if k else sigma)
        x = x0 + spread * noise.normal(9, index, k, (3, 8, 8))
        (x0,) = session.run(None, {"x": x, "sigma": np.full(7, sigma, np.float32), "label": index % exports.CLASSES})
        x0 = np.clip(x0, -1, 1)
    options = ("--seed", 9, "--start", 4, "--count", 7, "--sigmas", "80,3,0.7")
    floats = drawn(cli, boundary.onnx, *options, "--float")["arr_0"]
    assert floats.std() > 0.1
    assert np.abs(floats - x0.transpose(0, 2, 3, 1)).max() < 1e-4
    whole = drawn(cli, boundary.onnx, *options)["arr_0"]
    assert np.abs(whole.astype(int) - (x0.transpose(0, 2, 3, 1) + 1) * 127.5).max() < 0.51


def test_labels_may_be_so_many_of_each(cli: Cli, boundary: exports.Files) -> None:
    for options in ((), ("--batch", 2), ("--count", 5), ("--start", 4)):
        assert drawn(cli, boundary.onnx, "--backend", "ort", "--labels", "4:2,0:3", *options)["arr_1"].tolist() == [
            4,
            4,
            0,
            0,
            0,
        ]
    how = ("--backend", "ort", "--shards", "npz", "-o", "shards/")
    assert cli("sample", boundary.onnx, "--labels", "4:2,0:3", *how).code == 0
    assert json.loads(Path("shards/manifest.json").read_text())["labels"] == [4, 4, 0, 0, 0]
    for labels, message in {
        "4:2,4:3": "--labels counts class 4 twice",
        "4:2,3": "CLASS:COUNT",
        "4:2:1": "CLASS:COUNT",
        "4:0": "1 image or more",
        "5:2": "labels must be from 0 to 4, not 5",
    }.items():
        outcome = cli("sample", boundary.onnx, "--backend", "ort", "--labels", labels)
        assert (outcome.code, outcome.err.count("\n")) == (1, 1) and message in outcome.err
    outcome = cli("sample", boundary.onnx, "--backend", "ort", "--labels", "4:2,0:3", "--count", 4)
    assert outcome.err == "error: the labels are for 5 images, but 4 are asked for\n"


@pytest.mark.quick("options1", "options5", "options6")
@pytest.mark.process
@pytest.mark.parametrize(
    "options",
    [
        ("--batch", 1),
        ("--batch", 7),
        ("--batch", 256),
        ("--micro-batch", 1),
        ("--micro-batch", 5),
        ("--batch", 7, "--micro-batch", 3),
        ("--threads", 1),
    ],
)
def test_no_way_of_batching_changes_an_image_or_its_label(
    cli: Cli, boundary: exports.Files, options: tuple[object, ...]
) -> None:
    whole = drawn(cli, boundary.onnx, "--count", 20, "--labels", "random")
    other = drawn(cli, boundary.onnx, "--count", 20, "--labels", "random", *options)
    assert np.abs(whole["arr_0"].astype(int) - other["arr_0"]).max() <= 1
    assert np.array_equal(whole["arr_1"], other["arr_1"])


def test_start_continues_where_another_run_stopped(cli: Cli, boundary: exports.Files) -> None:
    whole = drawn(cli, boundary.onnx, "--count", 20, "--labels", "0,4,2")
    later = drawn(cli, boundary.onnx, "--start", 13, "--count", 3, "--labels", "0,4,2")
    assert np.abs(whole["arr_0"][13:16].astype(int) - later["arr_0"]).max() <= 1
    assert later["arr_1"].tolist() == [4, 2, 0]


def test_the_last_indices_there_are_can_be_drawn(cli: Cli, boundary: exports.Files) -> None:
    last = drawn(cli, boundary.onnx, "--seed", 2**64 - 1, "--start", 2**64 - 2, "--count", 2)
    assert last["arr_1"].tolist() == [(2**64 - 2) % exports.CLASSES, (2**64 - 1) % exports.CLASSES]
    assert last["arr_0"].std() > 10


@pytest.mark.parametrize(
    "option", [("--seed", 1), ("--start", 20), ("--steps", 3), ("--sigmas", "80,1"), TS, TIMESTEPS]
)
def test_every_option_that_chooses_images_changes_them(
    cli: Cli, boundary: exports.Files, option: tuple[object, ...]
) -> None:
    usual = drawn(cli, boundary.onnx, "--count", 3, "--labels", 0)["arr_0"]
    other = drawn(cli, boundary.onnx, "--count", 3, "--labels", 0, *option)["arr_0"]
    assert (np.abs(usual.astype(int) - other).max(axis=(1, 2, 3)) > 5).all()


@pytest.mark.quick("0,106,200-106,0-201")
@pytest.mark.process
@pytest.mark.parametrize(
    ("ts", "timesteps", "grid"), [("0,22,39", "22,0", 40), ("0,106,200", "106,0", 201), ("0,39", "0", 40)]
)
def test_levels_named_as_other_tools_name_them_draw_the_same_bytes(
    cli: Cli, ts: str, timesteps: str, grid: int
) -> None:
    """The sigmas by the Karras formula (arXiv 2206.00364, eq. 5), which openai/consistency_models indexes with ts."""
    top, bottom = 80 ** (1 / 7), 0.002 ** (1 / 7)
    indices = [int(index) for index in ts.split(",")][:-1]
    sigmas = ",".join(repr((top + i / (grid - 1) * (bottom - top)) ** 7 if i else 80.0) for i in indices)
    ways = [("--sigmas", sigmas), ("--ts", ts, "--grid", grid), ("--timesteps", timesteps, "--grid", grid)]
    ours, openais, diffusers = (drawn(cli, DEFAULT_MODEL, *way, "--batch", 4) for way in ways)
    assert ours["arr_0"].std() > 10
    assert ours["arr_0"].tobytes() == openais["arr_0"].tobytes() == diffusers["arr_0"].tobytes()
    assert str(openais["cm_runtime"]) == str(diffusers["cm_runtime"])
    assert json.loads(str(openais["cm_runtime"]))["sigmas"] == pytest.approx([float(s) for s in sigmas.split(",")])


@pytest.mark.process
def test_the_grid_is_the_models_own(cli: Cli, boundary: exports.Files, tmp_path: Path) -> None:
    (told,) = onnx.load(boundary.onnx).metadata_props
    manifest = json.loads(told.value) | {"sigma_min": 0.01, "sigma_max": 50.0, "rho": 3.0, "sigmas": {}}
    exports.with_metadata(boundary.onnx, tmp_path / "other.onnx", json.dumps(manifest))
    level = (50 ** (1 / 3) + 4 / 10 * (0.01 ** (1 / 3) - 50 ** (1 / 3))) ** 3
    for way in (("--ts", "0,4,10"), ("--timesteps", "4,0")):
        arrays = drawn(cli, tmp_path / "other.onnx", *way, "--grid", 11, "--count", 2)
        assert json.loads(str(arrays["cm_runtime"]))["sigmas"] == pytest.approx([50, level])


@pytest.mark.process
def test_labels_choose_classes(cli: Cli, boundary: exports.Files) -> None:
    def labels(*options: object) -> list[int]:
        found = drawn(cli, boundary.onnx, "--count", 7, *options)["arr_1"]
        assert found.dtype == np.int64
        return list(found.tolist())

    assert labels() == labels("--labels", "all") == [0, 1, 2, 3, 4, 0, 1]
    assert labels("--labels", "3") == [3] * 7
    assert labels("--labels", "4,0,1") == [4, 0, 1, 4, 0, 1, 4]
    assert labels("--labels", "all", "--start", 3) == [3, 4, 0, 1, 2, 3, 4]
    random = drawn(cli, boundary.onnx, "--count", 40, "--labels", "random", "--steps", 1)["arr_1"].tolist()
    assert set(random) == set(range(exports.CLASSES))
    assert (
        random
        != drawn(cli, boundary.onnx, "--count", 40, "--labels", "random", "--steps", 1, "--seed", 1)["arr_1"].tolist()
    )


def test_a_label_changes_its_image(cli: Cli, boundary: exports.Files) -> None:
    one, other = (drawn(cli, boundary.onnx, "--count", 3, "--labels", label, "--float")["arr_0"] for label in (1, 2))
    assert np.abs(one - other).max() > 0.01


def test_torch_draws_what_onnx_runtime_draws(cli: Cli, boundary: exports.Files) -> None:
    """A grey level apart at most, from the checkpoint itself."""
    by_ort = drawn(cli, boundary.onnx, "--count", 7)
    by_torch = drawn(cli, boundary.checkpoint, "--count", 7, "--backend", "torch", "--device", "cpu")
    assert np.abs(by_ort["arr_0"].astype(int) - by_torch["arr_0"]).max() <= 1
    assert json.loads(str(by_ort["cm_runtime"])) == json.loads(str(by_torch["cm_runtime"])) | {"micro_batch": 7}


# What is written


@pytest.mark.process
def test_an_npz_holds_images_labels_and_what_made_them(cli: Cli, boundary: exports.Files) -> None:
    arrays = drawn(cli, boundary.onnx, "--count", 7, "--seed", 5, "--start", 2, "--micro-batch", 3)
    assert set(arrays) == {"arr_0", "arr_1", "cm_runtime"}
    assert (arrays["arr_0"].dtype, arrays["arr_0"].shape) == (np.uint8, (7, 8, 8, 3))
    text = json.loads(str(arrays["cm_runtime"]))
    middle = (80 ** (1 / 7) / 2 + 0.002 ** (1 / 7) / 2) ** 7  # two steps: the grid of three points, without its last
    assert text.pop("sigmas") == pytest.approx([80, middle])
    assert text == {
        "seed": 5,
        "start": 2,
        "count": 7,
        "labels": "all",
        "micro_batch": 3,
        "model_sha256": sha256(boundary.checkpoint),
    }


def test_a_model_without_classes_writes_no_labels(cli: Cli, grey: exports.Files) -> None:
    arrays = drawn(cli, grey.onnx, "--count", 3)
    assert set(arrays) == {"arr_0", "cm_runtime"}
    assert arrays["arr_0"].shape == (3, 8, 8, 1)
    assert json.loads(str(arrays["cm_runtime"]))["labels"] is None


def test_float_writes_what_the_bytes_are_rounded_from(cli: Cli, boundary: exports.Files) -> None:
    floats = drawn(cli, boundary.onnx, "--count", 7, "--float")["arr_0"]
    assert floats.dtype == np.float32
    assert np.abs(floats).max() <= 1
    whole = drawn(cli, boundary.onnx, "--count", 7)["arr_0"]
    assert np.array_equal(whole, np.rint((floats.astype(np.float64) + 1) * 127.5))


@pytest.mark.parametrize(("kind", "mode"), [("boundary", "RGB"), ("grey", "L")])
def test_a_png_is_a_grid_of_the_same_images_row_by_row(
    cli: Cli, kind: str, mode: str, request: pytest.FixtureRequest
) -> None:
    files: exports.Files = request.getfixturevalue(kind)
    images = drawn(cli, files.onnx, "--count", 7)["arr_0"]
    assert cli("sample", files.onnx, "--count", 7, "-o", "x.png").code == 0
    with Image.open("x.png") as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", mode, (24, 24))
        pixels = np.asarray(picture).reshape(24, 24, -1)
    for i in range(9):
        row, column = divmod(i, 3)
        cell = pixels[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        assert np.array_equal(cell, images[i] if i < 7 else np.zeros_like(cell))


@pytest.mark.process
@pytest.mark.parametrize("labels", ["all", "random", "3", "4,0"])
def test_a_picture_can_be_drawn_again_from_what_it_says(cli: Cli, boundary: exports.Files, labels: str) -> None:
    cli(
        "sample",
        boundary.onnx,
        "--count",
        7,
        "--seed",
        3,
        "--start",
        5,
        "--steps",
        3,
        "--labels",
        labels,
        "-o",
        "a.png",
    )
    text = said("a.png")
    assert text["model_sha256"] == sha256(boundary.checkpoint)
    again = text["labels"] if isinstance(text["labels"], str) else ",".join(map(str, text["labels"]))
    options = [word for key in ("seed", "start", "count") for word in (f"--{key}", text[key])]
    levels = ",".join(map(repr, text["sigmas"]))
    cli("sample", boundary.onnx, *options, "--sigmas", levels, "--labels", again, "-o", "b.png")
    with Image.open("a.png") as first, Image.open("b.png") as second:
        assert np.asarray(first).std() > 10
        assert np.array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.process
@pytest.mark.parametrize("name", ["x.png", "x.npz"])
def test_the_same_command_writes_the_same_bytes(cli: Cli, boundary: exports.Files, tmp_path: Path, name: str) -> None:
    written = []
    for _ in range(2):
        cli("sample", boundary.onnx, "--count", 7, "--micro-batch", 3, "-o", name)  # and replaces the picture, unasked
        written.append((tmp_path / name).read_bytes())
        time.sleep(2.1 if name == "x.npz" and len(written) == 1 else 0)  # zip counts time in steps of two seconds
    assert written[0] == written[1]


def test_without_options_256_images_go_to_samples_png(cli: Cli, grey: exports.Files, tmp_path: Path) -> None:
    outcome = cli("sample", grey.onnx)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == "samples.png: 256 images, 2 steps, seed 0\n"
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]
    with Image.open("samples.png") as picture:
        assert picture.size == (128, 128)


def test_without_a_model_the_bundled_one_draws(cli: Cli) -> None:
    assert DEFAULT_MODEL.exists(), "the bundled model is missing"
    outcome = cli("sample", "--count", 4, "-o", "x.png")
    assert (outcome.code, outcome.err) == (0, "")
    with Image.open("x.png") as picture:
        assert np.asarray(picture).std() > 10


# Shards


def shards(cli: Cli, *options: object) -> str:
    outcome = cli("sample", *options)
    assert (outcome.code, outcome.err) == (0, "")
    return str(outcome.out)


def sums(folder: Path) -> dict[str, str]:
    return {name: found for found, name in (line.split() for line in (folder / "SHA256SUMS").read_text().splitlines())}


def test_a_folder_is_filled_with_shards(cli: Cli, boundary: exports.Files, tmp_path: Path) -> None:
    options = ("--count", 20, "--shard-size", 8, "--seed", 5, "--labels", "random")
    said = shards(cli, boundary.onnx, *options, "-o", "out/")
    assert said == "out/: 20 images in 3 shards, 2 steps, seed 5\n"
    assert sorted(os.listdir("out")) == ["SHA256SUMS", "manifest.json", *(f"shard-00000{n}.npz" for n in range(3))]
    whole = drawn(cli, boundary.onnx, "--count", 20, "--seed", 5, "--labels", "random")
    parts = []
    for n in range(3):
        with np.load(f"out/shard-00000{n}.npz", allow_pickle=False) as arrays:
            parts.append((arrays["arr_0"], arrays["arr_1"]))
            assert json.loads(str(arrays["cm_runtime"]))["start"] == 8 * n
    images, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    assert np.abs(images.astype(int) - whole["arr_0"]).max() <= 1
    assert np.array_equal(labels, whole["arr_1"])
    assert said.replace("shards", "shards (3 were there)") == shards(cli, boundary.onnx, *options, "-o", "out")


@pytest.mark.process
@pytest.mark.parametrize("kind", ["png", "wds", "parquet"])
def test_every_kind_of_shards_holds_the_same_images(cli: Cli, grey: exports.Files, kind: str) -> None:
    shards(cli, grey.onnx, "--count", 5, "--shard-size", 3, "--shards", kind)
    assert set(os.listdir("samples")) > {"SHA256SUMS", "manifest.json"}
    shards(cli, grey.onnx, "--count", 5, "--shard-size", 3, "-o", "arrays/")
    whole = np.concatenate([np.load(f"arrays/shard-00000{n}.npz")["arr_0"] for n in range(2)])
    if kind == "png":
        pictures = [path.read_bytes() for path in sorted(Path("samples").glob("*/*.png"))]
    elif kind == "wds":
        pictures = []
        for n in range(2):
            with tarfile.open(f"samples/shard-00000{n}.tar") as archive:
                pictures += [archive.extractfile(each).read() for each in archive]  # type: ignore[union-attr]
    else:
        tables = [pyarrow.parquet.read_table(f"samples/shard-00000{n}.parquet") for n in range(2)]
        pictures = [row["bytes"] for table in tables for row in table["image"].to_pylist()]
    images = [np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures]
    assert np.array_equal(np.stack(images)[..., None], whole)


@pytest.mark.process
def test_float_shards(cli: Cli, boundary: exports.Files) -> None:
    shards(cli, boundary.onnx, "--count", 3, "--float", "-o", "out/")
    with np.load("out/shard-000000.npz") as arrays:
        assert arrays["arr_0"].dtype == np.float32


def test_a_resumed_run_takes_what_the_manifest_says(cli: Cli, boundary: exports.Files, tmp_path: Path) -> None:
    options = (boundary.onnx, "--count", 20, "--shard-size", 8, "-o", "out/")
    chosen = ("--micro-batch", 3, "--threads", 1, "--backend", "ort")
    shards(cli, *options, *chosen)
    whole = sums(tmp_path / "out")
    (tmp_path / "out" / "shard-000001.npz").unlink()
    assert "(2 were there)" in shards(cli, *options)
    assert sums(tmp_path / "out") == whole
    outcome = cli("sample", *options, "--micro-batch", 4)
    assert outcome.err == (
        "error: out holds another job: its micro batch is 3, not 4; give another folder, or --force\n"
    )
    assert "(" not in shards(cli, *options, "--force", "--micro-batch", 4)


def test_little_is_drawn_in_vain(cli: Cli, boundary: exports.Files) -> None:
    """The tiny model's engine takes 256 at once: 300 images are 2 x 150."""
    shards(cli, boundary.onnx, "--count", 300, "--steps", 1, "-o", "out/")
    assert json.loads(Path("out/manifest.json").read_text())["micro_batch"] == 150


@pytest.mark.process
def test_runs_that_are_killed_end_in_the_same_bytes(cli: Cli, boundary: exports.Files, tmp_path: Path) -> None:
    options = ("--count", 300, "--shard-size", 7, "--micro-batch", 3, "--steps", 1, "--backend", "ort", "-o")
    words = [sys.executable, "-m", "cm_runtime", "sample", str(boundary.onnx), *map(str, options), "killed/"]
    for wanted in (0, 8, 20):
        running = subprocess.Popen(words, cwd=tmp_path, env=exports.environment())
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("killed/shard-*"))) <= wanted:
            assert running.poll() is None and time.monotonic() < deadline
        running.kill()
        assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "SHA256SUMS").exists()
    assert "were there)" in shards(cli, boundary.onnx, *options, "killed/")
    shards(cli, boundary.onnx, *options, "undisturbed/")
    assert sums(tmp_path / "killed") == sums(tmp_path / "undisturbed")
    assert sorted(os.listdir("killed")) == sorted(os.listdir("undisturbed"))


@pytest.mark.process
def test_an_interrupted_run_keeps_its_shards(boundary: exports.Files, tmp_path: Path) -> None:
    options = ("--count", "100000", "--shard-size", "7", "--steps", "1", "--backend", "ort", "-o", "out/")
    words = [sys.executable, "-m", "cm_runtime", "sample", str(boundary.onnx), *options]
    running = subprocess.Popen(words, cwd=tmp_path, env=exports.environment(), stderr=subprocess.PIPE, text=True)
    try:
        while len(list(tmp_path.glob("out/shard-*"))) < 3:
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=60)
    finally:
        running.kill()
    assert (running.returncode, error) == (130, "interrupted\n")
    assert len(list(tmp_path.glob("out/shard-*"))) >= 3
    assert list(tmp_path.glob("out/.cm-*")) == []


@pytest.mark.process
def test_a_finished_folder_grows(cli: Cli, boundary: exports.Files, tmp_path: Path) -> None:
    """The options are those of the first run, or left out; the count alone is another."""
    how = ("--shard-size", 100, "--micro-batch", 50, "--steps", 1, "--backend", "ort", "--threads", 1)
    shards(cli, boundary.onnx, "--count", 250, *how, "-o", "grown/")
    said = shards(cli, boundary.onnx, "--count", 300, "--shard-size", 100, "--steps", 1, "-o", "grown/")
    assert "300 images in 3 shards (2 were there)" in said
    shards(cli, boundary.onnx, "--count", 300, *how, "-o", "fresh/")
    assert sums(tmp_path / "grown") == sums(tmp_path / "fresh")
    assert sorted(os.listdir("grown")) == sorted(os.listdir("fresh"))
    for name in ("manifest.json", "SHA256SUMS"):
        assert Path("grown", name).read_bytes() == Path("fresh", name).read_bytes()
    outcome = cli("sample", boundary.onnx, "--count", 250, "--shard-size", 100, "--steps", 1, "-o", "grown/")
    assert outcome.err == "error: grown holds another job: its count is 300, not 250; give another folder, or --force\n"


@pytest.mark.parametrize(
    "options",
    [
        ("--count", 2**64, "--start", 2**63),
        ("--count", 2**64, "--shard-size", 1),
        ("--count", 2**63, "--start", 2**63, "--shard-size", 1),
        ("--count", 2**64 - 1, "--shard-size", 2**64),
        ("--count", 10**300),
        ("--shard-size", 10**300),
    ],
    ids=str,
)
def test_counts_that_no_range_can_hold_are_one_line(cli: Cli, boundary: exports.Files, options: Any) -> None:
    outcome = cli("sample", boundary.onnx, "--steps", 1, "--backend", "ort", *options, "-o", "out/")
    assert outcome.code == 1 and outcome.err.count("\n") == 1 and outcome.err.startswith("error: "), outcome.err
    assert not Path("out").exists()


@pytest.mark.parametrize(("number", "word"), [(signal.SIGTERM, "terminated"), (signal.SIGHUP, "the terminal has gone")])
def test_a_signal_that_ends_a_drawing_leaves_no_litter(
    cli: Cli, boundary: exports.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, word: str
) -> None:
    from cm_runtime.files.image_writer import NpzWriter

    before = signal.signal(number, signal.SIG_DFL)  # Ray leaves a handler of its own in a process that called it
    try:
        monkeypatch.setattr(NpzWriter, "write", lambda *_: os.kill(os.getpid(), number))
        outcome = cli("sample", boundary.onnx, "--steps", 1, "--backend", "ort", "-o", "x.npz")
        assert (outcome.code, outcome.err) == (128 + number, f"{word}\n")
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert [path for path in tmp_path.iterdir() if path.name.startswith((".cm-", "x"))] == []


# As a process


@pytest.mark.process
def test_a_process_draws_what_this_process_draws(cli: Cli, boundary: exports.Files, tmp_path: Path) -> None:
    cli("sample", boundary.onnx, "--count", 7, "-o", "here.npz")
    done = exports.command("sample", boundary.onnx, "--count", 7, "-o", "there.npz", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "there.npz: 7 images, 2 steps, seed 0\n", "")
    assert (tmp_path / "here.npz").read_bytes() == (tmp_path / "there.npz").read_bytes()


@pytest.mark.process
@pytest.mark.parametrize("hidden", [("torch", "onnx", "onnxscript", "openvino", "scipy")])
def test_sampling_an_exported_file_needs_no_torch(
    boundary: exports.Files, tmp_path: Path, hidden: tuple[str, ...]
) -> None:
    start = exports.hiding(*hidden)
    done = exports.command("sample", boundary.onnx, "--count", 3, "-o", "x.png", cwd=tmp_path, start=start)
    assert (done.returncode, done.stderr) == (0, "")
    assert said(tmp_path / "x.png")["count"] == 3


@pytest.mark.process
@pytest.mark.parametrize(("name", "options"), [("x.npz", ("--count", "1000000")), ("x.png", ("--steps", "1000"))])
def test_an_interrupt_leaves_no_file_and_says_one_line(
    grey: exports.Files, tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    words = [sys.executable, "-m", "cm_runtime", "sample", str(grey.onnx), *options, "--quiet", "-o", name]
    running = subprocess.Popen(
        words, cwd=tmp_path, env=exports.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not _is_drawing(running.pid, tmp_path, name):
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < deadline, "it never began to draw"
            time.sleep(0.05)
        time.sleep(0.3)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
        running.wait()
    assert os.listdir(tmp_path) == []
    assert (running.returncode, out, err) == (130, "", "interrupted\n")


def _is_drawing(pid: int, folder: Path, name: str) -> bool:
    """An npz grows under another name. A picture is drawn before anything is written: imports take no 3 s of a core."""
    if name.endswith(".npz"):
        return any(path.is_file() and path.stat().st_size > 10_000 for path in folder.rglob("*"))
    spent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, spent)) > 3 * os.sysconf("SC_CLK_TCK")
