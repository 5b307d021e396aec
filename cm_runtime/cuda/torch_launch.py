"""Our kernels in torch's streams, which cuda-bindings take by their handles."""

from __future__ import annotations

import torch

from cm_runtime.cuda.context import open_context
from cm_runtime.kernels.launches import Launch
from cm_runtime.kernels.limits import Limits


def launch(work: Launch, device: torch.device) -> None:
    """Puts a kernel in torch's current stream on ``device``. Raises EngineError and MissingExtraError."""
    context = open_context(device.index, "cuda-bindings")
    stream = torch.cuda.current_stream(device).cuda_stream
    with context.current():
        context.launch(work, stream)


def limits(device: torch.device) -> Limits:
    """Limits of a GPU to a launch. Raises as `launch` does."""
    return open_context(device.index, "cuda-bindings").limits
