"""Each form of the export, and what benchmarks hold it against, beside torch's own operator, in both engines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cm_runtime.backends import openvino
from cm_runtime.export import ops, weights_file
from cm_runtime.export.builder import FLOAT, HALF, INT64, Graph
from cm_runtime.onnx_graph.expression import Expression
from cm_runtime.precond import precond

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import rewrites

Array = NDArray[Any]
RANDOM = np.random.default_rng(1)


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def answers(g: Graph, out: str, feed: Mapping[str, Array], folder: Path) -> list[Array]:
    """Of ONNX Runtime and of OpenVINO."""
    (x,) = feed.values()
    g.output(out, "out", FLOAT, ["N", *[f"d{i}" for i in range(1, x.ndim)]])
    path = folder / "m.onnx"
    weights_file.write(g.network(), path)
    onnx.checker.check_model(str(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    (one,) = onnxruntime.InferenceSession(str(path), options).run(None, dict(feed))
    compiled = openvino.core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [one, np.array(compiled(dict(feed))[0])]


def close(found: list[Array], wanted: Tensor, to: float = 2e-5) -> None:
    assert wanted.abs().max() > 0.5
    for answer in found:
        assert answer.shape == tuple(wanted.shape)
        assert np.abs(answer - wanted.numpy()).max() < to * max(1.0, float(wanted.abs().max()))


def image(g: Graph, x: Array) -> str:
    return g.input("x", FLOAT, ["N", *x.shape[1:]])


@pytest.mark.parametrize("form", [ops.normalise, rewrites.moments, rewrites.opset_norm, rewrites.layer_norm])
@pytest.mark.parametrize(("n", "groups", "shape"), [(1, 1, (3, 7, 7)), (3, 4, (12, 1, 5)), (7, 32, (64, 3, 3))])
def test_normalisation(form: Callable[..., str], n: int, groups: int, shape: Any, tmp_path: Path) -> None:
    x = normal(n, *shape) * 3 + 2
    g = Graph()
    out = form(g, image(g, x), groups, 1e-5, shape)
    close(answers(g, out, {"x": x}, tmp_path), functional.group_norm(torch.from_numpy(x), groups))


@pytest.mark.parametrize("form", [ops.channel_affine, rewrites.mul_and_add])
def test_scale_and_shift_of_channels(form: Callable[..., str], tmp_path: Path) -> None:
    x, scale, shift = normal(3, 7, 5, 5), normal(7), normal(7)
    g = Graph()
    out = form(g, image(g, x), g.constant(scale), g.constant(shift))
    close(answers(g, out, {"x": x}, tmp_path), torch.from_numpy(x * scale[:, None, None] + shift[:, None, None]))


def test_silu(tmp_path: Path) -> None:
    x = normal(3, 1, 7, 7) * 4
    g = Graph()
    close(answers(g, ops.silu(g, image(g, x)), {"x": x}, tmp_path), functional.silu(torch.from_numpy(x)))


@pytest.mark.parametrize("form", [ops.attention, rewrites.split_attention])
@pytest.mark.parametrize(("n", "heads", "shape"), [(1, 1, (3, 1, 7)), (3, 2, (14, 4, 4)), (7, 4, (64, 3, 3))])
def test_attention(form: Callable[..., str], n: int, heads: int, shape: Any, tmp_path: Path) -> None:
    c, height, width = shape
    x, weight, bias = normal(n, *shape), normal(3 * c, c, 1, 1) / np.float32(c**0.5), normal(3 * c)
    g = Graph()
    qkv = g.weight("w", weight), g.weight("b", bias)
    made = functional.conv2d(*map(torch.from_numpy, (x, weight, bias)))
    q, k, v = made.reshape(n, 3, heads, c // heads, height * width).transpose(-1, -2).unbind(1)
    wanted = functional.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(n, *shape)
    close(answers(g, form(g, image(g, x), qkv, heads, shape), {"x": x}, tmp_path), wanted)


@pytest.mark.parametrize("form", [ops.upsample_conv, rewrites.plain_upsampled_conv, rewrites.transposed_conv])
@pytest.mark.parametrize(("n", "c", "out", "size"), [(1, 1, 3, (1, 1)), (3, 5, 7, (3, 4)), (7, 16, 32, (7, 7))])
def test_a_convolution_of_an_upsampled_image(
    form: Callable[..., str], n: int, c: int, out: int, size: tuple[int, int], tmp_path: Path
) -> None:
    x, weight, bias = normal(n, c, *size), normal(out, c, 3, 3) / np.float32(3 * c**0.5), normal(out)
    g = Graph()
    made = form(g, image(g, x), g.weight("w", weight), g.weight("b", bias))
    large = functional.interpolate(torch.from_numpy(x), scale_factor=2.0, mode="nearest")
    wanted = functional.conv2d(large, torch.from_numpy(weight), torch.from_numpy(bias), padding=1)
    close(answers(g, made, {"x": x}, tmp_path), wanted)


def test_in_float16_the_taps_are_summed_in_float32(tmp_path: Path) -> None:
    """Half steps of float16, which a sum in it would round: 2048 + 1 + 1 is 2050, not 2048."""
    g = Graph()
    x = np.ones((1, 1, 2, 2), np.float32)
    weight = np.zeros((1, 1, 3, 3), np.float32)
    weight[0, 0, 0] = 2048, 1, 1
    half = g.op("Cast", image(g, x), to=HALF)
    made = ops.upsample_conv(g, half, g.weight("w", weight, HALF), g.weight("b", np.zeros(1, np.float32), HALF))
    found = answers(g, g.op("Cast", made, to=FLOAT), {"x": x}, tmp_path)[0]
    assert found.max() == 2050


@pytest.mark.parametrize(("patch", "shape"), [(2, (1, 4, 6)), (2, (3, 2, 2))])
def test_unshuffling_is_torchs(patch: int, shape: Any, tmp_path: Path) -> None:
    x = normal(3, *shape)
    g = Graph()
    out = ops.unshuffle(g, image(g, x), patch, shape)
    close(answers(g, out, {"x": x}, tmp_path), functional.pixel_unshuffle(torch.from_numpy(x), patch))


@pytest.mark.parametrize("form", ["boundary", "edm", "piecewise"])
@pytest.mark.parametrize("coefficient", ["c_skip", "c_out", "c_in", "c_noise"])
def test_coefficients_write_themselves(form: str, coefficient: str, tmp_path: Path) -> None:
    """The same methods on a graph as on NumPy, at the boundary and next to it too."""
    of = getattr(precond(form), coefficient)
    sigma = np.array([0.002, 0.0020001, 0.1, 1.0, 1.382368, 80.0], np.float32)
    g = Graph()
    s = g.input("x", FLOAT, ["N"])
    out = of(Expression(g, s)).value
    wanted = of(sigma)
    for found in answers(g, g.op("Reshape", out, g.constant([-1], INT64)), {"x": sigma}, tmp_path):
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_arithmetic_is_that_of_numbers(tmp_path: Path) -> None:
    x = np.array([0.5, 2.0, 3.0], np.float32)
    g = Graph()
    e = Expression(g, g.input("x", FLOAT, ["N"]))
    made = ((2 + e) * (e - 1) / 4 + 1 / e + e**3 + (e <= 2) * 1.0 + (e > 2) + 3 * e.log() + e**0.5 - e / e).value
    wanted = (2 + x) * (x - 1) / 4 + 1 / x + x**3 + 1 + 3 * np.log(x) + x**0.5 - 1
    for found in answers(g, made, {"x": x}, tmp_path):
        assert np.abs(found - wanted).max() < 1e-5
