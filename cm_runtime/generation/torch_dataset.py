"""Images as they are drawn, as torch's DataLoader takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from cm_runtime.sampling import Batch


class Source(Protocol):
    """The source of the images."""

    def __iter__(self) -> Iterator[Batch]: ...

    def share(self, worker: int, workers: int) -> Iterator[Batch]:
        """Those of one worker process; of all of them each image once."""
        ...


class Images(IterableDataset[Any]):
    """One item an image, for DataLoader's batch_size to collect: (image, label), or the image without classes.

    image: (C,H,W) uint8, or float32 in [-1, 1]; label: int. A DataLoader's workers share the images.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        for part in self._source.share(worker.id, worker.num_workers) if worker else self._source:
            images = torch.from_numpy(np.ascontiguousarray(part.images.transpose(0, 3, 1, 2)))
            yield from images if part.labels is None else zip(images, part.labels.tolist(), strict=True)
