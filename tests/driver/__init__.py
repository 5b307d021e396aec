"""A stand-in for CUDA's driver: a libcuda.so.1 of the host's memory, on which the real bindings run without a GPU.

    outcome = run_on_driver("import cuda.bindings.driver as cu; print(cu.cuInit(0))")
    outcome = run_on_driver(Path("tests/cuda/test_device.py"), "-k", "halving", room=1 << 20)

It is the driver API after NVIDIA's manual, for contexts, memory, streams, events, captures, graphs, modules and
launches (entries.def has the list). Work runs as late as the manual allows, memory is full of NaN and between guard
pages, kernels run in their host build after they were held to the compiler's registers and parameters. It cannot show
numbers of a real GPU, races, speed, nor what a real driver says where its manual is silent.

Options of `run_on_driver`, which are the variables CM_DRIVER_GPUS and so on:

    gpus      how many devices there are (1)
    gpu       their model: sm_90 (an H200), sm_80, sm_86, sm_100, sm_120, sm_75
    room      bytes of each
    version   of the driver (13000)
    fail      "cuMemAlloc_v2:3:2": the third call answers error 2; "...:3+:2": from the third on; several by commas
    trace     a file that each call is written to
"""

from driver.build import library
from driver.process import Outcome, run_on_driver

__all__ = ["Outcome", "library", "run_on_driver"]
