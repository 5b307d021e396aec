"""From a checkpoint to a file that an engine runs, proved equal to the torch model it came from; or to diffusers."""

from cm_runtime.export.denoiser import onnx
from cm_runtime.export.diffusers import diffusers

__all__ = ["diffusers", "onnx"]
