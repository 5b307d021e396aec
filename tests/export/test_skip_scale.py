"""cm::SkipScale: one node with a local function, whose numbers are held to float64."""

from pathlib import Path

import exports
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cm_runtime.export import skip_scale
from cm_runtime.export.builder import OPSET

BOUNDARY = np.float32(0.002)


def session(graph: onnx.ModelProto | Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def only_skip_scale(
    sigma_data: float = 0.5, sigma_boundary: float = 0.002, F_type: int = TensorProto.FLOAT
) -> onnxruntime.InferenceSession:
    """A graph of nothing but the node and its function."""
    image = ["N", 2, 3, 3]
    node = helper.make_node(
        "SkipScale",
        ["x", "F", "sigma"],
        ["y"],
        domain="cm",
        sigma_data=sigma_data,
        sigma_boundary=sigma_boundary,
        plugin_namespace="cm",
        plugin_version="1",
    )
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, image),
        helper.make_tensor_value_info("F", F_type, image),
        helper.make_tensor_value_info("sigma", TensorProto.FLOAT, ["S"]),
    ]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, image)])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("cm", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[skip_scale.function()], ir_version=9)
    onnx.checker.check_model(model)
    return session(model)


def in_float64(
    x: NDArray[np.float32], F: NDArray[np.float32], sigma: NDArray[np.float32], data: float, boundary: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """c_skip x + c_out F of arXiv 2303.01469, appendix C, and the size of what is added up."""
    s = sigma.astype(np.float64).reshape(-1, 1, 1, 1)
    b, sd = float(np.float32(boundary)), float(np.float32(data))  # attributes are float32
    c_skip = sd**2 / ((s - b) ** 2 + sd**2)
    c_out = sd * (s - b) / np.sqrt(s**2 + sd**2)
    return c_skip * x + c_out * F, np.abs(c_skip * x) + np.abs(c_out * F)


def levels(boundary: float) -> NDArray[np.float32]:
    """The whole range, and the numbers next to the boundary."""
    low = np.float32(max(boundary, 0.002))
    near = [low, np.nextafter(low, np.float32(1)), low * np.float32(1.001)]
    return np.concatenate([np.array(near), np.geomspace(low, 80, 198)]).astype(np.float32)


@pytest.mark.parametrize("sigma_data", [0.5, 0.3])
@pytest.mark.parametrize("sigma_boundary", [0.002, 0.0, 0.1])
def test_the_function_is_the_papers_formula_over_the_whole_range(sigma_data: float, sigma_boundary: float) -> None:
    sigma = levels(sigma_boundary)
    random = np.random.default_rng(1)
    x = (random.standard_normal((len(sigma), 2, 3, 3)) * sigma[:, None, None, None]).astype(np.float32)
    F = random.standard_normal(x.shape).astype(np.float32)
    (y,) = only_skip_scale(sigma_data, sigma_boundary).run(None, {"x": x, "F": F, "sigma": sigma})
    expected, size = in_float64(x, F, sigma, sigma_data, sigma_boundary)
    assert np.abs((y - expected) / size).max() < 6e-7  # ten float32 roundings


def test_one_sigma_serves_the_whole_batch() -> None:
    random = np.random.default_rng(2)
    x, F = random.standard_normal((2, 7, 2, 3, 3)).astype(np.float32)
    node = only_skip_scale()
    (one,) = node.run(None, {"x": x, "F": F, "sigma": np.array([1.5], np.float32)})
    (each,) = node.run(None, {"x": x, "F": F, "sigma": np.full(7, 1.5, np.float32)})
    assert np.array_equal(one, each)


def test_at_the_boundary_y_is_x_bit_for_bit() -> None:
    random = np.random.default_rng(3)
    x, F = random.standard_normal((2, 3, 2, 3, 3)).astype(np.float32)
    (y,) = only_skip_scale().run(None, {"x": x, "F": F * 1e3, "sigma": np.full(3, BOUNDARY)})
    assert np.array_equal(y, x)


def test_a_float16_network_is_combined_in_float32() -> None:
    random = np.random.default_rng(4)
    x = random.standard_normal((3, 2, 3, 3)).astype(np.float32)
    F = random.standard_normal((3, 2, 3, 3)).astype(np.float16)
    sigma = np.array([0.002, 1, 80], np.float32)
    node = only_skip_scale(F_type=TensorProto.FLOAT16)
    (y,) = node.run(None, {"x": x, "F": F, "sigma": sigma})
    expected, size = in_float64(x, F.astype(np.float32), sigma, 0.5, 0.002)
    assert y.dtype == np.float32
    assert np.abs((y - expected) / size).max() < 6e-7


@pytest.mark.parametrize(("kind", "sigma_boundary"), [("boundary", 0.002), ("edm", 0.0)])
def test_an_export_has_one_node_with_the_contracts_attributes_and_its_function(
    kind: str, sigma_boundary: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    graph = onnx.load(exports.Files(kind, tmp_path_factory).onnx)
    (node,) = [node for node in graph.graph.node if node.domain not in ("", "ai.onnx")]
    assert (node.domain, node.op_type) == ("cm", "SkipScale")
    assert {a.name: helper.get_attribute_value(a) for a in node.attribute} == {
        "sigma_data": 0.5,
        "sigma_boundary": pytest.approx(sigma_boundary),
        "plugin_namespace": b"cm",
        "plugin_version": b"1",
    }
    x, F, sigma = node.input
    assert (x, sigma, list(node.output)) == ("x", "sigma", ["denoised"])
    assert F not in ("x", "sigma")
    (function,) = graph.functions
    assert (function.domain, function.name, list(function.input)) == ("cm", "SkipScale", ["x", "F", "sigma"])
    assert {inner.domain for inner in function.node} == {""}
    assert {opset.domain: opset.version for opset in graph.opset_import}["cm"] == 1


def test_the_piecewise_form_is_standard_ops_and_x_itself_up_to_the_boundary(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = exports.Files("piecewise", tmp_path_factory).onnx
    graph = onnx.load(path)
    assert {node.domain for node in graph.graph.node} == {""}
    assert not graph.functions
    x = np.random.default_rng(5).standard_normal((3, 3, 8, 8)).astype(np.float32)
    sigma = np.array([BOUNDARY / 2, BOUNDARY, np.nextafter(BOUNDARY, np.float32(1))], np.float32)
    (y,) = session(path).run(None, {"x": x, "sigma": sigma, "label": np.zeros(3, np.int64)})
    assert np.array_equal(y[:2], x[:2])
    assert np.abs(y[2] - x[2]).mean() > 0.1  # there F takes over


def test_f_is_the_identity_at_the_boundary_bit_for_bit_in_the_exported_file(boundary: exports.Files) -> None:
    x = np.random.default_rng(6).standard_normal((3, 3, 8, 8)).astype(np.float32)
    feed = {"x": x, "sigma": np.full(3, BOUNDARY), "label": np.arange(3)}
    for path in (boundary.onnx, boundary.inline):
        (y,) = session(path).run(None, feed)
        assert np.array_equal(y, x)
    (moved,) = session(boundary.onnx).run(None, {**feed, "sigma": np.full(3, 0.02, np.float32)})
    assert np.abs(moved - x).max() > 1e-4


def test_onnx_runtime_optimises_the_node_and_its_function_away(boundary: exports.Files, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(boundary.onnx), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx")
    assert len(optimised.graph.node) > 20
    assert "cm" not in {node.domain for node in optimised.graph.node}
    assert not optimised.functions
