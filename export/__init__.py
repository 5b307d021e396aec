"""From a checkpoint to a file that an engine runs, proved equal to the torch model it came from."""

from cm_runtime.export.denoiser import onnx

__all__ = ["onnx"]
