"""Provenance of a run besides its configuration: versions, machine, data, command."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cm_runtime import __version__
from cm_runtime.errors.wording import quantity
from cm_runtime.subprocesses import commit, processor
from cm_runtime.training.data.image_set import ImageSet
from cm_runtime.training.distributed import Workers


def session(data: ImageSet, workers: Workers) -> dict[str, Any]:
    """Describe a start or resumption of a run, for run.json."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "cm_runtime": __version__,
        "commit": commit(Path(__file__).parents[2]) or None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.release()}",
        "processor": f"{processor()}, {quantity(os.cpu_count() or 1, 'thread')}",
        "device": torch.cuda.get_device_name(workers.device) if workers.device.type == "cuda" else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "workers": workers.world,
        "data": {
            "name": data.name,
            "images": len(data),
            "shape": list(data.image_shape),
            "classes": data.num_classes,
        },
    }


def fingerprint(data: ImageSet) -> str:
    """SHA-256 of all pixels and labels with their shapes: equal for equal training data."""
    digest = hashlib.sha256(f"{data.images.dtype} {data.images.shape} {data.num_classes}".encode())
    for array in (data.images, data.labels):
        if array is not None:
            digest.update(np.ascontiguousarray(array).data.cast("B"))
    return digest.hexdigest()
