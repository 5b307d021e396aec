"""The kernels, as far as a machine without a GPU can prove them: on the host, and by what nvcc makes of them."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cm_runtime import kernels
from cm_runtime.export import plugin
from cm_runtime.precond import precond

FOLDER = Path(kernels.__file__).parent
NVCC = shutil.which("nvcc")
GPUS = (
    "75",
    "80",
    "86",
    "89",
    "90",
    "100",
    "120",
)  # all that CUDA 13 compiles for, and so all that its TensorRT runs on

# What a launch is, in a loop: the source is compiled as C++, where CUDA's own words mean nothing.
ON_HOST = """
#include <cstring>
#include <cmath>
#include <cuda_runtime.h>
static struct { unsigned x, y; } blockIdx, blockDim, threadIdx;
static float __int_as_float(int bits) { float value; std::memcpy(&value, &bits, 4); return value; }
#include "skip_scale.cu"
#define LAUNCH(NAME, T)                                                                                          \\
    extern "C" void launch_##NAME(unsigned grid_x, unsigned grid_y, unsigned block, const float* x, const T* F,  \\
                                  const float* sigma, int pixels, int levels, int data, int boundary, float* y) { \\
        blockDim = {block, 1};                                                                                   \\
        for (blockIdx.y = 0; blockIdx.y < grid_y; blockIdx.y++)                                                  \\
            for (blockIdx.x = 0; blockIdx.x < grid_x; blockIdx.x++)                                              \\
                for (threadIdx.x = 0; threadIdx.x < block; threadIdx.x++)                                        \\
                    NAME(x, F, sigma, pixels, levels, data, boundary, y);                                        \\
    }
LAUNCH(skip_scale_float, float)
LAUNCH(skip_scale_half, __half)
LAUNCH(skip_scale_bfloat16, __nv_bfloat16)
"""


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if NVCC is None or shutil.which("g++") is None:
        pytest.skip("needs nvcc, which knows where CUDA's headers are, and g++")
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cpp").write_text(ON_HOST)
    command = [NVCC, "-x", "c++", "-shared", "-Xcompiler", "-fPIC", "-O1", f"-I{FOLDER}", "host.cpp", "-o", "host.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "host.so"))


TYPES: dict[str, Any] = {
    "skip_scale_float": np.float32,
    "skip_scale_half": np.float16,
    "skip_scale_bfloat16": ml_dtypes.bfloat16,
}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("images", [1, 3, 7])
@pytest.mark.parametrize("pixels", [1, 255, 256, 1023])
@pytest.mark.parametrize("form", ["boundary", "edm"])
def test_skip_scale_is_its_formula(on_host: ctypes.CDLL, name: str, images: int, pixels: int, form: Any) -> None:
    """Within a few float32 roundings of float64, at every level, for a level an image and one for all of them."""
    sigma_data, sigma_boundary = 0.5, 0.002 if form == "boundary" else 0.0
    rng = np.random.default_rng(pixels)
    x = rng.standard_normal((images, pixels), np.float32)
    F = rng.standard_normal((images, pixels)).astype(TYPES[name])
    for sigma in (np.geomspace(0.002, 80, images).astype(np.float32), np.array([3.0], np.float32)):
        y = np.full((images + 1, pixels), np.nan, np.float32)  # one row more, which must stay as it is
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (x, F, sigma))
        getattr(on_host, f"launch_{name}")(
            -(-pixels // plugin.THREADS),
            images,
            plugin.THREADS,
            *pointers,
            pixels,
            len(sigma),
            plugin.bits(sigma_data),
            plugin.bits(sigma_boundary),
            y.ctypes.data_as(ctypes.c_void_p),
        )
        c = precond(form, sigma_data, sigma_boundary)
        s = np.broadcast_to(sigma.astype(np.float64), images)[:, None]
        skip, out = c.c_skip(s) * x, c.c_out(s) * F.astype(np.float64)
        assert (np.abs(y[:-1] - (skip + out)) <= 5e-7 * (np.abs(skip) + np.abs(out))).all()
        assert np.isnan(y[-1]).all()


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_the_committed_ptx_is_what_the_source_compiles_to(tmp_path: Path) -> None:
    for name in ("skip_scale.cu", "Makefile"):
        shutil.copy(FOLDER / name, tmp_path)
    subprocess.run(["make", "--silent"], cwd=tmp_path, check=True)
    assert (tmp_path / "skip_scale.ptx").read_text() == kernels.ptx("skip_scale")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_has_code_for_the_ptx(gpu: str, tmp_path: Path) -> None:
    """Its version is old enough for any driver that runs CUDA 11, and the assembler takes it at its word."""
    (tmp_path / "k.ptx").write_text(kernels.ptx("skip_scale"))
    subprocess.run([str(NVCC), "-cubin", f"-arch=sm_{gpu}", "k.ptx", "-o", "k.cubin"], cwd=tmp_path, check=True)


def test_the_ptx_says_what_it_needs() -> None:
    ptx = kernels.ptx("skip_scale")
    assert ptx.startswith(".version 7.0\n.target sm_75\n")
    entries = dict(re.findall(r"\.visible \.entry (\w+)\((.*?)\)", ptx, re.DOTALL))
    assert entries.keys() == set(plugin.KERNELS.values()) == TYPES.keys()
    for parameters in entries.values():  # three inputs, four integers, one output
        assert re.findall(r"\.param \.(u\d+)", parameters) == ["u64"] * 3 + ["u32"] * 4 + ["u64"]
