"""f on eager torch: checkpoints run as they are, the reference that other engines are held to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cm_runtime.artifact import Manifest
from cm_runtime.backends.base import Backend
from cm_runtime.errors import EngineError
from cm_runtime.model import ConsistencyModel


class TorchBackend(Backend):
    """A torch module as a backend; the module is put in evaluation mode while it is asked."""

    name = "torch"

    def __init__(self, model: ConsistencyModel, manifest: Manifest, device: str = "cpu") -> None:
        self._model = model.to(chosen_device(device))
        self.manifest = manifest
        self.device = device
        self.version = f"torch {torch.__version__}"

    def evaluate(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """One evaluation of the module on checked inputs; see `Backend`."""
        training = self._model.training
        self._model.eval()
        try:
            with torch.inference_mode():
                x0 = self._model(*(self._tensor(each) for each in feed.values()))
                return np.asarray(x0.cpu().numpy(), np.float32)
        except RuntimeError as error:
            raise EngineError(f"torch: {str(error).splitlines()[0]}") from error
        finally:
            self._model.train(training)

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self.device)


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
