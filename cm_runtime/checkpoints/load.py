"""Checkpoints of other tools as ours: OpenAI's ``.pt`` files and diffusers' folders, loaded strictly or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cm_runtime.choices import Form
from cm_runtime.errors import CheckpointError, RequestError
from cm_runtime.extras import require

if TYPE_CHECKING:
    from cm_runtime.checkpoints.native import Checkpoint


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    precond: Form | None = None,
    head_channels: int | None = None,
    image_size: int | None = None,
    model_name: str | None = None,
) -> Checkpoint:
    """Load a checkpoint: of `cm-runtime train`, a flat state dict of OpenAI's, or a folder of diffusers'.

    Args:
        path: of a ``.pt``, ``.pth``, ``.bin`` or ``.safetensors`` file, or of a folder.
        precond: the preconditioning form, where neither the file nor a published name decides it.
        head_channels: of an attention head in an OpenAI file; by default 64, as in all published networks.
        image_size: of an OpenAI file's images, in pixels; by default what makes the innermost feature map 8x8.
        model_name: the published model that this is, as cd_imagenet64_l2; by default the one that the file is named
            after (a folder: after diffusers-).

    Returns:
        The checkpoint, for `export` and for training.

    Raises:
        CheckpointError: the file is damaged, or is no such model; the message names what does not fit.
        MissingExtraError: torch is not installed.
        RequestError: the file has no use for an option.

    Example:
        >>> checkpoint = cm.load_checkpoint("cd_imagenet64_l2.pt")
    """
    require("torch", "cm_runtime.load_checkpoint")
    from cm_runtime.checkpoints import diffusers, openai, published
    from cm_runtime.checkpoints import native as ours

    where = Path(path)
    model = published.find(where) if model_name is None else published.find_by_name(model_name)
    is_folder = os.path.isdir(where)  # False for names that no file can have
    if is_folder and (run := where / "ckpt.pt").is_file() and not (where / "config.json").exists():
        raise CheckpointError(f"{where} is the folder of a training run: take its checkpoint, {run}")
    if is_folder:
        _refuse(where, "a diffusers folder", "its config.json", head_channels=head_channels, image_size=image_size)
        return diffusers.read(where, precond, model)
    content = ours.load_safetensors(where) if where.suffix == ".safetensors" else ours.load_torch(where)
    if isinstance(content, Mapping) and content.get("format") == ours.FORMAT:
        options = {
            "precond": precond,
            "head_channels": head_channels,
            "image_size": image_size,
            "model_name": model_name,
        }
        _refuse(where, "a cm-runtime checkpoint", "itself", **options)
        return ours.parse_checkpoint(content, where)
    try:
        heads = openai.HEAD_CHANNELS if head_channels is None else head_channels
        return openai.convert(content, where, model, precond, heads, image_size)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _refuse(where: Path, what: str, source: str, **options: object) -> None:
    """Raises RequestError for the first option that was given."""
    for name, value in options.items():
        if value is not None:
            option = name.replace("_", "-")
            raise RequestError(f"{where} is {what} and says its {option} {source}; leave --{option} out")
