"""cm_runtime/evaluate/extractor.py on small graphs that NumPy can follow, and the extractor that ships."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import extractors
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from cm_runtime.errors import ArtifactError, CmRuntimeError, EngineError, RequestError
from cm_runtime.evaluate.extractor import SHIPPED, Extractor
from cm_runtime.training.data import open_data

ROOT = Path(__file__).parents[2]
EXCERPT = ROOT / "tests" / "data" / "fashion-mnist"
NAMED = {"features": np.eye(64, 5, dtype=np.float32), "other": np.eye(64, 3, dtype=np.float32)}


def pictures(rng: np.random.Generator, *shape: int) -> Any:
    return rng.integers(0, 256, shape, dtype=np.uint8)


# What reaches the graph


def test_uint8_images_reach_the_graph_as_they_are(tmp_path: Path, rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((64, 5)).astype(np.float32)
    images = pictures(rng, 7, 8, 8, 1)
    made = Extractor(extractors.linear(tmp_path / "e.onnx", outputs={"features": matrix}))(images)
    np.testing.assert_allclose(made.features, images.reshape(7, 64) @ matrix, rtol=1e-5, atol=1e-3)
    assert made.logits is None


@pytest.mark.parametrize(("value_range", "low", "high"), [("-1:1", -1, 1), ("0:1", 0, 1), ("0:255", 0, 255)])
def test_black_and_white_are_what_the_option_says(
    tmp_path: Path, rng: np.random.Generator, value_range: str, low: float, high: float
) -> None:
    path = extractors.linear(tmp_path / "e.onnx", kind=TensorProto.FLOAT)
    images = pictures(rng, 3, 8, 8, 1)
    images[0, 0, :2, 0] = 0, 255
    found = Extractor(path, value_range=value_range)(images).features
    assert found[0, :2].tolist() == pytest.approx([low, high])
    np.testing.assert_allclose(found, low + images.reshape(3, 64) / 255 * (high - low), rtol=1e-5, atol=1e-6)


def test_channels_go_where_the_graph_has_them(tmp_path: Path, rng: np.random.Generator) -> None:
    images = pictures(rng, 3, 8, 8, 3)
    first = Extractor(extractors.linear(tmp_path / "a.onnx", ("N", 3, 8, 8)))(images)
    last = Extractor(extractors.linear(tmp_path / "b.onnx", ("N", 8, 8, 3)))(images)
    assert np.array_equal(first.features, images.transpose(0, 3, 1, 2).reshape(3, -1))
    assert np.array_equal(last.features, images.reshape(3, -1))


def test_grey_images_are_repeated_for_a_colour_graph(tmp_path: Path, rng: np.random.Generator) -> None:
    images = pictures(rng, 3, 8, 8, 1)
    extractor = Extractor(extractors.linear(tmp_path / "e.onnx", ("N", 3, 8, 8)))
    assert np.array_equal(extractor(images).features, np.tile(images.reshape(3, 64), 3))
    assert extractor.describe((8, 8, 1))["channels"] == "grey repeated 3 times"
    assert extractor.describe((8, 8, 3))["channels"] == "as they are"


@pytest.mark.parametrize("size", [(19, 13), (5, 4)])
def test_other_sizes_are_resized_as_torch_does_with_antialiasing(
    tmp_path: Path, rng: np.random.Generator, size: tuple[int, int]
) -> None:
    """Another implementation of the same filter, up and down; then clipped, and not rounded."""
    images = pictures(rng, 3, 8, 8, 3)
    path = extractors.linear(tmp_path / "e.onnx", ("N", 3, *size), kind=TensorProto.FLOAT)
    extractor = Extractor(path, value_range="0:255")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    expected = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255)
    np.testing.assert_allclose(extractor(images).features, expected.reshape(3, -1).numpy(), atol=2e-2)
    assert "bicubic" in extractor.describe((8, 8, 3))["resize"]
    assert extractor.describe((*size, 3))["resize"] == "none"
    whole = Extractor(extractors.linear(tmp_path / "u.onnx", ("N", 3, *size)))
    np.testing.assert_array_equal(whole(images).features, np.rint(extractor(images).features))
    assert "rounded" in whole.describe((8, 8, 3))["resize"]


def test_a_graph_of_any_size_takes_images_as_they_are(tmp_path: Path, rng: np.random.Generator) -> None:
    images = pictures(rng, 3, 4, 4, 3)
    path = extractors.linear(tmp_path / "e.onnx", ("N", 3, "H", "W"), {"features": np.eye(48, dtype=np.float32)})
    assert np.array_equal(Extractor(path)(images).features, images.transpose(0, 3, 1, 2).reshape(3, -1))


@pytest.mark.parametrize("count", [1, 3, 7, 255, 300])
@pytest.mark.parametrize("batch", ["N", 1, 4])
def test_any_number_of_images_goes_through_any_batch(
    tmp_path: Path, rng: np.random.Generator, count: int, batch: int | str
) -> None:
    images = pictures(rng, count, 8, 8, 1)
    found = Extractor(extractors.linear(tmp_path / "e.onnx", (batch, 8, 8, 1)))(images)
    assert np.array_equal(found.features, images.reshape(count, 64))


def test_outputs_are_chosen_by_name(tmp_path: Path, rng: np.random.Generator) -> None:
    images = pictures(rng, 3, 8, 8, 1)
    path = extractors.linear(tmp_path / "e.onnx", outputs=NAMED)
    assert Extractor(path)(images).features.shape == (3, 5)
    assert Extractor(path, output_name="other")(images).features.shape == (3, 3)
    both = extractors.linear(tmp_path / "l.onnx", outputs={"logits": NAMED["other"], "pool": NAMED["features"]})
    made = Extractor(both, output_name="pool")(images)
    assert made.logits is not None and (made.features.shape, made.logits.shape) == ((3, 5), (3, 3))
    assert Extractor(both, output_name="logits")(images).logits is None


def test_features_of_one_by_one_pictures_are_rows(tmp_path: Path, rng: np.random.Generator) -> None:
    """As global pooling leaves them."""
    pool = helper.make_node("GlobalAveragePool", ["images"], ["features"])
    ends = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 8, 8]),
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 3, 1, 1]),
    ]
    path = extractors.save(tmp_path / "e.onnx", [pool], ends[:1], ends[1:])
    images = pictures(rng, 5, 8, 8, 3)
    found = Extractor(path, value_range="0:255")(images).features
    np.testing.assert_allclose(found, images.mean((1, 2)), rtol=1e-5)


def test_what_a_file_says_is_taken(tmp_path: Path, rng: np.random.Generator) -> None:
    images = pictures(rng, 3, 8, 8, 1)
    said = json.dumps({**extractors.OURS, "value_range": "-1:1", "features": "other"})
    path = extractors.linear(tmp_path / "e.onnx", outputs=NAMED, kind=TensorProto.FLOAT, metadata=said)
    found = Extractor(path)(images).features
    np.testing.assert_allclose(found, images.reshape(3, 64)[:, :3] / 127.5 - 1, atol=1e-6)


# What is refused


@pytest.mark.parametrize(
    ("graph", "options", "error", "words"),
    [
        ({"kind": TensorProto.FLOAT}, {}, RequestError, r"give --range -1:1\|0:1\|0:255"),
        ({"kind": TensorProto.FLOAT}, {"value_range": "0:2"}, RequestError, "--range is one of"),
        ({}, {"value_range": "0:1"}, RequestError, "takes uint8, which is 0:255"),
        ({"outputs": {"a": np.eye(64), "b": np.eye(64)}}, {}, RequestError, r"--output-name a\|b"),
        ({"outputs": NAMED}, {"output_name": "pool"}, RequestError, "no output 'pool'; it has features, other"),
        ({"kind": TensorProto.DOUBLE}, {}, ArtifactError, r"takes tensor\(double\)"),
        ({"shape": ("N", 8, 8)}, {}, ArtifactError, "4 dims"),
        ({"shape": ("N", 4, 4, 4)}, {}, ArtifactError, "1 or 3 channels"),
        ({"shape": ("N", 3, 8, 1)}, {}, ArtifactError, "1 or 3 channels"),
        ({"shape": ("N", 3, 0, 8)}, {}, ArtifactError, "which is no image"),
        ({"metadata": json.dumps(extractors.OURS)}, {"value_range": "0:255"}, RequestError, "leave --range"),
        ({"metadata": json.dumps(extractors.OURS)}, {"output_name": "features"}, RequestError, "--output-name out"),
        ({"metadata": json.dumps({**extractors.OURS, "layout": "NCHW"})}, {}, ArtifactError, "does not fit its graph"),
        ({"metadata": json.dumps({**extractors.OURS, "logits": "x"})}, {}, ArtifactError, "does not fit its graph"),
        ({"metadata": json.dumps({**extractors.OURS, "colour": "x"})}, {}, ArtifactError, "colour"),
        ({"metadata": "{"}, {}, ArtifactError, "metadata is not valid"),
        ({}, {"device": "cuda:0"}, EngineError, "no NVIDIA driver|no CUDA provider"),
    ],
)
def test_a_graph_or_an_option_that_does_not_fit_is_one_line(
    tmp_path: Path, graph: dict[str, Any], options: dict[str, Any], error: type[CmRuntimeError], words: str
) -> None:
    path = extractors.linear(tmp_path / "e.onnx", **graph)
    with pytest.raises(error, match=words) as caught:
        Extractor(path, **options)
    assert "\n" not in str(caught.value)


def test_two_inputs_are_no_extractor(tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8, 8, 1]) for name in "abc"]
    path = extractors.save(tmp_path / "e.onnx", [helper.make_node("Add", ["a", "b"], ["c"])], ends[:2], ends[2:])
    with pytest.raises(ArtifactError, match="has 2 inputs"):
        Extractor(path)


def test_features_that_are_pictures_are_refused(tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8, 8, 1]) for name in "ab"]
    path = extractors.save(tmp_path / "e.onnx", [helper.make_node("Relu", ["a"], ["b"])], ends[:1], ends[1:])
    with pytest.raises(ArtifactError, match=r"output b is float32 \(2, 8, 8, 1\) for 2 images"):
        Extractor(path, value_range="0:1")(np.zeros((2, 8, 8, 1), np.uint8))


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_truncated_file_is_one_line(tmp_path: Path, keep: float) -> None:
    content = extractors.linear(tmp_path / "e.onnx").read_bytes()
    (tmp_path / "e.onnx").write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ArtifactError, match=r"e\.onnx") as caught:
        Extractor(tmp_path / "e.onnx")
    assert "\n" not in str(caught.value)


def test_names_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    path = extractors.linear(tmp_path / "e.onnx")
    path.write_bytes(path.read_bytes().replace(b"features", b"f\xbdatures"))
    with pytest.raises(ArtifactError, match=r"no text|cannot load"):
        Extractor(path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such extractor"):
        Extractor(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("shape", "words"), [((28, 28, 3), "28x28 images of 1 channel, not 3"), ((32, 32, 1), "not 32x32")]
)
def test_images_that_do_not_fit_the_shipped_extractor(shape: tuple[int, int, int], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Extractor()(np.zeros((2, *shape), np.uint8))


# The one that ships


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """benchmarks/extractor.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("benchmark_extractor", ROOT / "benchmarks" / "extractor.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


def torch_outputs(classifier: Any, images: Any) -> tuple[Any, Any]:
    with torch.inference_mode():
        features = classifier.features(torch.from_numpy(np.array(images)))
        return features.numpy(), classifier.head(features).numpy()


def test_the_shipped_graph_is_the_torch_classifier_of_its_weights(script: ModuleType) -> None:
    """Its numbers, read from the file, in the module they were trained in, on real images."""
    classifier = script.Classifier()
    stored = {
        weight.name.removeprefix("classifier.").removesuffix(".half"): torch.from_numpy(
            numpy_helper.to_array(weight).astype(np.float32)
        )
        for weight in onnx.load(SHIPPED).graph.initializer
    }
    missing = classifier.load_state_dict(
        {k: v for k, v in stored.items() if k in classifier.state_dict()}, strict=False
    )
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys), missing
    images = open_data(EXCERPT, split="test").images
    features, logits = torch_outputs(classifier.eval(), images)
    made = Extractor()(images.transpose(0, 2, 3, 1))
    assert made.logits is not None
    np.testing.assert_allclose(made.features, features, atol=1e-4)
    np.testing.assert_allclose(made.logits, logits, atol=1e-4)


def test_the_shipped_extractor_is_small_and_knows_garments() -> None:
    """92.6% of the 10000 test images; of the 128 here no fewer than nine in ten."""
    data = open_data(EXCERPT, split="test")
    made = Extractor()(data.images.transpose(0, 2, 3, 1))
    assert SHIPPED.stat().st_size < 1_000_000
    assert made.features.shape == (128, 128) and made.features.min() >= 0
    assert made.logits is not None
    assert (made.logits.argmax(1) == data.labels).mean() > 0.9


@pytest.mark.process
def test_a_classifier_can_be_made_into_an_extractor_again(script: ModuleType, tmp_path: Path) -> None:
    """What the script exports equals torch on real images, for awkward batches, and says what it takes."""
    torch.manual_seed(0)
    classifier = script.round_weights(script.Classifier())
    script.export(classifier, tmp_path / "e.onnx")
    images = open_data(EXCERPT).images[:7]
    features, logits = torch_outputs(classifier, images)
    extractor = Extractor(tmp_path / "e.onnx")
    for size in (1, 3, 7):
        made = extractor(images[:size].transpose(0, 2, 3, 1))
        np.testing.assert_allclose(made.features, features[:size], atol=1e-5)
        assert made.logits is not None
        np.testing.assert_allclose(made.logits, logits[:size], atol=1e-5)
    assert (tmp_path / "e.onnx").stat().st_size < 1_000_000
