"""CUDA, which nothing else touches: the driver, a device at work, graphs, and the step ops' twin on a GPU."""

from cm_runtime.cuda.context import Gpu, driver, failing, gpu, on_this_thread
from cm_runtime.cuda.device import Device, Leaving
from cm_runtime.cuda.graph import Graph
from cm_runtime.cuda.steps import DeviceSteps, Places

__all__ = ["Device", "DeviceSteps", "Gpu", "Graph", "Leaving", "Places", "driver", "failing", "gpu", "on_this_thread"]
