"""Weights apart from their graph: what is written, inside and beside, against what the onnx package reads."""

import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cm_runtime.export import weights_file

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from torch_graph import detach

SHAPES = [(1,), (3, 7), (255,), (0, 4), (16, 3, 3, 3), (1023,), (64, 64)]


def model(arrays: dict[str, NDArray[np.generic]]) -> onnx.ModelProto:
    """Each array an initializer, with notes before and behind its data, and an output that is a copy of it."""
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    for tensor in tensors[::2]:
        tensor.doc_string = "a note"
    nodes = [helper.make_node("Identity", [name], [f"{name}.out"]) for name in arrays]
    outputs = [helper.make_tensor_value_info(f"{t.name}.out", t.data_type, list(t.dims)) for t in tensors]
    made = helper.make_model(
        helper.make_graph(nodes, "g", [], outputs, tensors),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
        producer_name="a test",
    )
    inner = helper.make_node("Identity", ["a"], ["b"])
    made.functions.append(helper.make_function("cm", "Same", ["a"], ["b"], [inner], made.opset_import))
    helper.set_model_props(made, {"key": "value"})
    return made


@pytest.fixture
def arrays(rng: np.random.Generator) -> dict[str, NDArray[np.generic]]:
    made: dict[str, NDArray[np.generic]] = {
        f"w{i}": rng.standard_normal(shape).astype(np.float32) for i, shape in enumerate(SHAPES)
    }
    return {"shape": np.array([2, -1]), **made, "scale": np.array(0.5, np.float32)}


@pytest.fixture
def network(arrays: dict[str, NDArray[np.generic]]) -> weights_file.Network:
    return detach(onnx_ir.from_proto(model(arrays)))


def content(path: Path) -> dict[str, NDArray[np.generic]]:
    """What the onnx package reads, data files included."""
    graph = onnx.load(path).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def same(one: dict[str, NDArray[np.generic]], other: dict[str, NDArray[np.generic]]) -> bool:
    return list(one) == list(other) and all(
        (one[name].dtype, one[name].shape, one[name].tobytes())
        == (other[name].dtype, other[name].shape, other[name].tobytes())
        for name in one
    )


def test_only_arrays_of_floats_leave_the_graph_and_none_is_copied(arrays: dict[str, NDArray[np.generic]]) -> None:
    source = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], name="g"), ir_version=9)
    for name, array in arrays.items():
        tensor = onnx_ir.Tensor(array, name=name)
        source.graph.initializers[name] = onnx_ir.Value(name=name, const_value=tensor)
    network = detach(source)
    assert set(network.weights) == {f"w{i}" for i in range(len(SHAPES))}
    for name, array in network.weights.items():
        assert array is arrays[name]
    assert network.size == sum(array.nbytes for array in network.weights.values())
    data = {tensor.name: len(tensor.raw_data) for tensor in network.graph.graph.initializer}
    assert {name for name, length in data.items() if length} == {"shape", "scale"}


def test_weights_inside_make_the_bytes_that_protobuf_makes(
    arrays: dict[str, NDArray[np.generic]], network: weights_file.Network, tmp_path: Path
) -> None:
    whole = onnx_ir.to_proto(onnx_ir.from_proto(model(arrays)))
    end = weights_file.write(network, tmp_path / "m.onnx")
    written = (tmp_path / "m.onnx").read_bytes()
    assert written == whole.SerializeToString(deterministic=True)
    assert b"Same" not in written[:end]
    assert network.weights == {}


def test_what_follows_the_graph_is_replaced(
    arrays: dict[str, NDArray[np.generic]], network: weights_file.Network, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    end = weights_file.write(network, path)
    whole = onnx.load(path)
    for other in ({"key": "a longer value"}, {}):
        helper.set_model_props(network.graph, other)
        weights_file.write_behind(network.graph, path, end)
        helper.set_model_props(whole, other)
        assert path.read_bytes() == whole.SerializeToString(deterministic=True)


def test_weights_beside_are_read_by_the_onnx_package(
    arrays: dict[str, NDArray[np.generic]], network: weights_file.Network, tmp_path: Path
) -> None:
    weights_file.write_external(network, tmp_path / "temporary")
    weights_file.rename_external(network.graph, "m.data")
    (tmp_path / "temporary").rename(tmp_path / "m.data")
    weights_file.write(network, tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    assert same(content(tmp_path / "m.onnx"), arrays)


def test_weights_beside_lie_in_order_aligned_without_overlap(network: weights_file.Network, tmp_path: Path) -> None:
    weights_file.write_external(network, tmp_path / "m.data")
    places = []
    for tensor in network.graph.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            said = {entry.key: entry.value for entry in tensor.external_data}
            places.append((int(said["offset"]), int(said["length"])))
    assert [length for _, length in places] == [1728, 4092, 16384]  # those of at most 1 KiB are in the graph
    assert all(offset % (4096 if length > 4096 else 64) == 0 for offset, length in places)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(places))
    assert sum(places[-1]) == (tmp_path / "m.data").stat().st_size


@pytest.mark.parametrize("apart", [False, True])
def test_a_weight_takes_the_type_that_its_initializer_has(
    arrays: dict[str, NDArray[np.generic]], tmp_path: Path, apart: bool
) -> None:
    network = detach(onnx_ir.from_proto(model({"w": arrays["w6"].astype(np.float16).astype(np.float32)})))
    network.graph.graph.initializer[0].data_type = TensorProto.FLOAT16
    assert network.size == arrays["w6"].nbytes // 2
    if apart:
        weights_file.write_external(network, tmp_path / "m.data")
    weights_file.write(network, tmp_path / "m.onnx")
    assert same(content(tmp_path / "m.onnx"), {"w": arrays["w6"].astype(np.float16)})


@pytest.mark.parametrize("apart", [False, True])
def test_weights_that_lie_otherwise_in_memory_are_written_in_order(
    arrays: dict[str, NDArray[np.generic]], tmp_path: Path, apart: bool
) -> None:
    network = detach(onnx_ir.from_proto(model({"w": arrays["w6"]})))
    network.weights["w"] = np.asfortranarray(arrays["w6"])
    if apart:
        weights_file.write_external(network, tmp_path / "m.data")
    weights_file.write(network, tmp_path / "m.onnx")
    assert same(content(tmp_path / "m.onnx"), {"w": arrays["w6"]})


@pytest.mark.parametrize("apart", [False, True])
def test_writing_holds_at_most_one_weight_more(tmp_path: Path, apart: bool) -> None:
    """Eight of 4 MB, stored as float16 so that each is copied."""
    network = detach(onnx_ir.from_proto(model({f"w{i}": np.ones(1 << 20, np.float32) for i in range(8)})))
    for tensor in network.graph.graph.initializer:
        tensor.data_type = TensorProto.FLOAT16
    tracemalloc.start()
    try:
        if apart:
            weights_file.write_external(network, tmp_path / "m.data")
        weights_file.write(network, tmp_path / "m.onnx")
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()
