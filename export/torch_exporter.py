"""torch's own exporter, for the plain export that exports are compared with."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cm_runtime.checkpoints.native import Checkpoint


def plain(checkpoint: Checkpoint, path: Path) -> None:
    """Export f by one call of torch.onnx.export, as a user would: x, sigma, label -> denoised."""
    config = checkpoint.config
    names = ["x", "sigma", "label"][: 3 if config.network.num_classes else 2]
    inputs = (torch.zeros(2, *config.image_shape), torch.ones(2), torch.zeros(2, dtype=torch.int64))
    with quiet():
        torch.onnx.export(
            checkpoint.model().eval(),
            inputs[: len(names)],
            path,
            dynamo=True,
            input_names=names,
            output_names=["denoised"],
            dynamic_shapes={name: {0: torch.export.Dim("N")} for name in names},
            verbose=False,
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's warnings of packages that nothing here needs."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
