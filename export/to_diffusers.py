"""checkpoint -> a folder that diffusers' ``ConsistencyModelPipeline.from_pretrained`` opens."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cm_runtime.checkpoints import diffusers_options, diffusers_tensors
from cm_runtime.checkpoints.native import Checkpoint
from cm_runtime.errors import OutputError
from cm_runtime.extras import require
from cm_runtime.files import atomic
from cm_runtime.files.workspaces import sweep

ENDING = ".diffusers"  # of the workspaces that it is written in
GRID = 40  # diffusers' own default for num_train_timesteps, where the checkpoint does not know
INDEX = {
    "_class_name": "ConsistencyModelPipeline",
    "scheduler": ["diffusers", diffusers_options.SCHEDULER],
    "unet": ["diffusers", "UNet2DModel"],
}


def write(checkpoint: Checkpoint, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write the folder ``path``; arguments and errors are those of `export.diffusers`."""
    require("safetensors", "the export to diffusers")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = Path(path)
    _check_replaceable(target, force)
    config = checkpoint.config
    N = checkpoint.training.config.get("num_train_timesteps")
    scheduler = diffusers_options.scheduler_of(config, N if isinstance(N, int) else GRID)
    unet = diffusers_options.unet2d_of(config.network)
    weights = {name.removeprefix("F."): tensor for name, tensor in checkpoint.ema[checkpoint.default_ema].items()}
    with atomic.folder_written(target, "replaced" if force else "refused", ending=ENDING) as folder:
        (folder / "unet").mkdir()
        (folder / "scheduler").mkdir()
        _write_json(folder / "model_index.json", INDEX)
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(folder / "unet" / "config.json", unet)
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        try:
            save_file(diffusers_tensors.to_theirs(weights, config.network), file, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, among others
            raise OutputError(f"{target} cannot be written: {error}") from error


def _check_replaceable(target: Path, force: bool) -> None:
    """Raise OutputError; a folder is replaced only where it holds such a pipeline, and ``force`` says so."""
    sweep(target.parent, (ENDING,))  # which restores a folder that a kill left moved aside
    if not target.exists():
        atomic.check_writable(target)
        return
    if not force:
        raise OutputError(f"{target} exists; replace it with --force")
    if not (target / "model_index.json").is_file():
        raise OutputError(f"{target} is not a folder that diffusers saved, and is not replaced")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
