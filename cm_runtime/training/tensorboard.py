"""TensorBoard event files of a run: scalars and sample grids, written synchronously.

torch's SummaryWriter writes in a thread: on a full disk that prints a traceback, and the error comes some points later
and without the file's name.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors.reasons import output_errors
from cm_runtime.extras import require


class Board:
    """A new event file in ``folder``; it hides the points of earlier files after ``images``.

    Raises MissingExtraError without tensorboard, OutputError if the file cannot be written.
    """

    def __init__(self, folder: Path, images: int) -> None:
        require("tensorboard", "cm-runtime train")
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
        from torch.utils.tensorboard import summary

        self._event = Event
        self._summary: Any = summary  # torch has no types for it
        self._path = folder / f"events.out.tfevents.{time.time_ns()}"
        with output_errors(self._path):
            folder.mkdir(exist_ok=True)
            self._file = self._path.open("xb", buffering=0)
        self._writer = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if images:
            self._write(step=images + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, images: int, values: dict[str, float]) -> None:
        """Add a point to each curve, over images seen."""
        for name, value in values.items():
            self._write(step=images, summary=self._summary.scalar(name, value))

    def note(self, curve: str, images: int, text: str) -> None:
        """Add a sentence on a curve to TensorBoard's texts."""
        self._write(step=images, summary=self._summary.text(curve, text))

    def grid(self, images: int, picture: NDArray[np.uint8]) -> None:
        """Add a sample grid: (H, W, C) uint8."""
        self._write(step=images, summary=self._summary.image("samples", picture, dataformats="HWC"))

    def close(self) -> None:
        """Close the file; all of it is written already."""
        self._file.close()

    def _write(self, **content: Any) -> None:
        with output_errors(self._path):
            self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
