"""Names that users choose from, for the command line as for Python: engines, precisions, graphs, files."""

from __future__ import annotations

from typing import Literal

BackendName = Literal["auto", "ort", "openvino", "torch", "torch.compile", "tensorrt", "tensorrt-rtx"]
ComputePrecision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Form = Literal["boundary", "edm", "piecewise"]
GraphKind = Literal["denoiser", "sampler", "network"]
Precision = Literal["fp32", "fp16", "bf16"]
Runner = Literal["local", "ray"]
ShardKind = Literal["npz", "png", "wds", "parquet"]
# Whose operators an exported graph has: the standard's, ONNX Runtime's on a GPU, or those that TensorRT fuses
Target = Literal["cpu", "cuda", "tensorrt"]
