"""``cm-runtime eval``: what it measures, what each option changes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import extractors
import numpy as np
import pytest
from onnx import TensorProto

from cm_runtime.checkpoints.native import save_checkpoint
from cm_runtime.evaluate.frechet import frechet_distance, moments

Cli = Callable[..., Any]
EXCERPT = exports.ROOT / "tests" / "data" / "fashion-mnist"
PIXELS = 8 * 8 * 3


@pytest.fixture
def place(boundary: exports.Files, tmp_path: Path, rng: np.random.Generator) -> Path:
    """A model of 8x8 images in 5 classes, an extractor for them, real images and samples."""
    exports.copied(boundary.onnx, tmp_path)
    mixture = rng.standard_normal((PIXELS, 6)).astype(np.float32) / PIXELS
    outputs = {"features": mixture, "logits": mixture[:, :5], "other": mixture[:, ::-1][:, :4]}
    extractors.linear(tmp_path / "x.onnx", ("N", 8, 8, 3), outputs)
    extractors.linear(tmp_path / "floats.onnx", ("N", 8, 8, 3), {"pool": mixture}, kind=TensorProto.FLOAT)
    images = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", images=images // 2 + 64, labels=np.arange(60) % 5)
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=np.arange(60) % 5)
    return tmp_path


PLAIN = ("--extractor", "x.onnx", "--reference", "real.npz", "--threads", 1)


def report(cli: Cli, *words: object) -> dict[str, Any]:
    outcome = cli("eval", *words, "-o", "report.json", "--force")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    found: dict[str, Any] = json.loads(Path("report.json").read_text())
    return found


def features(place: Path, images: Any) -> Any:
    """What x.onnx computes, by NumPy."""
    import onnx

    weight = next(w for w in onnx.load(place / "x.onnx").graph.initializer if w.name == "features.weight")
    return images.reshape(len(images), -1) @ onnx.numpy_helper.to_array(weight)


# What it measures


def test_samples_against_real_images(cli: Cli, place: Path) -> None:
    """The distance of all features at once, by NumPy; and everything that repeats it is in the report."""
    found = report(cli, "samples.npz", *PLAIN)
    samples, real = np.load("samples.npz")["arr_0"], np.load("real.npz")["images"]
    expected = frechet_distance(moments(features(place, samples)), moments(features(place, real)))
    figures = found["figures"]
    assert figures["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    agreed = features(place, samples)[:, :5].argmax(1) == np.arange(60) % 5
    assert figures["class_agreement"] == pytest.approx(agreed.mean())
    assert figures["dimension"] == features(place, samples).shape[1] and "60 images" in found["warnings"][0]
    assert (figures["count"], figures["manifold"], figures["neighbours"]) == (60, [60, 60], 3)
    assert 0 <= figures["precision"] <= 1 and 0 <= figures["recall"] <= 1
    assert (found["images"]["kind"], found["images"]["path"], found["images"]["count"]) == (
        "samples",
        "samples.npz",
        60,
    )
    assert (found["reference"]["kind"], found["reference"]["path"]) == ("data", "real.npz")
    assert found["images"]["shape"] == found["reference"]["shape"] == [8, 8, 3]
    for part in ("images", "extractor"):
        assert len(found[part]["sha256"]) == 64


def test_a_model_is_drawn_as_sample_draws_it(cli: Cli, place: Path) -> None:
    assert cli("sample", "model.onnx", "--count", 40, "--seed", 5, "--sigmas", "80,1.5", "-o", "drawn.npz").code == 0
    drawn = report(cli, "drawn.npz", *PLAIN)["figures"]
    found = report(cli, "model.onnx", "--count", 40, "--seed", 5, "--sigmas", "80,1.5", *PLAIN)
    for name in ("frechet_distance", "precision", "recall", "class_agreement"):
        assert found["figures"][name] == pytest.approx(drawn[name], rel=1e-3), name
    assert found["images"]["sigmas"] == [80, 1.5]
    assert (found["images"]["seed"], found["images"]["labels"], found["images"]["sampler"]) == (5, "all", "multistep")


@pytest.mark.parametrize(
    ("words", "policy"),
    [((), "all classes in turn"), (("--labels", "random"), "random classes"), (("--labels", "3"), "class 3")],
)
def test_how_a_model_was_asked_is_said(cli: Cli, place: Path, words: tuple[str, ...], policy: str) -> None:
    shown = cli("eval", "model.onnx", "--count", 8, "--steps", 1, *words, *PLAIN, "--backend", "ort").out
    assert f"\nlabels            {policy}\n" in shown


def test_levels_may_be_named_as_other_tools_name_them(cli: Cli, place: Path) -> None:
    """Index 22 of 40, as published (arXiv 2303.01469)."""
    openais = report(cli, "model.onnx", "--count", 20, "--ts", "0,22,39", "--grid", 40, *PLAIN)
    assert openais["images"]["sigmas"] == pytest.approx([80, 1.382368], abs=5e-7)
    assert report(cli, "model.onnx", "--count", 20, "--timesteps", "22,0", "--grid", 40, *PLAIN) == openais


@pytest.mark.process
def test_the_bundled_model_needs_nothing_at_hand(cli: Cli) -> None:
    """The shipped extractor and statistics; 200 images of a good model lie far nearer than noise does (159)."""
    found = report(cli, "--count", 200, "--threads", 1)
    assert found["figures"]["frechet_distance"] < 12
    assert found["figures"]["class_agreement"] > 0.8
    assert found["figures"]["precision"] is None
    assert (found["reference"]["kind"], found["reference"]["count"]) == ("statistics", 60_000)


def test_a_table_is_printed(cli: Cli, place: Path) -> None:
    lines = dict(line.split(maxsplit=1) for line in cli("eval", "samples.npz", *PLAIN).out.splitlines())
    assert lines["images"] == "60 of samples.npz" and lines["reference"] == "60 of real.npz"
    assert set(lines) == {
        *("images", "labels", "extractor", "reference", "Frechet", "precision", "recall", "class", "warning")
    }
    assert lines["labels"] == "their own, arr_1" and ", 6 features, resize none" in lines["extractor"]
    assert "60 images and 60 images of the reference, where 6 features take 2048 or more" in lines["warning"]


@pytest.mark.process
def test_a_teacher_is_sampled_by_an_ode_solver(cli: Cli, place: Path) -> None:
    save_checkpoint(exports.checkpoint("boundary", method="edm"), place / "teacher.pt")
    few = report(cli, "teacher.pt", "--count", 20, "--steps", 3, *PLAIN)
    assert few["images"]["sampler"] == "heun" and len(few["images"]["sigmas"]) == 3
    more = report(cli, "teacher.pt", "--count", 20, *PLAIN)
    assert len(more["images"]["sigmas"]) == 18
    assert more["figures"]["frechet_distance"] != few["figures"]["frechet_distance"]
    for option, value in (("--sigmas", "80,1"), ("--ts", "0,39"), ("--timesteps", "22,0"), ("--grid", 40)):
        outcome = cli("eval", "teacher.pt", option, value, *PLAIN)
        assert outcome.code == 1 and f"ODE solver; give its --steps, not {option}" in outcome.err


def test_saved_statistics_are_a_reference(cli: Cli, place: Path) -> None:
    outcome = cli("eval", "samples.npz", "--extractor", "x.onnx", "--save-statistics", "s.npz")  # no reference
    assert outcome.code == 0 and "Frechet" not in outcome.out
    found = report(cli, "samples.npz", "--extractor", "x.onnx", "--reference", "s.npz")
    assert found["figures"]["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert found["figures"]["precision"] is None and found["reference"]["count"] == 60
    with np.load("s.npz") as raw:  # as pytorch-fid would read it
        expected = moments(features(place, np.load("samples.npz")["arr_0"]))
        np.testing.assert_allclose(raw["mu"], expected[0], rtol=1e-4)
        np.testing.assert_allclose(raw["sigma"], expected[1], rtol=1e-2, atol=1e-2)


def test_foreign_statistics_are_a_reference(cli: Cli, place: Path) -> None:
    np.savez("foreign.npz", mu=np.zeros(6), sigma=np.eye(6))
    found = report(cli, "samples.npz", "--extractor", "x.onnx", "--reference", "foreign.npz")
    mean, covariance = moments(features(place, np.load("samples.npz")["arr_0"]))
    expected = frechet_distance((mean, covariance), (np.zeros(6), np.eye(6)))
    assert found["figures"]["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    assert found["reference"]["count"] is None


# What each option changes


@pytest.mark.parametrize(
    "words",
    [
        ("--steps", 1),
        ("--sigmas", "80,0.5"),
        ("--ts", "0,22,39", "--grid", 40),
        ("--timesteps", "22,0", "--grid", 40),
        ("--count", 30),
        ("--seed", 1),
        ("--labels", "3"),
        ("--reference", "samples.npz"),
        ("--output-name", "other"),
        ("--extractor", "floats.onnx", "--range", "0:1"),
        ("--manifold", 10),
    ],
)
def test_an_option_changes_the_figures(cli: Cli, place: Path, words: tuple[object, ...]) -> None:
    plain = report(cli, "model.onnx", "--count", 40, *PLAIN)
    assert report(cli, "model.onnx", "--count", 40, *PLAIN, *words)["figures"] != plain["figures"]


@pytest.mark.parametrize(
    ("words", "part", "key", "value"),
    [
        (("--micro-batch", 7), "images", "micro_batch", 7),
        (("--backend", "ort"), "images", "backend", "ort"),
        (("--device", "cpu"), "extractor", "device", "cpu"),
        (("--threads", 2), "images", "threads", 2),
    ],
)
def test_an_option_of_the_engine_is_in_the_report(
    cli: Cli, place: Path, words: tuple[object, ...], part: str, key: str, value: object
) -> None:
    assert report(cli, "model.onnx", "--count", 20, *PLAIN, *words)[part][key] == value


def test_the_range_changes_the_features(cli: Cli, place: Path) -> None:
    words = ("samples.npz", "--extractor", "floats.onnx", "--reference", "real.npz", "--range")
    distances = [report(cli, *words, given)["figures"]["frechet_distance"] for given in ("0:255", "0:1", "-1:1")]
    assert distances[0] == pytest.approx(255**2 * distances[1], rel=1e-3)
    assert distances[2] == pytest.approx(4 * distances[1], rel=1e-3)


def test_the_split_is_that_of_the_images(cli: Cli) -> None:
    train, test = (report(cli, EXCERPT, "--split", s, "--reference", EXCERPT) for s in ("train", "test"))
    assert train["figures"]["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert (train["figures"]["precision"], train["figures"]["recall"]) == (1, 1)
    assert test["figures"]["frechet_distance"] > 1
    assert (train["images"]["count"], test["images"]["count"], test["reference"]["count"]) == (512, 128, 512)


# What it refuses


def broken(place: Path) -> None:
    """Files that are nearly right."""
    (place / "there.json").touch()
    for name in ("x.onnx", "samples.npz", "model.onnx"):
        content = (place / name).read_bytes()
        (place / f"cut-{name}").write_bytes(content[: len(content) // 2])
    np.savez(place / "nan.npz", np.full((4, 8, 8, 3), np.nan, np.float32))
    np.savez(place / "flat.npz", np.zeros((4, 64), np.uint8))
    np.savez(place / "labels.npz", np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 2, 9]))
    np.savez(place / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(place / "other.npz", mu=np.zeros(6), sigma=np.eye(6), extractor_sha256=np.zeros(32, np.uint8))
    np.savez(place / "one.npz", np.zeros((1, 8, 8, 3), np.uint8))
    (place / "junk.npz").write_bytes(b"junk")


X = ("--extractor", "x.onnx")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("samples.npz", *X), "give --reference"),
        (("model.onnx", *X), "give --reference"),
        (("model.onnx",), "extractor fashion-mnist-classifier.onnx takes 28x28 images of 1 channel"),
        (("samples.npz", "--extractor", "cut-x.onnx"), "is truncated or damaged"),
        (("samples.npz", "--extractor", "none.onnx"), "no such extractor"),
        (("samples.npz", "--extractor", "floats.onnx", "--reference", "real.npz"), "give --range"),
        (("samples.npz", *PLAIN, "--range", "0:1"), "takes uint8"),
        (("samples.npz", *PLAIN, "--output-name", "pool"), "no output 'pool'"),
        (("cut-samples.npz", *PLAIN), "is not a whole .npz"),
        (("junk.npz", *PLAIN), "is not a whole .npz"),
        (("nan.npz", *PLAIN), "NaN"),
        (("flat.npz", *PLAIN), "arr_0 is uint8 (4, 64)"),
        (("labels.npz", *PLAIN), "label 9, but the extractor knows 5 classes"),
        (("one.npz", *PLAIN), "at least two"),
        (("cut-model.onnx", *PLAIN), "truncated"),
        (("none.onnx", *PLAIN), "no such model"),
        (("nowhere", *PLAIN), "no such file or folder"),
        (("samples.npz", *X, "--reference", "wide.npz"), "statistics of 7 features, but the extractor gives 6"),
        (("samples.npz", *X, "--reference", "other.npz"), "another extractor"),
        (("samples.npz", *X, "--reference", "junk.npz"), "junk.npz"),
        (("samples.npz", *X, "--reference", "nowhere"), "no such file or folder"),
        (("samples.npz", *PLAIN, "--steps", 2), "--steps is for models"),
        (("samples.npz", *PLAIN, "--sigmas", "80"), "--sigmas is for models"),
        (("samples.npz", *PLAIN, "--ts", "0,39"), "--ts is for models"),
        (("samples.npz", *PLAIN, "--timesteps", "0"), "--timesteps is for models"),
        (("samples.npz", *PLAIN, "--grid", 40), "--grid is for models"),
        (("samples.npz", *PLAIN, "--count", 5), "--count is for models"),
        (("samples.npz", *PLAIN, "--seed", 0), "--seed is for models"),
        (("samples.npz", *PLAIN, "--labels", "all"), "--labels is for models"),
        (("samples.npz", *PLAIN, "--micro-batch", 5), "--micro-batch is for models"),
        (("real.npz", *PLAIN, "--backend", "ort"), "--backend is for models"),
        (("samples.npz", *PLAIN, "--split", "test"), "--split is for data sets"),
        (("model.onnx", *PLAIN, "--split", "test"), "--split is for data sets"),
        (("real.npz", *PLAIN, "--split", "test"), "no test split"),
        (("samples.npz", *PLAIN, "--manifold", 3), "--manifold must be at least 4"),
        (("samples.npz", *PLAIN, "--threads", 0), "--threads must be at least 1"),
        (("samples.npz", *PLAIN, "--device", "cuda:0"), "cuda:0"),
        (("model.onnx", *PLAIN, "--steps", 2, "--sigmas", "80,1"), "not both"),
        (("model.onnx", *PLAIN, "--ts", "0,39", "--timesteps", "0"), "give ts or timesteps, not both"),
        (("model.onnx", *PLAIN, "--ts", "0,22", "--grid", 40), "leave noise in the images"),
        (("model.onnx", *PLAIN, "--timesteps", "22,0"), "--timesteps needs --grid"),
        (("model.onnx", *PLAIN, "--grid", 40), "leave --grid out"),
        (("model.onnx", *PLAIN, "--count", 0), "count must be at least 1"),
        (("model.onnx", *PLAIN, "--backend", "torch"), "torch backend runs checkpoints"),
        (("samples.npz", *PLAIN, "-o", "report.txt"), "must end in .json"),
        (("samples.npz", *PLAIN, "-o", "nowhere/report.json"), "no folder nowhere"),
        (("samples.npz", *PLAIN, "-o", "there.json"), "there.json exists; replace it with --force"),
        (("samples.npz", *PLAIN, "--save-statistics", "s.json"), "must end in .npz"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    cli: Cli, place: Path, words: tuple[object, ...], message: str
) -> None:
    broken(place)
    before = {path.name for path in place.iterdir()}
    outcome = cli("eval", *words)
    assert outcome.code == 1 and message in outcome.err, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert {path.name for path in place.iterdir()} == before


@pytest.mark.process
def test_without_torch_models_and_samples_are_measured(place: Path) -> None:
    for words in (["samples.npz"], ["model.onnx", "--count", 10]):
        done = exports.command("eval", *words, *PLAIN, cwd=place, start=exports.hiding("torch", "onnx", "pooch"))
        assert done.returncode == 0, done.stderr
