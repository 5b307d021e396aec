"""The stand-in for CUDA's driver, in processes of their own: it against the manual, and our code on it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from driver import library, run_on_driver
from driver.build import FOLDER

pytestmark = pytest.mark.process
pytest.importorskip("cuda.bindings")
RULES = sorted(FOLDER.glob("rules/*s.py"))
HEADERS = Path("/usr/local/cuda/include")


def test_it_keeps_the_rules_of_the_manual() -> None:
    run_on_driver(*RULES)


@pytest.mark.slow
def test_it_keeps_them_without_an_error_of_memory() -> None:
    run_on_driver(*RULES, sanitised=True)


@pytest.mark.skipif(not (HEADERS / "cuda.h").exists() or not shutil.which("g++"), reason="needs CUDA's headers and g++")
def test_its_declarations_are_those_of_cuda() -> None:
    words = ["g++", "-std=c++17", "-fsyntax-only", f"-I{HEADERS}", "check.cpp"]
    done = subprocess.run(words, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LEAK = """
import os, cuda.bindings.driver as cu
print(cu.cuMemAlloc(4)[0].name, cu.cuInit(0)[0].name, cu.cuDriverGetVersion()[1])
cu.cuDevicePrimaryCtxRetain(0)
cu.cuCtxCreate(None, 0, 0)
address = int(cu.cuMemAlloc(4)[1]), cu.cuMemAlloc(4), cu.cuStreamCreate(0), cu.cuCtxGetLimit(cu.CUlimit(0))
cu.cuMemFree(address[0] + 1)
"""
LINES = (
    "misuse cuMemFree_v2: ",
    "unsupported cuCtxGetLimit",
    "left 1 uses of the primary context of device 0",
    "left 1 contexts on device 0",
    "left 2 blocks of memory",
    "left 1 streams",
)


def test_a_process_that_leaves_anything_has_failed(tmp_path: Path) -> None:
    outcome = run_on_driver(LEAK, allowed=LINES, trace=tmp_path / "trace")
    assert outcome.out == "CUDA_ERROR_NOT_INITIALIZED CUDA_SUCCESS 13000\n"
    assert len(outcome.report) == len(LINES) and all(map(str.startswith, outcome.report, LINES))
    assert (tmp_path / "trace").read_text().splitlines()[-1].startswith("cuMemFree_v2: 1 (thread ")
    with pytest.raises(AssertionError, match=r"(?s)reports:\nleft 1 contexts.*left 1 streams\n"):
        run_on_driver(LEAK, allowed=LINES[:3])


def test_a_process_that_dies_has_failed() -> None:
    with pytest.raises(AssertionError, match="has not reported"):
        run_on_driver("import os, cuda.bindings.driver as cu; cu.cuInit(0); os._exit(0)")
    assert (library() / "libcuda.so.1").exists()


# The kernels, through our own device layer and real bindings

KERNELS = FOLDER.parent / "kernels"


def run_kernels(*names: str) -> None:
    """Run tests of kernels that `make gpu-check` runs on a GPU; the process keeps its context, memory and module."""
    paths = [KERNELS / f"test_{name}.py" for name in names]
    run_on_driver(*paths, environment={"CM_RUNTIME_KERNELS": "gpu"}, allowed=["left "])


def test_kernels_are_launched_by_the_real_bindings() -> None:
    run_kernels("skip_scale")


@pytest.mark.slow
def test_all_kernels_are_launched_by_the_real_bindings() -> None:
    run_kernels("group_norm", "noise", "steps")


TORCH_STREAM = """
    from types import SimpleNamespace
    import cuda.bindings.driver as cu
    import numpy as np, torch
    from cm_runtime import noise
    from cm_runtime.cuda import torch_launch
    from cm_runtime.kernels import launches
    from cm_runtime.kernels.launches import LEVEL, REQUEST, Arrays, Images

    cu.cuInit(0)
    cu.cuCtxPushCurrent(cu.cuDevicePrimaryCtxRetain(0)[1])
    stream = cu.cuStreamCreate(1)[1]
    torch.cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=int(stream))

    def send(array):
        address = int(cu.cuMemAlloc(array.nbytes)[1])
        cu.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, stream)
        return address

    request, level = send(np.array([(3, 17)], REQUEST)), send(np.array([(0, 1, 1, 1)], LEVEL))
    images = np.zeros((2, 3, 8, 8), np.float32)
    x = send(images)
    work = launches.first_noise(Images(2, 3, 8, 8), Arrays(request, level, x=x))
    torch_launch.launch(work, torch.device("cuda", 0))
    cu.cuMemcpyDtoHAsync(images.ctypes.data, x, images.nbytes, stream)
    print(np.abs(images - noise.normal(3, [17, 18], 0, (3, 8, 8))).max() < 1e-6)
"""


def test_a_kernel_is_put_in_a_stream_of_torch() -> None:
    pytest.importorskip("torch")
    assert run_on_driver(TORCH_STREAM, allowed=["left "]).out == "True\n"
