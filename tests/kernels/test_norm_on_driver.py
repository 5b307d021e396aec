"""The normalisation's launches by the real cuda-bindings, on a driver that is a stand-in."""

from __future__ import annotations

from pathlib import Path

import pytest
from driver import run_on_driver

pytestmark = pytest.mark.process
pytest.importorskip("cuda.bindings")

TESTS = Path(__file__).parent / "test_group_norm.py"
SAME = "every_launch and fp16 and 65"


@pytest.mark.quick("sm_90")
@pytest.mark.parametrize("gpu", ["sm_90", "sm_120"])
def test_clusters_are_launched(gpu: str, tmp_path: Path) -> None:
    trace = tmp_path / "calls"
    run_on_driver(TESTS, "-k", SAME, "-m", "", environment={"CM_RUNTIME_KERNELS": "gpu"}, gpu=gpu, trace=trace)
    assert "cuLaunchKernelEx" in trace.read_text()


def test_shared_memory_is_allowed_once_and_for_every_size(tmp_path: Path) -> None:
    """Of two sizes beyond what a kernel may take by itself: another thread's launch must not lower the limit."""
    trace = tmp_path / "calls"
    run_on_driver(
        """
        import host_gpu, numpy as np
        from cm_runtime.kernels.group_norm import NormPlan, group_norm_silu
        from cm_runtime.kernels.launches import Arrays, Images

        for size in (64, 48, 64):
            images = Images(1, 16, size, size, "fp16", "nhwc")
            x, y = (host_gpu.placed(np.ones((size, size, 16), np.float16)) for _ in range(2))
            one = host_gpu.placed(np.ones(16, np.float32))
            at = Arrays(**{name: host_gpu.address(each) for name, each in dict(x=x, y=y, gamma=one, beta=one).items()})
            (work,) = group_norm_silu(images, at, 2, 1e-5, False, NormPlan(16, 1, 512, is_cluster=True))
            assert work.shared > 48 << 10
            host_gpu.launch(work)
            assert (y == 1).all()
        """,
        environment={"CM_RUNTIME_KERNELS": "gpu"},
        trace=trace,
    )
    assert trace.read_text().count("cuFuncSetAttribute") == 1


def test_a_gpu_without_clusters_refuses_them_and_takes_two_launches() -> None:
    run_on_driver(
        """
        import host_gpu, numpy as np
        from cm_runtime.errors import EngineError
        from cm_runtime.kernels.group_norm import group_norm_silu, plan_norm
        from cm_runtime.kernels.launches import Arrays, Images
        from cm_runtime.kernels.limits import Limits

        images = Images(1, 192, 64, 64, "fp16", "nhwc")
        x, y = host_gpu.placed(np.ones((64, 64, 192), np.float16)), host_gpu.empty((64, 64, 192), np.float16)
        one, moments = host_gpu.placed(np.ones(192, np.float32)), host_gpu.empty((1 << 16,), np.float32)
        arrays = dict(x=x, y=y, gamma=one, beta=one, moments=moments)
        at = Arrays(**{name: host_gpu.address(each) for name, each in arrays.items()})
        plan = plan_norm(images, 32, host_gpu.limits())
        assert host_gpu.limits() == Limits(163 << 10, 1, "sm_80")
        for work in group_norm_silu(images, at, 32, 1e-5, False, plan):
            host_gpu.launch(work)
        assert (y == 1).all()
        clusters = plan_norm(images, 32, Limits(163 << 10, 8))
        try:
            host_gpu.launch(*group_norm_silu(images, at, 32, 1e-5, False, clusters))
        except EngineError as error:
            assert "cannot be launched as clusters of 8" in str(error), error
        else:
            raise AssertionError
        """,
        environment={"CM_RUNTIME_KERNELS": "gpu"},
        gpu="sm_80",
    )
