"""cm::SkipScale as one kernel in TensorRT's engines, where it has `tensorrt.plugin`; elsewhere the local function runs.

The kernel is embedded as PTX while an engine is built, so running the engine needs neither this file nor Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cm_runtime import kernels
from cm_runtime.errors import EngineError
from cm_runtime.onnx_graph.skip_scale import DOMAIN, NAME

# By the type of F
KERNELS = {"FLOAT": "cm_skip_scale_float", "HALF": "cm_skip_scale_half", "BF16": "cm_skip_scale_bfloat16"}
THREADS = 256
PER_THREAD = 4  # pixels or more; one whose image is no multiple of them goes round

_modules: set[int] = set()


def register(trtp: Any) -> None:
    """Register cm::SkipScale with ``trtp``, the module `tensorrt.plugin`, once. Raises EngineError.

    There is no autotune function: without one TensorRT takes the types of the network and linear layouts, which in a
    strongly typed network are the only ones there are.
    """
    if id(trtp) in _modules:
        return
    try:
        trtp.register(f"{DOMAIN}::{NAME}")(description(trtp))
        trtp.aot_impl(f"{DOMAIN}::{NAME}")(implementation(trtp))
    except Exception as error:
        raise EngineError(f"TensorRT refused the {DOMAIN}::{NAME} plugin: {error}") from error
    _modules.add(id(trtp))


def description(trtp: Any) -> Callable[..., Any]:
    """The plugin's shape and type inference: y is as x, float32, whatever F is."""

    def describe(x: Any, F: Any, sigma: Any, sigma_data: Any, sigma_boundary: Any) -> Any:
        return x.like()

    describe.__annotations__ = {**_inputs(trtp), "return": trtp.TensorDesc}
    return describe


def implementation(trtp: Any) -> Callable[..., Any]:
    """The plugin's launch: the kernel's name, its PTX, the grid, and its integer arguments."""

    def implement(
        x: Any, F: Any, sigma: Any, sigma_data: Any, sigma_boundary: Any, outputs: Any, tactic: Any
    ) -> tuple[Any, ...]:
        images, *pixels = x.shape_expr
        count = pixels[0] * pixels[1] * pixels[2]
        launch = trtp.KernelLaunchParams()
        launch.grid_x = trtp.cdiv(count, THREADS * PER_THREAD)
        launch.grid_y = images
        launch.block_x = THREADS
        extras = trtp.SymIntExprs(4)
        for i, value in enumerate((count, sigma.shape_expr[0], bits(sigma_data), bits(sigma_boundary))):
            extras[i] = trtp.SymInt32(value)
        return KERNELS[F.dtype.name], kernels.ptx("skip_scale"), launch, extras

    implement.__annotations__ = {
        **_inputs(trtp),
        "outputs": tuple[trtp.TensorDesc],
        "tactic": int,
        "return": tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs],
    }
    return implement


def _inputs(trtp: Any) -> dict[str, Any]:
    """TensorRT reads annotations as objects: tensors first, then the node's attributes.

    float32 arrays, as ONNX has them, and not Python floats: TensorRT 10 makes those of arrays of one, which NumPy 2.4
    refuses.
    """
    attribute = np.ndarray[Any, np.dtype[np.float32]]
    tensors = dict.fromkeys(("x", "F", "sigma"), trtp.TensorDesc)
    return {**tensors, "sigma_data": attribute, "sigma_boundary": attribute}


def bits(value: Any) -> int:
    """A float32's bit pattern as the integer that a kernel argument can be; below 2^31, since no sigma is negative."""
    return int(np.asarray(value, np.float32).reshape(1).view(np.int32)[0])
