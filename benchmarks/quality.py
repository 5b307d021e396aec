r"""Quality of samples of the Fashion-MNIST model: label agreement and Frechet distance under a fixed judge.

    python benchmarks/quality.py --classifier classifier.pt --model default
    python benchmarks/quality.py --classifier classifier.pt --samples two-step=x.npz --require two-step:84:20

The judge is a classifier trained on the 60000 real training images, and it must reach 91% on the 10000 test
images. *Agreement* is the share of samples to which it gives the label of their request. *Distance* is the
Frechet distance (Heusel et al. 2017, arXiv 1706.08500, eq. 6) between Gaussians fitted to its penultimate
features of the samples and of the training images. A distance means nothing outside its classifier, so it is
read against yardsticks: the real test images, and the first 2000 of them with Gaussian pixel noise of
standard deviation 10 to 30 (of 255) added, rounded and clipped. A small set lies farther off than a large
one, so only sets of 2000 are compared with the noise, and ``--require NAME:AGREEMENT:NOISE`` (percent, grey
levels) takes nothing but 2000 samples of balanced labels.

The classifier's recipe: pixels scaled to [-1, 1]; 3x3 convolutions to 32, 64 and 64 channels, the first two
followed by 2x2 max pooling, each by batch normalisation and ReLU; a linear layer to 128, batch normalisation,
ReLU (these 128 numbers are the features); dropout 0.3; a linear layer to 10. AdamW, weight decay 0.05, batch
256, 4 epochs, one cycle of the learning rate up to 0.004 and down to nothing, cross entropy, no augmentation.
With ``--seed 0 --threads 1``, torch 2.13.0: 92.81% of the test images, after two minutes of one core. The
same seed, threads, machine and build of torch give the same classifier; ``--classifier PATH`` keeps it.

Exit status: 0 done and every requirement met; 1 a requirement missed, or a one-line error; 2 usage.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from cm_runtime.errors import CheckpointError, CmRuntimeError, DataError
from cm_runtime.evaluate.frechet import frechet_distance, moments
from cm_runtime.files.atomic import check_writable, write

Array = npt.NDArray[Any]

CLASSES = 10
SET_SIZE = 2000
NOISE_LEVELS = (10, 15, 20, 25, 30)
MINIMUM_ACCURACY = 0.91
STEP_NAMES = {1: "one-step", 2: "two-step", 3: "three-step", 4: "four-step"}
# what torch.load and np.load raise on foreign files, and what taking their content apart raises
_NOT_OURS: tuple[type[Exception], ...] = (
    *(OSError, EOFError, LookupError, TypeError, AttributeError, ValueError, RuntimeError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
)


class Classifier(torch.nn.Module):
    """The judge: (N, 1, 28, 28) uint8 -> (N, 10) float32 logits, through (N, 128) float32 features."""

    def __init__(self) -> None:
        """Draw the weights from torch's global generator."""
        super().__init__()

        def block(inputs: int, outputs: int, *pool: torch.nn.Module) -> list[torch.nn.Module]:
            convolution = torch.nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            return [convolution, *pool, torch.nn.BatchNorm2d(outputs), torch.nn.ReLU()]

        self.trunk = torch.nn.Sequential(
            *block(1, 32, torch.nn.MaxPool2d(2)),
            *block(32, 64, torch.nn.MaxPool2d(2)),
            *block(64, 64),
            torch.nn.Flatten(),
            torch.nn.Linear(64 * 7 * 7, 128, bias=False),
            torch.nn.BatchNorm1d(128),
            torch.nn.ReLU(),
        )
        self.dropout = torch.nn.Dropout(0.3)
        self.head = torch.nn.Linear(128, CLASSES)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """``images``: (N, 1, 28, 28) uint8 -> (N, 128) float32, none negative."""
        features: torch.Tensor = self.trunk(images.float() / 127.5 - 1)
        return features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``images``: (N, 1, 28, 28) uint8 -> (N, 10) float32 logits."""
        logits: torch.Tensor = self.head(self.dropout(self.features(images)))
        return logits


@dataclass(frozen=True)
class Recipe:
    """What, besides the data, decides the classifier. ``learning_rate`` is the peak of its one cycle."""

    epochs: int = 4
    batch: int = 256
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Figures:
    """One set of images as the judge sees it. Shares are 0 to 1; ``by_label``: agreement of each class."""

    name: str
    count: int
    balanced: bool
    agreement: float
    by_label: tuple[float | None, ...]
    distance: float


@dataclass(frozen=True)
class Requirement:
    """Set ``name`` agrees on at least ``agreement`` percent and lies nearer than noise of std ``noise``."""

    name: str
    agreement: float
    noise: int

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Read ``NAME:AGREEMENT:NOISE``, e.g. ``two-step:84:20``. Raises argparse.ArgumentTypeError."""
        name, *numbers = text.rsplit(":", 2)
        try:
            agreement, noise = float(numbers[0]), int(numbers[1])
        except (IndexError, ValueError):
            raise argparse.ArgumentTypeError(f"{text!r} is not like two-step:84:20") from None
        if not name or not 0 <= agreement <= 100 or not 0 < noise <= 255:
            raise argparse.ArgumentTypeError(f"{text!r}: agreement is 0 to 100 (percent), noise 1 to 255")
        return cls(name, agreement, noise)


def train_classifier(
    images: Array, labels: Array, recipe: Recipe, report: Callable[[str], None] | None = None
) -> Classifier:
    """Train the judge on ``images`` (N, 1, 28, 28) uint8, ``labels`` (N,) int64; returned in evaluation mode.

    ``report`` gets a line after each epoch. A last batch that is not full is left out of its epoch. Torch's
    global generator is left as it was.
    """
    x, y = torch.from_numpy(np.array(images)), torch.from_numpy(np.array(labels))
    batch = min(recipe.batch, len(x))
    batches = len(x) // batch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        classifier = Classifier()
        optimizer = torch.optim.AdamW(
            classifier.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=recipe.learning_rate, total_steps=recipe.epochs * batches
        )
        for epoch in range(recipe.epochs):
            total = 0.0
            for index in torch.randperm(len(x))[: batches * batch].view(batches, batch):
                loss = torch.nn.functional.cross_entropy(classifier(x[index]), y[index])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                total += loss.item()
            if report is not None:
                report(f"classifier: epoch {epoch + 1} of {recipe.epochs}, loss {total / batches:.4f}")
    return classifier.eval()


@torch.inference_mode()
def judge(classifier: Classifier, images: Array, batch: int = 500) -> tuple[Array, Array]:
    """``images`` (N, 1, 28, 28) uint8 -> features (N, 128) float32, its labels (N,) int64."""
    features, labels = [], []
    for start in range(0, len(images), batch):
        f = classifier.features(torch.from_numpy(np.array(images[start : start + batch])))
        features.append(f.numpy())
        labels.append(classifier.head(f).argmax(1).numpy())
    return np.concatenate(features), np.concatenate(labels)


def save_classifier(path: Path, classifier: Classifier, recipe: Recipe, accuracy: float) -> None:
    """Write weights, recipe and test accuracy as one file of plain values. Raises OutputError."""
    content = {
        "recipe": asdict(recipe),
        "accuracy": accuracy,
        "torch": str(torch.__version__),
        "state_dict": classifier.state_dict(),
    }
    with write(path) as temporary:
        torch.save(content, temporary)


def load_classifier(path: Path, recipe: Recipe) -> Classifier:
    """Read what `save_classifier` wrote, never unpickling objects; returns it in evaluation mode.

    Raises CheckpointError if the file is something else or was trained by another recipe.
    """
    classifier = Classifier()
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"a {type(content).__name__}, not a dict")
        settings = content["recipe"]
        classifier.load_state_dict(content["state_dict"])
    except _NOT_OURS as error:
        raise CheckpointError(f"{path}: not a classifier kept by this script; name another file") from error
    if settings != asdict(recipe):
        raise CheckpointError(f"{path}: trained as {settings}, asked for {asdict(recipe)}; name another file")
    return classifier.eval()


def add_noise(images: Array, std: float, seed: int) -> Array:
    """``images`` uint8 plus Gaussian noise of ``std`` grey levels, rounded and clipped; same shape."""
    noise = np.random.default_rng(seed).standard_normal(images.shape) * std
    noisy: Array = np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)
    return noisy


def measure(name: str, classifier: Classifier, images: Array, labels: Array, reference: tuple[Array, Array]) -> Figures:
    """Judge ``images`` (N, 1, 28, 28) uint8, requested as ``labels`` (N,), against ``reference``."""
    features, answers = judge(classifier, images)
    right = answers == labels
    counts = np.bincount(labels, minlength=CLASSES)
    hits = np.bincount(labels[right], minlength=CLASSES)
    return Figures(
        name=name,
        count=len(labels),
        balanced=int(counts.max() - counts.min()) <= 1,
        agreement=float(right.mean()),
        by_label=tuple(float(h / n) if n else None for h, n in zip(hits, counts, strict=True)),
        distance=frechet_distance(moments(features), reference),
    )


def read_data(source: str, split: Literal["train", "test"]) -> tuple[Array, Array]:
    """Read one half of Fashion-MNIST, or of another set of its kind, from a folder or by its name.

    Returns images (N, 1, 28, 28) uint8 and labels (N,) int64. Raises DataError.
    """
    from cm_runtime.training.data import open_data

    data = open_data(source, split=split, progress=sys.stderr.isatty())
    if data.image_shape != (1, 28, 28) or data.images.dtype != np.uint8:
        raise DataError(f"{source}: {data.images.dtype} images {data.image_shape}, not uint8 (1, 28, 28)")
    if data.labels is None or data.num_classes != CLASSES:
        raise DataError(f"{source}: {data.num_classes} classes of images, not {CLASSES}")
    return data.images, data.labels


def read_samples(path: Path) -> tuple[Array, Array]:
    """Read ``cm-runtime sample -o x.npz``: ``arr_0`` (N, 28, 28, 1) uint8, ``arr_1`` (N,) integers 0 to 9.

    Returns images (N, 1, 28, 28) uint8 and labels (N,) int64. Raises DataError.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["arr_0"], file["arr_1"]
    except _NOT_OURS as error:
        raise DataError(f"{path}: not an npz file with arr_0 (images) and arr_1 (labels): {error}") from error
    return _check(str(path), images, labels)


def draw_samples(model: str, steps: int, seed: int, count: int = SET_SIZE) -> tuple[Array, Array]:
    """Draw ``count`` images with labels i mod 10 by cm_runtime; ``model``: a path, or ``default``.

    Returns images (N, 1, 28, 28) uint8 and labels (N,) int64. Raises CmRuntimeError.
    """
    import cm_runtime as cm

    engine = cm.load() if model == "default" else cm.load(model)
    images = cm.sample(engine, count=count, steps=steps, seed=seed)
    return _check(f"{steps}-step samples of {model}", np.asarray(images), np.arange(count) % CLASSES)


def _check(name: str, images: Array, labels: Array) -> tuple[Array, Array]:
    """NHWC images and labels -> NCHW images and int64 labels. Raises DataError naming ``name``."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (28, 28, 1):
        raise DataError(f"{name}: images are {images.dtype} {images.shape}, not uint8 (N, 28, 28, 1)")
    if len(images) < 2 or labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{name}: {len(images)} images with labels {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise DataError(f"{name}: labels from {labels.min()} to {labels.max()}, not 0 to {CLASSES - 1}")
    return images.transpose(0, 3, 1, 2), labels.astype(np.int64)


def nearest_above(distance: float, yardsticks: Mapping[int, Figures]) -> int | None:
    """The lowest noise level whose distance is greater than ``distance``; None if it lies above them all."""
    return min((level for level, y in yardsticks.items() if y.distance > distance), default=None)


def misses(requirement: Requirement, samples: Figures, yardsticks: Mapping[int, Figures]) -> list[str]:
    """The failures of ``samples`` to meet ``requirement``, a line each."""
    lines = []
    limit = yardsticks[requirement.noise].distance
    if samples.count != SET_SIZE or not samples.balanced:
        kind = "balanced" if samples.balanced else "unbalanced"
        lines.append(f"{samples.count} samples of {kind} labels, not {SET_SIZE} of balanced labels")
    if not samples.agreement * 100 >= requirement.agreement:
        lines.append(f"agreement {samples.agreement:.2%} is less than {requirement.agreement:g}%")
    if not samples.distance < limit:
        lines.append(f"distance {samples.distance:.3f} is not below noise {requirement.noise} ({limit:.3f})")
    return [f"{requirement.name}: {line}" for line in lines]


def table(rows: Sequence[Figures], yardsticks: Mapping[int, Figures]) -> str:
    """One line for each of ``rows``: name, N, agreement, distance, and the yardstick it is under."""
    width = max(4, *(len(row.name) for row in rows))
    lines = [f"{'name':<{width}}  {'N':>6}  agreement  distance  under"]
    for row in rows:
        level = nearest_above(row.distance, yardsticks)
        under = "-" if row.count != SET_SIZE else f"noise {level}" if level else "none"
        figures = f"{row.count:>6}  {row.agreement:>9.2%}  {row.distance:>8.3f}"
        lines.append(f"{row.name:<{width}}  {figures}  {under}")
    return "\n".join(lines)


def _parse_samples(text: str) -> tuple[str, Path]:
    """``NAME=PATH``, or ``PATH`` alone, which is named by its stem."""
    name, separator, path = text.partition("=")
    if separator and name and "/" not in name:
        return name, Path(path)
    return Path(text).stem, Path(text)


def _parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Label agreement and Frechet distance of Fashion-MNIST samples against noise.",
        epilog="Exit status: 0 done, 1 a requirement missed or an error, 2 usage.",
    )
    add = parser.add_argument
    add("--data", default="fashion-mnist", help="folder of IDX files, or a name to download (%(default)s)")
    add("--classifier", type=Path, metavar="PATH", help="read the classifier, or train it and keep it here")
    add("--samples", type=_parse_samples, action="append", default=[], metavar="[NAME=]NPZ", help="may be repeated")
    add("--model", metavar="PATH", help=f"draw {SET_SIZE} samples of it; 'default': the bundled one")
    add("--steps", type=int, action="append", metavar="K", help="with --model, may be repeated (1 and 2)")
    add("--require", type=Requirement.parse, action="append", default=[], metavar="NAME:AGREEMENT:NOISE")
    add("--seed", type=int, default=0, help="of the classifier and of the yardsticks' noise (%(default)s)")
    add("--sample-seed", type=int, default=0, metavar="SEED", help="of --model's samples (%(default)s)")
    add("--threads", type=int, metavar="T", help="threads of torch; the classifier's last bits depend on it")
    add("--json", type=Path, metavar="PATH", help="write all figures here")
    return parser


def _measure(options: argparse.Namespace, report: Callable[[str], None]) -> int:
    """Train or load the judge, measure, print, write; returns the exit status."""
    has_classifier = options.classifier is not None and options.classifier.exists()
    for path in (None if has_classifier else options.classifier, options.json):
        if path is not None:
            check_writable(path)
    train_images, train_labels = read_data(options.data, "train")
    test_images, test_labels = read_data(options.data, "test")

    recipe = Recipe(seed=options.seed)
    if has_classifier:
        classifier = load_classifier(options.classifier, recipe)
    else:
        classifier = train_classifier(train_images, train_labels, recipe, report)
    accuracy = float((judge(classifier, test_images)[1] == test_labels).mean())
    if accuracy < MINIMUM_ACCURACY:
        raise CmRuntimeError(
            f"the classifier is right on {accuracy:.2%} of the test images, less than {MINIMUM_ACCURACY:.0%}"
        )
    if options.classifier is not None and not has_classifier:
        save_classifier(options.classifier, classifier, recipe, accuracy)
    report(f"classifier: right on {accuracy:.2%} of {len(test_labels)} test images")

    reference = moments(judge(classifier, train_images)[0])
    real = measure("real test images", classifier, test_images, test_labels, reference)
    yardsticks = {}
    for level in sorted({*NOISE_LEVELS, *(r.noise for r in options.require)}):
        noisy = add_noise(test_images[:SET_SIZE], level, options.seed)
        yardsticks[level] = measure(f"noise {level}", classifier, noisy, test_labels[:SET_SIZE], reference)

    samples = {}
    for name, path in options.samples:
        samples[name] = measure(name, classifier, *read_samples(path), reference)
    for name, steps in options.requests.items():
        report(f"{name}: drawing {SET_SIZE} samples")
        images = draw_samples(options.model, steps, options.sample_seed)
        samples[name] = measure(name, classifier, *images, reference)

    print(table([real, *yardsticks.values(), *samples.values()], yardsticks))
    failures = [line for r in options.require for line in misses(r, samples[r.name], yardsticks)]
    for line in failures:
        print(f"missed: {line}")
    if options.require and not failures:
        print("every requirement met")
    if options.json is not None:
        content = {
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "threads": torch.get_num_threads(),
            "classifier": {"accuracy": accuracy, **asdict(recipe)},
            "model": options.model,
            "sample_seed": options.sample_seed if options.model else None,
            "real": asdict(real),
            "noise": {str(level): asdict(y) for level, y in yardsticks.items()},
            "samples": [asdict(s) for s in samples.values()],
            "requirements": [asdict(r) for r in options.require],
            "missed": failures,
        }
        with write(options.json) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    return 1 if failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments``, by default the process's own, and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.steps and not options.model:
        parser.error("--steps needs --model")
    steps = (options.steps or [1, 2]) if options.model else []
    if any(k < 1 for k in steps):
        parser.error("--steps must be at least 1")
    if not all(0 <= seed < 2**64 for seed in (options.seed, options.sample_seed)):
        parser.error("seeds are 0 to 2^64 - 1")
    options.requests = {STEP_NAMES.get(k, f"{k}-step"): k for k in steps}
    names = [name for name, _ in options.samples] + list(options.requests)
    if len(set(names)) < len(names):
        parser.error(f"two sets of samples have one name: {', '.join(names)}")
    unknown = [r.name for r in options.require if r.name not in names]
    if unknown:
        parser.error(f"--require {unknown[0]}: no samples of that name ({', '.join(names) or 'none given'})")
    if options.threads is not None:
        if options.threads < 1:
            parser.error("--threads must be at least 1")
        torch.set_num_threads(options.threads)
    try:
        return _measure(options, lambda line: print(line, file=sys.stderr))
    except CmRuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
