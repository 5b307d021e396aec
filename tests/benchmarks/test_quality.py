"""benchmarks/quality.py: the distance against closed forms and SciPy, the noise, the gate, the classifier."""

import functools
import importlib.util
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from cm_runtime.errors import CheckpointError, DataError

ROOT = Path(__file__).resolve().parents[2]
EXCERPT = ROOT / "tests" / "data" / "fashion-mnist"
SHORT = {"epochs": 10, "batch": 64}


def _import() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_quality", ROOT / "benchmarks" / "quality.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


quality = _import()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's rounding depends on its threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The noise yardsticks


@pytest.mark.parametrize("std", [10, 20, 30])
def test_noise_has_its_standard_deviation(std: int) -> None:
    """On mid grey nothing clips: variance std^2 + 1/12 of the rounding. On black: P(n > k - 1/2), k = 1.."""
    count = 500 * 784
    grey = quality.add_noise(np.full((500, 1, 28, 28), 128, np.uint8), std, seed=0)
    assert grey.dtype == np.uint8 and grey.shape == (500, 1, 28, 28)
    assert grey.mean() == pytest.approx(128, abs=5 * std / count**0.5)
    assert grey.std() == pytest.approx((std**2 + 1 / 12) ** 0.5, rel=5 / (2 * count) ** 0.5)
    black = quality.add_noise(np.zeros((500, 1, 28, 28), np.uint8), std, seed=0)
    expected = scipy.stats.norm.sf((np.arange(1, 256) - 0.5) / std).sum()
    assert black.mean() == pytest.approx(expected, abs=5 * std / count**0.5)
    assert (black == 0).mean() == pytest.approx(scipy.stats.norm.cdf(0.5 / std), abs=5 * 0.5 / count**0.5)
    white = quality.add_noise(np.full((500, 1, 28, 28), 255, np.uint8), std, seed=0)
    assert 255 - white.mean() == pytest.approx(expected, abs=5 * std / count**0.5)


def test_noise_is_a_function_of_its_seed() -> None:
    """And leaves its input alone."""
    images = np.full((3, 1, 28, 28), 100, np.uint8)
    first = quality.add_noise(images, 20, seed=0)
    assert np.array_equal(first, quality.add_noise(images, 20, seed=0))
    assert not np.array_equal(first, quality.add_noise(images, 20, seed=1))
    assert (images == 100).all()


# The gate, on planted figures


def figures(name: str, agreement: float, distance: float, count: int = 2000, balanced: bool = True) -> Any:
    """Planted figures."""
    return quality.Figures(name, count, balanced, agreement, (agreement,) * 10, distance)


YARDSTICKS = {level: figures(f"noise {level}", 0.9, float(level)) for level in (10, 15, 20, 25, 30)}


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (figures("two-step", 0.84, 19.99), []),
        (figures("two-step", 0.8395, 19.99), ["83.95% is less than 84%"]),
        (figures("two-step", 0.84, 20.0), ["20.000 is not below noise 20 (20.000)"]),
        (figures("two-step", 0.5, 99.0), ["50.00%", "99.000"]),
        (figures("two-step", 0.99, 0.1, count=1999), ["1999 samples of balanced labels"]),
        (figures("two-step", 0.99, 0.1, balanced=False), ["2000 samples of unbalanced labels"]),
        (figures("two-step", float("nan"), float("nan")), ["less than 84%", "not below noise 20"]),
    ],
)
def test_misses_names_what_fell_short(samples: Any, words: list[str]) -> None:
    """Agreement at least, distance strictly below, 2000 balanced samples; NaN meets nothing."""
    lines = quality.misses(quality.Requirement.parse("two-step:84:20"), samples, YARDSTICKS)
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert line.startswith("two-step: ") and word in line


@pytest.mark.parametrize(("distance", "level"), [(0.0, 10), (10.0, 15), (19.9, 20), (29.0, 30), (30.0, None)])
def test_nearest_above_is_the_lowest_noise_that_is_farther(distance: float, level: int | None) -> None:
    """Strictly farther."""
    assert quality.nearest_above(distance, YARDSTICKS) == level


def test_table_says_nothing_of_sets_of_another_size() -> None:
    """Only 2000 samples compare with the noise."""
    rows = [figures("a", 0.8512, 12.0), figures("b", 0.9, 12.0, count=100), figures("c", 0.1, 99.0)]
    lines = quality.table(rows, YARDSTICKS).splitlines()
    assert [line.split()[-1] for line in lines] == ["under", "15", "-", "none"]
    assert "85.12%" in lines[1]


# The classifier


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier trained on the excerpt, as `--classifier` keeps it."""
    path = tmp_path_factory.mktemp("quality") / "classifier.pt"
    recipe = quality.Recipe(**SHORT)
    classifier = quality.train_classifier(*quality.read_data(str(EXCERPT), "train"), recipe)
    quality.save_classifier(path, classifier, recipe, 0.5)
    return path


@pytest.mark.process
def test_training_is_deterministic_and_leaves_the_generator_alone() -> None:
    """Bit for bit, whatever the global generator did before."""
    images, labels = quality.read_data(str(EXCERPT), "train")
    recipe = quality.Recipe(epochs=1, batch=128)
    state = torch.random.get_rng_state()
    first = quality.train_classifier(images, labels, recipe)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(5)
    again = quality.train_classifier(images, labels, recipe)
    other = quality.train_classifier(images, labels, quality.Recipe(epochs=1, batch=128, seed=1))
    features = [quality.judge(c, images[:100])[0] for c in (first, again, other)]
    assert features[0].shape == (100, 128) and features[0].min() >= 0
    assert np.array_equal(features[0], features[1])
    assert not np.array_equal(features[0], features[2])


@pytest.mark.process
def test_training_learns_and_the_kept_file_judges_alike(kept: Path) -> None:
    """Ten short epochs are enough for far more than chance."""
    images, labels = quality.read_data(str(EXCERPT), "test")
    classifier = quality.load_classifier(kept, quality.Recipe(**SHORT))
    features, given = quality.judge(classifier, images)
    assert (given == labels).mean() > 0.6
    pieces, pieces_given = quality.judge(classifier, images, batch=7)
    np.testing.assert_allclose(pieces, features, atol=1e-4)
    assert (pieces_given == given).mean() > 0.98


def test_measure_counts_agreement_by_label(kept: Path) -> None:
    """Asked for what the judge gives, but for one quarter."""
    images, _ = quality.read_data(str(EXCERPT), "test")
    classifier = quality.load_classifier(kept, quality.Recipe(**SHORT))
    features, given = quality.judge(classifier, images)
    asked = given.copy()
    asked[: len(asked) // 4] = (asked[: len(asked) // 4] + 1) % 10
    found = quality.measure("x", classifier, images, asked, quality.moments(features))
    assert found.agreement == 0.75 and found.count == 128 and found.distance < 1e-6
    for label, share in enumerate(found.by_label):
        mine = asked == label
        assert share == (pytest.approx((given == asked)[mine].mean()) if mine.any() else None)


def test_load_refuses_pickles_foreign_files_and_other_recipes(kept: Path, tmp_path: Path) -> None:
    """Each by one line that names the file."""
    recipe = quality.Recipe(**SHORT)
    evil, text, tensor = tmp_path / "evil.pt", tmp_path / "text.pt", tmp_path / "tensor.pt"
    evil.write_bytes(pickle.dumps(print, protocol=2))
    text.write_text("not a classifier")
    torch.save(torch.zeros(3), tensor)
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(kept.read_bytes()[:-100])
    for path in (evil, text, tensor, truncated, tmp_path / "missing.pt"):
        with pytest.raises(CheckpointError, match="not a classifier"):
            quality.load_classifier(path, recipe)
    with pytest.raises(CheckpointError, match="'seed': 1"):
        quality.load_classifier(kept, quality.Recipe(**SHORT, seed=1))


# The command line


def write_balanced(path: Path, images: Any, labels: Any, count: int = 2000) -> Any:
    """Write ``count`` of ``images``, taken in turn for the labels i mod 10, as `cm-runtime sample` does."""
    asked = np.arange(count) % 10
    places = [np.flatnonzero(labels == label) for label in range(10)]
    chosen = [places[k][(i // 10) % len(places[k])] for i, k in enumerate(asked)]
    np.savez(path, arr_0=images[chosen].transpose(0, 2, 3, 1), arr_1=asked, seed=0)
    return images[chosen].transpose(0, 2, 3, 1)


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The excerpt is too small for 91%, and needs a recipe of its own."""
    monkeypatch.setattr(quality, "MINIMUM_ACCURACY", 0.5)
    monkeypatch.setattr(quality, "Recipe", functools.partial(quality.Recipe, **SHORT))


@pytest.mark.process
@pytest.mark.usefixtures("lenient")
def test_gate_from_files_to_exit_status(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training images meet the requirements, random pixels do not; `--model` draws through cm.sample."""
    images, labels = quality.read_data(str(EXCERPT), "train")
    good, bad, figures_path = tmp_path / "good.npz", tmp_path / "bad.npz", tmp_path / "figures.json"
    drawn = write_balanced(good, images, labels)
    write_balanced(bad, np.random.default_rng(0).integers(0, 256, images.shape, np.uint8), labels)
    common = ["--data", str(EXCERPT), "--classifier", str(kept), "--samples", f"two-step={good}"]

    assert quality.main([*common, "--require", "two-step:60:12", "--json", str(figures_path)]) == 0
    output = capsys.readouterr().out
    assert "every requirement met" in output and "missed" not in output
    written = json.loads(figures_path.read_text())
    assert list(written["noise"]) == ["10", "12", "15", "20", "25", "30"]
    assert written["classifier"]["seed"] == 0 and 0.5 < written["classifier"]["accuracy"] < 1
    assert written["torch"] == torch.__version__ and written["missed"] == []
    assert written["samples"][0]["distance"] < written["noise"]["10"]["distance"]
    assert {path.name for path in tmp_path.iterdir()} == {"good.npz", "bad.npz", "figures.json"}

    arguments = ["--samples", str(bad), "--require", "two-step:60:20", "--require", "bad:60:20"]
    assert quality.main([*common, *arguments]) == 1
    missed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missed: ")]
    assert len(missed) == 2
    assert "bad: agreement" in missed[0] and "bad: distance" in missed[1]

    asked: list[Any] = []

    def sample(model: Any, **options: int) -> Any:
        asked.append((model, options))
        return drawn

    monkeypatch.setattr("cm_runtime.load", lambda *path: path, raising=False)
    monkeypatch.setattr("cm_runtime.sample", sample, raising=False)
    command = ["--data", str(EXCERPT), "--classifier", str(kept), "--model", "m.onnx", "--steps", "2"]
    assert quality.main([*command, "--require", "two-step:60:20"]) == 0
    assert asked == [(("m.onnx",), {"count": 2000, "steps": 2, "seed": 0})]


@pytest.mark.process
def test_weak_classifier_is_refused_and_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four epochs of 512 images are not enough for 91%."""
    path = tmp_path / "classifier.pt"
    assert quality.main(["--data", str(EXCERPT), "--classifier", str(path)]) == 1
    assert "less than 91%" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_unlabelled_data_and_missing_folders_are_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before minutes of training, in one line."""
    images = EXCERPT / "train-images-idx3-ubyte.gz"
    assert quality.main(["--data", str(images)]) == 1
    assert "0 classes" in capsys.readouterr().err
    for option in ("--classifier", "--json"):
        assert quality.main(["--data", str(EXCERPT), option, str(tmp_path / "missing" / "x")]) == 1
        error = capsys.readouterr().err
        assert "missing" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "2"],
        ["--model", "m.onnx", "--steps", "0"],
        ["--require", "two-step:84:20"],
        ["--samples", "a=x.npz", "--samples", "a=y.npz"],
        ["--samples", "a=x.npz", "--require", "a:84"],
        ["--samples", "a=x.npz", "--require", "a:101:20"],
        ["--samples", "a=x.npz", "--require", "a:84:none"],
        ["--threads", "0"],
        ["--seed", "-1"],
    ],
)
def test_usage_errors(arguments: list[str]) -> None:
    """Found before any work is done."""
    with pytest.raises(SystemExit) as raised:
        quality.main(arguments)
    assert raised.value.code == 2


def test_samples_that_are_not_samples(tmp_path: Path) -> None:
    """Wrong types, shapes, labels and files; int32 labels are fine."""
    images, labels = np.zeros((10, 28, 28, 1), np.uint8), np.arange(10)
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=images, arr_1=labels.astype(np.int32))
    read, asked = quality.read_samples(path)
    assert read.shape == (10, 1, 28, 28) and asked.dtype == np.int64
    wrong: list[tuple[Any, Any]] = [
        (images.astype(np.float32), labels),
        (images.transpose(0, 3, 1, 2), labels),
        (images, labels[:9]),
        (images, labels + 1),
        (images, labels - 1),
        (images, labels * 1.0),
        (images[:0], labels[:0]),
        (images, labels.astype(object)),
    ]
    for a, b in wrong:
        np.savez(path, arr_0=a, arr_1=b)
        with pytest.raises(DataError, match=r"x\.npz"):
            quality.read_samples(path)
    np.savez(path, images=images)
    with pytest.raises(DataError, match="arr_0"):
        quality.read_samples(path)
    np.save(tmp_path / "x.npz.npy", images)
    for content in [b"", b"text", path.read_bytes()[:-50], (tmp_path / "x.npz.npy").read_bytes()]:
        path.write_bytes(content)
        with pytest.raises(DataError, match="not an npz file"):
            quality.read_samples(path)
