"""From a checkpoint to a file that an engine runs, proved equal to the torch model it came from; or to diffusers."""

from cm_runtime.export.diffusers import diffusers
from cm_runtime.export.onnx_file import onnx

__all__ = ["diffusers", "onnx"]
