"""f on torch: checkpoints run as they are, the reference that other engines are held to; or compiled."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cm_runtime.artifact import Manifest, Precision
from cm_runtime.backends.base import Backend
from cm_runtime.errors import EngineError
from cm_runtime.model import ConsistencyModel

MOST_BATCH_SIZES = 256  # that are compiled, each apart; torch by itself gives up after 8


class TorchBackend(Backend):
    """A torch module as a backend; the module is put in evaluation mode while it is asked.

    precision: in bf16 and fp16 by torch.autocast, with skip-scaling and statistics in float32. is_compiled: by
    torch.compile, once for each batch size, when it is first asked for; never in parts.
    """

    name = "torch"

    def __init__(
        self,
        model: ConsistencyModel,
        manifest: Manifest,
        device: str = "cpu",
        precision: Precision = "fp32",
        is_compiled: bool = False,
    ) -> None:
        self._model = model.to(chosen_device(device))
        self._f: Callable[..., torch.Tensor] = self._model
        self.manifest = manifest
        self.device = device
        self.version = f"torch {torch.__version__}"
        self._type = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self._is_compiled = is_compiled
        if self._type is not None:
            out = self._model.F.out
            out[-1] = _InFloat32(out[-1])
        if is_compiled:
            self.name = "torch.compile"
            limits: Any = importlib.import_module("torch._dynamo").config
            limits.recompile_limit = max(limits.recompile_limit, MOST_BATCH_SIZES)
            mode = "max-autotune" if device.startswith("cuda") else "default"
            self._f = torch.compile(self._model, fullgraph=True, dynamic=False, mode=mode)

    def evaluate(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """One evaluation of the module on checked inputs; see `Backend`."""
        training = self._model.training
        self._model.eval()
        kind = torch.device(self.device).type
        try:
            with torch.inference_mode(), torch.autocast(kind, self._type, enabled=self._type is not None):
                x0 = self._f(*(self._tensor(each) for each in feed.values()))
                return np.asarray(x0.float().cpu().numpy(), np.float32)
        except Exception as error:  # a compiler's errors are of many kinds
            if not self._is_compiled and not isinstance(error, RuntimeError):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise EngineError(f"{self.name}: {' '.join(lines[: 1 + lines[0].endswith(':')])}") from error
        finally:
            self._model.train(training)

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self.device)


class _InFloat32(nn.Module):
    """The last convolution, whose rounding would be the image's, outside of autocast."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        with torch.autocast(h.device.type, enabled=False):
            out: torch.Tensor = self.layer(h.float())
            return out


def chosen_device(name: str) -> torch.device:
    """auto: the first GPU where torch has one, else the CPU. Raises EngineError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EngineError(f"torch cannot use device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"device must be auto, cpu or cuda:N, not {name}")
    return device
