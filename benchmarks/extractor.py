r"""Make the extractor that ships with cm-runtime, and the statistics of the data under it.

    python benchmarks/extractor.py --data fashion-mnist --threads 1 --out cm_runtime/models

It is the classifier of ``quality.py``, architecture and recipe, drawn from another seed: what `cm-runtime tune` makes
good under this one can then be judged by that one, which had no part in it. Its weights are rounded to float16; the
graph takes uint8 (N, 28, 28, 1) and gives ``features`` (N, 128) and ``logits`` (N, 10), float32.

Writes ``fashion-mnist-classifier.onnx`` and ``fashion-mnist-statistics.npz``: mean and covariance, float32, of the
features of all training images as ONNX Runtime gives them. ``--classifier PATH`` keeps the torch weights, or takes
those of the file. Exit status: 0 done, 1 a one-line error, 2 usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from quality import CLASSES, MINIMUM_ACCURACY, Classifier, Recipe, judge, load_classifier, read_data, save_classifier
from quality import train_classifier as train
from torch_graph import detach, strip

from cm_runtime.errors import CmRuntimeError
from cm_runtime.evaluate.extractor import Extractor
from cm_runtime.evaluate.extractor_metadata import METADATA_KEY, Preparation
from cm_runtime.evaluate.metrics import observe
from cm_runtime.evaluate.sources import array_batches
from cm_runtime.evaluate.statistics import write_statistics
from cm_runtime.export import weights_file
from cm_runtime.export.to_onnx import store_halves
from cm_runtime.export.torch_exporter import quiet
from cm_runtime.files.atomic import check_writable, write

SEED = 1
MODEL, STATISTICS = "fashion-mnist-classifier.onnx", "fashion-mnist-statistics.npz"
OPSET = 20


class _Graph(torch.nn.Module):
    """uint8 (N, 28, 28, 1) -> features (N, 128), logits (N, 10)."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.classifier.features(images.permute(0, 3, 1, 2))
        return features, self.classifier.head(features)


def round_weights(classifier: Classifier) -> Classifier:
    """The same classifier with every weight one that float16 holds, in evaluation mode."""
    copy = Classifier()
    copy.load_state_dict({k: v.half().to(v.dtype) for k, v in classifier.state_dict().items()})
    return copy.eval()


def export(classifier: Classifier, path: Path) -> None:
    """Write the ONNX graph of a classifier of `round_weights`, whole or not at all."""
    images = torch.zeros(2, 28, 28, 1, dtype=torch.uint8)
    with quiet():
        program = torch.onnx.export(
            _Graph(classifier).eval(),
            (images,),
            dynamo=True,
            optimize=False,  # it would fold the normalisations into numbers that float16 does not hold
            opset_version=OPSET,
            input_names=["images"],
            output_names=["features", "logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("N", min=1, max=1 << 20)}},
            verbose=False,
        )
    assert program is not None  # the exporter's type allows it for another mode
    network = detach(program.model)
    graph = network.graph
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    del graph.graph.value_info[:]
    strip(graph)
    store_halves(network)
    preparation = Preparation(layout="NHWC", value_range="0:255", resize="none", features="features", logits="logits")
    onnx.helper.set_model_props(graph, {METADATA_KEY: preparation.model_dump_json()})
    with write(path) as temporary:
        weights_file.write(network, temporary)
        onnx.checker.check_model(str(temporary), full_check=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Makes the extractor that ships with cm-runtime.")
    add = parser.add_argument
    add("--data", default="fashion-mnist", help="folder of IDX files, or a name to download (%(default)s)")
    add("--classifier", type=Path, metavar="PATH", help="read the torch classifier, or train it and keep it here")
    add("--out", type=Path, default=Path("."), metavar="DIR", help="where the two files go (%(default)s)")
    add("--threads", type=int, default=1, metavar="T", help="threads of torch (%(default)s)")
    return parser


def _make(options: argparse.Namespace) -> None:
    for name in (MODEL, STATISTICS):
        check_writable(options.out / name)
    recipe = Recipe(seed=SEED)
    images, labels = read_data(options.data, "train")
    test_images, test_labels = read_data(options.data, "test")
    is_kept = options.classifier is not None and options.classifier.exists()
    classifier = load_classifier(options.classifier, recipe) if is_kept else train(images, labels, recipe, _report)
    half = round_weights(classifier)
    accuracy = float((judge(half, test_images)[1] == test_labels).mean())
    if accuracy < MINIMUM_ACCURACY:
        raise CmRuntimeError(f"the classifier is right on {accuracy:.2%} of the test images, less than it must be")
    if options.classifier is not None and not is_kept:
        save_classifier(options.classifier, classifier, recipe, accuracy)
    export(half, options.out / MODEL)
    extractor = Extractor(options.out / MODEL, threads=options.threads)
    content = observe(array_batches(images, labels), extractor, classes=CLASSES)
    write_statistics(options.out / STATISTICS, content.statistics, np.float32)
    print(f"{options.out / MODEL}: right on {accuracy:.2%} of {len(test_labels)} test images")
    print(f"{options.out / STATISTICS}: {content.statistics.count} images, right on {content.agreement:.2%} of them")


def _report(line: str) -> None:
    print(line, file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments``, by default the process's own, and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    torch.set_num_threads(options.threads)
    try:
        _make(options)
    except CmRuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
