"""TensorBoard event files of a run: scalars and sample grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cm_runtime.extras import require


class Board:
    """Writes into ``folder``; what an earlier run had written of images from ``images`` on is hidden."""

    def __init__(self, folder: Path, images: int) -> None:
        require("tensorboard", "cm-runtime train")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=images or None)

    def scalars(self, images: int, values: dict[str, float]) -> None:
        """One point of each curve, over images seen."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, images)

    def grid(self, images: int, picture: NDArray[np.uint8]) -> None:
        """A sample grid: (H, W, C) uint8."""
        self._writer.add_image("samples", picture, images, dataformats="HWC")

    def close(self) -> None:
        """Writes what is still held back."""
        self._writer.close()
