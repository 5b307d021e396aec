"""The real pycuda on the stand-in: `make test-pycuda` builds it."""

from __future__ import annotations

import pytest

from driver import run_on_driver
from driver.pycuda import pycuda_folder

pytestmark = [pytest.mark.process, pytest.mark.timeout(1800)]
AT_EXIT = "left 1 uses of the primary context"  # pycuda detaches it, which is for other contexts than primary ones

CALLS = """
    import numpy as np
    import pycuda.autoprimaryctx
    import pycuda.driver as cuda
    import pycuda.gpuarray as gpuarray
    from cm_runtime import kernels, noise
    from cm_runtime.kernels import launches
    from cm_runtime.kernels.launches import LEVEL, REQUEST, Arrays, Images

    def send(array):
        memory = cuda.mem_alloc(array.nbytes)
        cuda.memcpy_htod(memory, array)
        return memory

    stream, event = cuda.Stream(), cuda.Event()
    request, level = send(np.array([(3, 17)], REQUEST)), send(np.array([(0, 1, 1, 1)], LEVEL))
    x, images = gpuarray.empty((2, 3, 8, 8), np.float32), cuda.pagelocked_empty((2, 3, 8, 8), np.float32)
    work = launches.first_noise(Images(2, 3, 8, 8), Arrays(int(request), int(level), x=int(x.gpudata)))
    module = cuda.module_from_buffer(kernels.fatbin())
    module.get_function(work.kernel)(*work.arguments, grid=work.grid, block=work.block, stream=stream)
    cuda.memcpy_dtoh_async(images, x.gpudata, stream)
    event.record(stream)
    assert np.isnan(images).all() and not event.query()
    event.synchronize()
    expected = noise.normal(3, [17, 18], 0, (3, 8, 8))
    assert np.abs(images - expected).max() < 1e-6 and (x.get() == images).all()
    try:
        module.get_function("cm_step_half_nhwc")(*work.arguments, grid=work.grid, block=work.block, stream=stream)
    except cuda.LogicError as error:
        print(error)
"""


def test_copies_events_and_launches() -> None:
    allowed = [AT_EXIT, "misuse cuLaunchKernel: cm_step_half_nhwc: 60 bytes of arguments"]
    outcome = run_on_driver(CALLS, allowed=allowed, environment={"PYTHONPATH": str(pycuda_folder())})
    assert outcome.out == "cuLaunchKernel failed: invalid argument\n"


def test_a_context_of_its_own_and_errors_by_name() -> None:
    outcome = run_on_driver(
        """
        import pycuda.driver as cuda
        cuda.init()
        print(cuda.Device.count(), cuda.Device(1).name(), cuda.Device(1).compute_capability())
        context = cuda.Device(1).make_context()
        try:
            cuda.mem_alloc(1025)
        except cuda.MemoryError as error:
            print(error)
        context.pop()
        """,
        environment={"PYTHONPATH": str(pycuda_folder())},
        gpus=2,
        room=1024,
        gpu="sm_80",
    )
    assert outcome.out == "2 Stand-in of sm_80 (8, 0)\ncuMemAlloc failed: out of memory\n"
