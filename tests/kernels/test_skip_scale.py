"""cm_skip_scale beside its formula in float64."""

from __future__ import annotations

from typing import Any

import host_gpu
import ml_dtypes
import numpy as np
import pytest
from host_gpu import address, placed

from cm_runtime.errors import RequestError
from cm_runtime.kernels import launches
from cm_runtime.kernels.launches import Arrays, Images
from cm_runtime.precond import precond

pytestmark = pytest.mark.process  # processes which compiles the kernels for the host

AT = Arrays(*[16] * len(Arrays._fields))  # nowhere
TYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
ULP = 2.0**-23


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 3, 7, 5), (4000, 1, 4, 4), (7, 1, 4, 1), (255, 1, 1, 3), (1, 1, 1, 1023), (3, 3, 8, 8)]
)
@pytest.mark.parametrize("form", ["boundary", "edm"])
def test_it_is_its_formula(type: Any, shape: Any, form: str) -> None:
    """At every level, for a level an image and one for all of them, in place or not; beside it nothing is written."""
    images = Images(*shape, type)
    rng = np.random.default_rng(shape[-1])
    x, F = rng.standard_normal(shape, np.float32), rng.standard_normal(shape).astype(TYPES[type])
    c = precond(form, 0.5, float(np.float32(precond(form).sigma_boundary)))  # which the kernel is given in float32
    for sigma in (np.geomspace(0.002, 80, shape[0]).astype(np.float32), np.array([3.0], np.float32)):
        s = np.broadcast_to(sigma.astype(np.float64), shape[0])[:, None, None, None]
        skip, out = c.c_skip(s) * x, c.c_out(s) * F.astype(np.float64)
        placed_x, placed_F, placed_sigma = placed(x), placed(F), placed(sigma)
        memory = host_gpu.empty((x.size + 16,), np.float32)
        y = memory[: x.size].reshape(shape)
        at = Arrays(x=address(placed_x), F=address(placed_F), sigma=address(placed_sigma), y=address(y))
        host_gpu.launch(launches.skip_scale(images, at, c, levels=len(sigma)))
        assert (np.abs(y - (skip + out)) <= 2 * ULP * np.maximum(np.abs(skip), np.abs(out))).all()
        assert np.isnan(memory[x.size :]).all()
        host_gpu.launch(launches.skip_scale(images, at._replace(y=address(placed_x)), c, levels=len(sigma)))
        assert np.array_equal(placed_x, y)


def test_what_it_cannot_is_refused() -> None:
    images = Images(3, 1, 4, 4)
    with pytest.raises(RequestError, match="piecewise"):
        launches.skip_scale(images, AT, precond("piecewise"))
    with pytest.raises(RequestError, match="sigma must be one number, or one for each of 3 images, not 2"):
        launches.skip_scale(images, AT, precond("edm"), levels=2)
    with pytest.raises(RequestError, match="y is misaligned"):
        launches.skip_scale(images, AT._replace(y=20), precond("edm"))
    with pytest.raises(RequestError, match="65535 images at once, not 65536"):
        launches.skip_scale(Images(65536, 1, 1, 1), AT, precond("edm"))
