"""Sampling on a GPU with the real bindings on the stand-in for CUDA's driver: see tests/driver for what that proves."""

from __future__ import annotations

from pathlib import Path

import pytest
from driver import run_on_driver
from driver.pycuda import pycuda_folder

pytestmark = pytest.mark.process
pytest.importorskip("cuda.bindings")
CASES = Path(__file__).with_name("on_driver.py")


def test_the_cases_with_cuda_bindings() -> None:
    run_on_driver(CASES, gpus=2, room=1 << 26)


@pytest.mark.timeout(1800)
def test_the_cases_with_pycuda() -> None:
    environment = {"CM_RUNTIME_CUDA": "pycuda", "PYTHONPATH": str(pycuda_folder())}
    run_on_driver(CASES, environment=environment, gpus=2, room=1 << 26)


def test_a_process_that_ends_in_the_middle_gives_all_back() -> None:
    """The driver opened by the thread that draws ahead, the model still there, and a stream that nobody ends."""
    outcome = run_on_driver("""
        import cm_runtime as cm
        from cm_runtime.cuda.sampler import OnDevice
        from driver_engine import DriverEngine, HostEngine

        class Late(DriverEngine):
            def __init__(self): pass
            def batches(self, request, noise=None):
                if not hasattr(self, "hooks"):
                    super().__init__()
                return super().batches(request, noise)

        model = Late()
        stream = iter(cm.stream(model, micro_batch=3))
        print((next(stream).images == cm.sample(HostEngine(), 3, micro_batch=3)).all(), len(cm.sample(model, 4)))
        """)
    assert (outcome.out, outcome.err) == ("True 4\n", "")


LAUNCHES = """
    import cuda.bindings.driver as cu
    import numpy as np
    import torch
    from types import SimpleNamespace
    from cm_runtime.cuda.context import open_context
    from cm_runtime.cuda.device import Device
    from cm_runtime.cuda.torch_launch import launch
    from cm_runtime.errors import CmRuntimeError
    from cm_runtime.kernels import launches
    from cm_runtime.kernels.launches import LEVEL, REQUEST, Arrays, Images

    streams = {}
    torch.cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=streams[device.index])
    for index in (0, 1, 0):
        device = Device(index)
        streams[index] = device.stream
        request = device.send("request", np.array([(3, 17)], REQUEST))
        level = device.send("level", np.array([(0, 1, 1, 1)], LEVEL))
        x = device.address("x", 16 * 4)
        work = launches.first_noise(Images(1, 1, 4, 4), Arrays(request, level, x=x))
        try:
            launch(work, torch.device("cuda", index))
            print(np.isfinite(device.fetch("x", (16,), np.dtype(np.float32))).all(), int(cu.cuCtxGetCurrent()[1]))
        except CmRuntimeError as error:
            print(error)
"""


def test_a_launch_is_in_torchs_stream_and_context() -> None:
    assert run_on_driver(LAUNCHES, gpus=2).out == "True 0\n" * 3


@pytest.mark.quick("driver")
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"gpu": "sm_75"},
            "Stand-in of sm_75 has compute capability 7.5; the kernels need 8.0 (Ampere) or newer",
        ),
        ({"version": 12040}, "this NVIDIA driver is of CUDA 12.4; the kernels need one of CUDA 13 (580 or newer)"),
        (
            {"fail": "cuLaunchKernel:1:701"},
            "CUDA failed while launching cm_first_noise_float_nchw: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES in"
            " cuLaunchKernel",
        ),
        (
            {"fail": "cuModuleLoadData:1:209"},
            "Stand-in of sm_90 (compute capability 9.0) refused the kernels: CUDA_ERROR_NO_BINARY_FOR_GPU in"
            " cuModuleLoadData",
        ),
    ],
    ids=["gpu", "driver", "launch", "module"],
)
def test_what_the_driver_refuses_torch_is_named(options: dict[str, object], line: str) -> None:
    code = LAUNCHES.replace("(0, 1, 0)", "(0,)")
    assert run_on_driver(code, allowed=["misuse cuModuleLoadData"], **options).out == f"{line}\n"
