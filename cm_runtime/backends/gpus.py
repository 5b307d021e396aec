"""The GPUs that sampling can stay on, and what keeps an installation from using them."""

from __future__ import annotations

from cm_runtime.backends import ort
from cm_runtime.cuda import context
from cm_runtime.errors import CmRuntimeError
from cm_runtime.extras import TWO_RUNTIMES, distribution_version, has_driver, has_two_runtimes


def describe() -> str:
    """The binding that calls the driver, and its GPUs; or why none can be used. Empty where there is no driver."""
    if not has_driver():
        return ""
    try:
        driver = context.driver()
        context.check_version(driver)
        names = [f"cuda:{index} {context.gpu(index).name}" for index in range(driver.count())]
    except CmRuntimeError as error:
        return str(error)
    return f"by {driver.name}: {'; '.join(names)}"


def warn() -> str:
    """Two builds of ONNX Runtime, or the first library that its CUDA provider does not find; else nothing."""
    if has_two_runtimes():
        return TWO_RUNTIMES
    if not has_driver() or not distribution_version("onnxruntime-gpu"):
        return ""
    return ort.missing_library()
