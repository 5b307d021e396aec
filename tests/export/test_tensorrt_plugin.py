"""cm::SkipScale as TensorRT's plugin sees it: shapes, types and the launch, against a stand-in for `tensorrt.plugin`.

That the real `tensorrt.plugin` of 10.16 and 11.4 takes these functions is checked by
tests/backends/tensorrt_names/extract.py; no GPU here has run what they launch.
"""

from __future__ import annotations

import inspect
import typing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cm_runtime import kernels
from cm_runtime.errors import EngineError
from cm_runtime.export import tensorrt_plugin


class TensorDesc:
    """Shapes are plain numbers here; TensorRT's are expressions with the same operators."""

    def __init__(self, dtype: str, *shape: int) -> None:
        self.dtype, self.shape_expr = SimpleNamespace(name=dtype), list(shape)

    def like(self) -> TensorDesc:
        return TensorDesc(self.dtype.name, *self.shape_expr)


class Launch(SimpleNamespace):
    pass


class Extras(dict[int, Any]):
    def __init__(self, count: int) -> None:
        self.count = count


def stand_in() -> Any:
    registered: dict[str, Any] = {}

    def decorator(kind: str) -> Any:
        return lambda name: lambda function: registered.setdefault(f"{kind} {name}", function)

    return SimpleNamespace(
        registered=registered,
        register=decorator("register"),
        aot_impl=decorator("aot_impl"),
        TensorDesc=TensorDesc,
        KernelLaunchParams=Launch,
        SymIntExprs=Extras,
        SymInt32=lambda value: ("int32", value),
        cdiv=lambda a, b: -(-a // b),
    )


def test_it_is_registered_once_under_the_name_of_the_node() -> None:
    trtp = stand_in()
    tensorrt_plugin.register(trtp)
    tensorrt_plugin.register(trtp)
    assert list(trtp.registered) == ["register cm::SkipScale", "aot_impl cm::SkipScale"]


def test_annotations_are_objects_as_tensorrt_reads_them() -> None:
    """Strings, as this package's files have them otherwise, are refused by it."""
    trtp = stand_in()
    described = inspect.signature(tensorrt_plugin.description(trtp))
    launched = inspect.signature(tensorrt_plugin.implementation(trtp))
    names = ["x", "F", "sigma", "sigma_data", "sigma_boundary"]
    assert list(described.parameters) == names
    assert list(launched.parameters) == [*names, "outputs", "tactic"]
    for signature in (described, launched):
        assert [signature.parameters[name].annotation for name in names[:3]] == [TensorDesc] * 3
        for name in names[3:]:
            annotation = signature.parameters[name].annotation
            assert typing.get_origin(annotation) is np.ndarray
            assert typing.get_args(typing.get_args(annotation)[1]) == (np.float32,)
    assert described.return_annotation is TensorDesc
    assert typing.get_args(launched.return_annotation) == (str, str, Launch, Extras)


@pytest.mark.parametrize("kind", ["FLOAT", "HALF", "BF16"])
@pytest.mark.parametrize("levels", [1, 5])
def test_the_launch_covers_every_pixel(kind: str, levels: int) -> None:
    x, F, sigma = TensorDesc("FLOAT", 5, 3, 31, 32), TensorDesc(kind, 5, 3, 31, 32), TensorDesc("FLOAT", levels)
    attributes = np.array([0.5], np.float32), np.array([0.002], np.float32)
    y = tensorrt_plugin.description(stand_in())(x, F, sigma, *attributes)
    assert (y.dtype.name, y.shape_expr) == ("FLOAT", [5, 3, 31, 32])
    name, ptx, launch, extras = tensorrt_plugin.implementation(stand_in())(x, F, sigma, *attributes, (y,), 0)
    assert f".visible .entry {name}(" in ptx == kernels.ptx("skip_scale")
    assert name.removeprefix("cm_skip_scale_") == {"FLOAT": "float", "HALF": "half", "BF16": "bfloat16"}[kind]
    assert vars(launch) == {"grid_x": 3, "grid_y": 5, "block_x": 256}
    assert launch.grid_x * launch.block_x * tensorrt_plugin.PER_THREAD >= 3 * 31 * 32
    assert extras.count == 4
    assert extras == {i: ("int32", n) for i, n in enumerate([2976, levels, 0x3F000000, tensorrt_plugin.bits(0.002)])}


@pytest.mark.parametrize("value", [0.0, 0.002, 0.5, 1.0, 80.0, 3e38])
def test_bits_are_those_of_the_float(value: float) -> None:
    pattern = tensorrt_plugin.bits(value)
    assert 0 <= pattern < 1 << 31
    assert np.array([pattern], np.int32).view(np.float32)[0] == np.float32(value)


def test_a_refusal_is_one_error() -> None:
    def refuse(name: str) -> Any:
        raise ValueError("not a supported serializable type")

    trtp = stand_in()
    trtp.register = refuse
    with pytest.raises(EngineError, match="refused the cm::SkipScale plugin: not a supported"):
        tensorrt_plugin.register(trtp)
