"""``cm-runtime edit``: files in, answers out as `editing` gives them, and what cannot be edited said in one line."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
from PIL import Image, ImageOps

import cm_runtime as cm
from cm_runtime import editing
from cm_runtime.backends.ort import OrtBackend

Cli = Callable[..., Any]
EDITS = ("inpaint", "colorize", "superres", "stroke", "denoise")
OWN: dict[str, list[object]] = {"inpaint": ["--box", "2,2,3,3"]}


@pytest.fixture
def place(cli: Cli, boundary: exports.Files, tmp_path: Path, rng: np.random.Generator) -> Path:
    """model.onnx (8x8, colour, 5 classes), a.png and b.png of its size, big.jpg, small.png (4x4), given.npz."""
    exports.copied(boundary.onnx, tmp_path)
    (tmp_path / boundary.onnx.name).rename(tmp_path / "model.onnx")
    for name, size in (("a.png", (8, 8)), ("b.png", (8, 8)), ("small.png", (4, 4)), ("big.jpg", (60, 30))):
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(tmp_path / name)
    images = rng.uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
    np.savez(tmp_path / "given.npz", arr_0=images, arr_1=np.array([4, 0, 2]))
    return tmp_path


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path))


def words(edit: str, *more: object) -> list[object]:
    return ["edit", edit, "model.onnx", *OWN.get(edit, []), "--backend", "ort", *more]


def test_a_strip_is_before_given_and_answers(cli: Cli, place: Path) -> None:
    outcome = cli(*words("inpaint", "a.png", "b.png", "--labels", "1,3", "--answers", 2, "--steps", 2, "--seed", 7))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[0] == "edited.png: 2 images, 2 answers to each, seed 7, from index 0"
    strip = pixels(place / "edited.png").reshape(2, 8, 4, 8, 3).swapaxes(1, 2)
    given = np.stack([pixels(place / "a.png"), pixels(place / "b.png")])
    hole = np.zeros((8, 8), bool)
    hole[2:5, 2:5] = True
    np.testing.assert_array_equal(strip[:, 0], given)
    np.testing.assert_array_equal(strip[:, 1][:, ~hole], given[:, ~hole])
    assert (strip[:, 1][:, hole] == 128).all()
    wanted = editing.inpaint(OrtBackend(place / "model.onnx"), given, hole, labels=[1, 3], answers=2, steps=2, seed=7)
    np.testing.assert_array_equal(strip[:, 2:].reshape(4, 8, 8, 3), wanted)
    text = json.loads(Image.open(place / "edited.png").text["cm_runtime"])  # type: ignore[attr-defined]
    assert (text["edit"], text["seed"], text["images"], text["labels"]) == ("inpaint", 7, ["a", "b"], [1, 3])


@pytest.mark.parametrize("edit", EDITS)
def test_answers_are_those_of_python(cli: Cli, place: Path, edit: str) -> None:
    """An npz says labels itself; --float is what was computed, and bytes are rounded from it."""
    assert cli(*words(edit, "given.npz", "--start", 9, "--answers", 2, "--float", "-o", "x.npz")).code == 0
    made = np.load(place / "x.npz")
    given = np.load(place / "given.npz")["arr_0"]
    model = OrtBackend(place / "model.onnx")
    options: Any = {"labels": [4, 0, 2], "start": 9, "answers": 2, "output": "float32"}
    hole = np.zeros((8, 8))
    hole[2:5, 2:5] = 1
    small = editing.patch_means(given.transpose(0, 3, 1, 2), 2).transpose(0, 2, 3, 1)
    wanted = {
        "inpaint": lambda: editing.inpaint(model, given, hole, **options),
        "colorize": lambda: editing.colorize(model, given, **options),
        "superres": lambda: editing.superres(model, small, 2, **options),
        "stroke": lambda: editing.stroke(model, given, 2.0, **options),
        "denoise": lambda: editing.denoise(model, given, **options),
    }[edit]()
    np.testing.assert_allclose(made["arr_0"], wanted, atol=1e-5)
    np.testing.assert_array_equal(made["arr_1"], [4, 4, 0, 0, 2, 2])
    steps = {"stroke": 2, "denoise": 1}.get(edit, 8)  # written down, so that the same command is known later
    assert json.loads(str(made["cm_runtime"]))["steps"] == steps
    outcome = cli(*words(edit, "given.npz", "--start", 9, "--answers", 2, "-o", "y.npz"))
    rounded = np.rint((np.clip(made["arr_0"], -1, 1) + 1) * 127.5)
    np.testing.assert_array_equal(np.load(place / "y.npz")["arr_0"], rounded)
    clipped = int((np.abs(made["arr_0"]) > 1 + 1 / 255).sum())
    assert (f"clipped to black or white: {clipped} of 1152 numbers" in outcome.out) == (clipped > 0)


def test_a_folder_has_every_answer_and_the_strip(cli: Cli, place: Path) -> None:
    for _ in range(2):  # a folder that is there is written into
        assert (
            cli(*words("stroke", "a.png", "b.png", "--labels", 0, "--answers", 2, "--start", 5, "-o", "out")).code == 0
        )
    names = {"a-5.png", "a-6.png", "b-7.png", "b-8.png", "strip.png"}
    assert {path.name for path in (place / "out").iterdir()} == names
    strip = pixels(place / "out" / "strip.png").reshape(2, 8, 3, 8, 3).swapaxes(1, 2)
    np.testing.assert_array_equal(strip[1, 2], pixels(place / "out" / "b-8.png"))
    np.testing.assert_array_equal(strip[0, 0], pixels(place / "a.png"))


@pytest.mark.parametrize("name", ["trial.v1", "x.npz", "x.png"])
def test_a_name_that_ends_in_a_slash_is_a_folders(cli: Cli, place: Path, name: str) -> None:
    for edit in ("stroke", "interpolate"):
        images = ["a.png"] if edit == "stroke" else []
        assert cli(*words(edit, *images, "--labels", 0, "-o", f"{name}.{edit}/")).code == 0
        assert (place / f"{name}.{edit}" / "strip.png").exists()


def test_pictures_of_any_size_are_fitted(cli: Cli, place: Path) -> None:
    assert cli(*words("stroke", "big.jpg", "--labels", 0)).code == 0
    with Image.open(place / "big.jpg") as image:
        wanted = ImageOps.fit(image, (8, 8), Image.Resampling.BICUBIC)
        middle = image.crop((15, 0, 45, 30)).resize((8, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels(place / "edited.png")[:, :8], middle)
    assert np.abs(pixels(place / "edited.png")[:, :8].astype(int) - np.asarray(wanted)).max() < 80  # edges differ


def test_a_small_image_is_enlarged_as_it_is_and_another_by_its_patch_means(cli: Cli, place: Path) -> None:
    assert cli(*words("superres", "small.png", "--labels", 0, "-o", "s.png")).code == 0
    strip = pixels(place / "s.png")
    np.testing.assert_array_equal(strip[:, :8], pixels(place / "small.png").repeat(2, 0).repeat(2, 1))
    assert strip.shape == (8, 16, 3)
    assert cli(*words("superres", "a.png", "--factor", 4, "--labels", 0, "-o", "t.png")).code == 0
    strip = pixels(place / "t.png")
    assert strip.shape == (8, 24, 3)
    means = pixels(place / "a.png").reshape(2, 4, 2, 4, 3).mean(axis=(1, 3))
    assert np.abs(strip[::4, 8:16:4] - means).max() <= 0.5 + 1e-3


def test_a_mask_is_white_where_to_fill_and_fitted_as_the_picture_is(cli: Cli, place: Path) -> None:
    mask = np.zeros((30, 60), np.uint8)
    mask[:, 15:30] = 255  # the left half of the square in the middle
    Image.fromarray(mask).save(place / "mask.png")
    plain = ["edit", "inpaint", "model.onnx", "big.jpg", "--labels", 0, "--backend", "ort"]
    assert cli(*plain, "--mask", "mask.png", "-o", "x.png").code == 0
    assert cli(*plain, "--box", "0,0,4,8", "-o", "y.png").code == 0
    np.testing.assert_array_equal(pixels(place / "x.png"), pixels(place / "y.png"))
    Image.fromarray(np.kron(np.array([[1, 0]], np.uint8) * 255, np.ones((8, 4), np.uint8))).save(place / "own.png")
    assert cli(*plain, "--mask", "own.png", "-o", "z.png").code == 0
    np.testing.assert_array_equal(pixels(place / "x.png"), pixels(place / "z.png"))


def test_the_bundled_model_is_the_default(cli: Cli, tmp_path: Path) -> None:
    Image.fromarray(np.full((28, 28), 99, np.uint8)).save(tmp_path / "grey.png")
    assert cli("edit", "stroke", "grey.png", "--labels", 7, "--backend", "ort").code == 0
    assert pixels(tmp_path / "edited.png").shape == (28, 56)


def test_estimated_noise_is_told(cli: Cli, place: Path) -> None:
    outcome = cli(*words("denoise", "given.npz"))
    given = np.load(place / "given.npz")["arr_0"].transpose(0, 3, 1, 2)
    told = re.search(r"estimated sigma: (.*)", outcome.out)
    assert told and [float(each) for each in told[1].split(", ")] == pytest.approx(
        editing.estimated_sigma(given), rel=1e-2
    )
    assert "estimated" not in cli(*words("denoise", "given.npz", "--sigma", 0.3)).out


def test_an_interpolation_is_a_strip_an_animation_or_arrays(cli: Cli, place: Path) -> None:
    plain = [
        "edit",
        "interpolate",
        "model.onnx",
        "--from",
        3,
        "--to",
        11,
        "--frames",
        5,
        "--labels",
        2,
        "--backend",
        "ort",
    ]
    assert cli(*plain, "-o", "x.png").out == "x.png: 5 images from 3 to 11, seed 0\n"
    assert [cli(*plain, "-o", name).code for name in ("x.npz", "x.gif", "x.webp", "frames/")] == [0] * 4
    frames = np.load(place / "x.npz")["arr_0"]
    ends = [cm.sample(OrtBackend(place / "model.onnx"), 1, start=index, labels=2)[0] for index in (3, 11)]
    np.testing.assert_array_equal(frames[[0, -1]], ends)
    np.testing.assert_array_equal(pixels(place / "x.png").reshape(8, 5, 8, 3).swapaxes(0, 1), frames)
    with Image.open(place / "x.webp") as image:
        assert image.n_frames == 8  # there and back, the ends once
        for n, frame in ((0, 0), (4, 4), (5, 3), (7, 1)):
            image.seek(n)
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), frames[frame])
    with Image.open(place / "x.gif") as image:
        assert (image.n_frames, image.info["loop"]) == (8, 0)
    assert sorted(path.name for path in (place / "frames").iterdir()) == [
        *(f"000{n}.png" for n in range(5)),
        "strip.png",
    ]


@pytest.mark.parametrize("edit", [*EDITS, "interpolate"])
def test_help_shows_an_example_that_works(cli: Cli, edit: str, boundary: exports.Files, tmp_path: Path) -> None:
    outcome = cli("edit", edit, "--help")
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", outcome.out).split())
    example = re.search(r"Example: (cm-runtime edit .*?) (?:Arguments|Options)", said)
    assert outcome.code == 0 and example
    if edit == "colorize":  # of a model with colours
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "grey.png")
        (tmp_path / "model.onnx").write_bytes(boundary.onnx.read_bytes())
    small = Image.fromarray(np.full((28, 28), 60, np.uint8))
    for name in ("coat.png", "small.png", "painting.png"):
        small.save(tmp_path / name)
    np.savez(tmp_path / "noisy.npz", arr_0=np.zeros((1, 28, 28, 1), np.float32))
    more = ["--labels", "0"] if edit == "colorize" else []
    assert cli(*example[1].split()[1:], *more, "--backend", "ort").code == 0


# What is refused

REFUSED: dict[str, tuple[list[object], str]] = {
    "no image": (["stroke", "model.onnx", "--labels", 0], "there is no image to edit"),
    "no file": (["stroke", "model.onnx", "no.png", "--labels", 0], "no.png: no such file"),
    "no picture": (["stroke", "model.onnx", "text.png", "--labels", 0], "text.png: is not a readable image"),
    "half a picture": (["stroke", "model.onnx", "half.png", "--labels", 0], "half.png: is truncated or damaged"),
    "a model behind": (["stroke", "a.png", "model.onnx", "--labels", 0], "model.onnx is no picture"),
    "two models": (["stroke", "model.onnx", "model.onnx", "a.png"], "a model is named before"),
    "an npz that is none": (["stroke", "model.onnx", "text.npz"], "text.npz: is not a whole .npz"),
    "an npz of another size": (["stroke", "model.onnx", "wide.npz"], "arr_0 is uint8 (1, 8, 9, 3); give (N, 8, 8, 3)"),
    "an npz of objects": (["stroke", "model.onnx", "objects.npz"], "arr_0.npy is object"),
    "labels in an npz": (["stroke", "model.onnx", "labels.npz"], "arr_1 is int64 (2,) for 1 image;"),
    "no label": (["stroke", "model.onnx", "a.png"], "as labels (--labels)"),
    "a label": (["stroke", "model.onnx", "a.png", "--labels", 5], "labels must be from 0 to 4, not 5"),
    "a label's name": (["stroke", "model.onnx", "a.png", "--labels", "coat"], "--labels takes whole numbers"),
    "two labels": (
        ["stroke", "model.onnx", "a.png", "--labels", "1,2"],
        "one for each of 1 image, not [1, 2]",
    ),
    "no hole": (["inpaint", "model.onnx", "a.png", "--labels", 0], "give --mask FILE or --box"),
    "two holes": (
        ["inpaint", "model.onnx", "a.png", "--mask", "a.png", "--box", "1,1,1,1"],
        "give --mask FILE or --box",
    ),
    "a box outside": (
        ["inpaint", "model.onnx", "a.png", "--labels", 0, "--box", "6,6,3,3"],
        "is not inside images of 8x8",
    ),
    "a box of 3": (
        ["inpaint", "model.onnx", "a.png", "--labels", 0, "--box", "1,1,3"],
        "LEFT,TOP,WIDTH,HEIGHT, not 3 numbers",
    ),
    "a full box": (
        ["inpaint", "model.onnx", "a.png", "--labels", 0, "--box", "0,0,8,8"],
        "nothing of the image is known",
    ),
    "an empty mask": (["inpaint", "model.onnx", "a.png", "--labels", 0, "--mask", "black.png"], "the mask has no hole"),
    "a full mask": (
        ["inpaint", "model.onnx", "a.png", "--labels", 0, "--mask", "white.png"],
        "nothing of the image is known",
    ),
    "a mask's size": (
        ["inpaint", "model.onnx", "a.png", "--labels", 0, "--mask", "small.png"],
        "small.png: is 4x4, but a.png is 8x8",
    ),
    "a mask that is none": (
        ["inpaint", "model.onnx", "a.png", "--labels", 0, "--mask", "text.png"],
        "text.png: is not a readable",
    ),
    "a factor": (["superres", "model.onnx", "a.png", "--factor", 3, "--labels", 0], "a factor of 3 does not divide"),
    "two sizes": (
        ["superres", "model.onnx", "a.png", "small.png", "--labels", 0],
        "small.png: is taken as 4x4, but a.png as 8x8",
    ),
    "sigma": (
        ["stroke", "model.onnx", "a.png", "--sigma", 99, "--labels", 0],
        "sigma must be above 0.002 and at most 80",
    ),
    "steps and sigmas": (
        ["colorize", "model.onnx", "a.png", "--steps", 2, "--sigmas", "80", "--labels", 0],
        "not both",
    ),
    "answers": (["stroke", "model.onnx", "a.png", "--answers", 0, "--labels", 0], "at least 1 answer"),
    "an index": (["stroke", "model.onnx", "a.png", "--start", 2**64, "--labels", 0], "image indices must be from 0"),
    "an ending": (["stroke", "model.onnx", "a.png", "--labels", 0, "-o", "x.tiff"], "an output's name ends in .png"),
    "an animation": (["stroke", "model.onnx", "a.png", "--labels", 0, "-o", "x.gif"], "an output's name ends in .png"),
    "floats": (["stroke", "model.onnx", "a.png", "--labels", 0, "--float"], "--float writes arrays"),
    "a folder": (["stroke", "model.onnx", "a.png", "--labels", 0, "-o", "no/x.png"], "there is no folder no"),
    "a file in the way": (
        ["stroke", "model.onnx", "a.png", "--labels", 0, "-o", "file"],
        "file cannot be made: File exists",
    ),
    "the same image": (["interpolate", "model.onnx", "--from", 1, "--labels", 0], "nothing between image 1 and itself"),
    "no class": (["interpolate", "model.onnx"], "as labels (--labels)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_edited_is_one_line_and_nothing_is_written(cli: Cli, place: Path, name: str) -> None:
    (place / "text.png").write_text("no picture")
    (place / "text.npz").write_text("no arrays")
    (place / "file").touch()
    (place / "half.png").write_bytes((place / "a.png").read_bytes()[:100])
    Image.new("L", (8, 8), 0).save(place / "black.png")
    Image.new("L", (8, 8), 255).save(place / "white.png")
    np.savez(place / "wide.npz", arr_0=np.zeros((1, 8, 9, 3), np.uint8))
    np.savez(place / "objects.npz", arr_0=np.array([{}], object))
    np.savez(place / "labels.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8), arr_1=np.array([1, 2]))
    before = {path.name for path in place.iterdir()}
    options, message = REFUSED[name]
    outcome = cli("edit", *options, "--backend", "ort")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert message in outcome.err
    assert {path.name for path in place.iterdir()} == before


def test_colours_are_not_for_a_grey_model(cli: Cli, grey: exports.Files, place: Path) -> None:
    outcome = cli("edit", "colorize", grey.onnx, "a.png", "--backend", "ort")
    assert (outcome.code, outcome.err) == (1, "error: colorization is of images with 3 channels, not 1\n")


@pytest.mark.process
def test_a_full_disk_leaves_no_half_picture(place: Path) -> None:
    code = (
        "import resource, sys; from cm_runtime.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY));"
        "main(sys.argv[1:])"
    )
    asked = [str(word) for word in words("stroke", "a.png", "--labels", 0)]
    environment = {**exports.environment(), "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
    done = subprocess.run(
        [sys.executable, "-c", code, *asked], cwd=place, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 1
    assert re.fullmatch(r"error: edited\.png cannot be written: .*\n", done.stderr)
    assert not [path.name for path in place.iterdir() if path.name.startswith((".cm-", "edited"))]
