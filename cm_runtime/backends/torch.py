"""f on eager torch: checkpoints run as they are, the reference that other engines are held to."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from cm_runtime.artifact import Manifest
from cm_runtime.backends.base import checked_inputs, images_at_once
from cm_runtime.errors import EngineError
from cm_runtime.model import ConsistencyModel
from cm_runtime.steps import Array


class TorchBackend:
    """A torch module behind the Denoiser protocol; the module is put in evaluation mode while it is asked."""

    name = "torch"

    def __init__(self, model: ConsistencyModel, manifest: Manifest, device: str = "cpu") -> None:
        self._model = model.to(chosen_device(device))
        self.manifest = manifest
        self.device = device

    @property
    def micro_batch(self) -> int:
        """Images at once, by their size."""
        return images_at_once(self.manifest, self.device)

    def denoise(self, x: ArrayLike, sigma: ArrayLike, label: ArrayLike | None = None) -> Array:
        """x (N,C,H,W) float32, sigma scalar or (N,), label (N,) -> x0 (N,C,H,W) float32, unclamped."""
        return self.evaluate(*checked_inputs(self.manifest, x, sigma, label))

    def evaluate(self, images: Array, levels: Array, labels: NDArray[np.int64] | None) -> Array:
        """One evaluation of the network, of inputs that `checked_inputs` made; what is measured as the network."""
        training = self._model.training
        self._model.eval()
        try:
            with torch.inference_mode():
                x0 = self._model(
                    torch.from_numpy(images if images.flags.writeable else images.copy()).to(self.device),
                    torch.from_numpy(levels).to(self.device),
                    None if labels is None else torch.from_numpy(labels).to(self.device),
                )
                return np.asarray(x0.cpu().numpy(), np.float32)
        except RuntimeError as error:
            raise EngineError(f"torch: {str(error).splitlines()[0]}") from error
        finally:
            self._model.train(training)


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
