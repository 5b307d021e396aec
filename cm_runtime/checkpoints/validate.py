"""A network read off somebody else's file, checked as our own configurations are."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from cm_runtime.errors import CheckpointError
from cm_runtime.files.records import explain
from cm_runtime.networks.unet import UNetConfig


def checked(**options: Any) -> UNetConfig:
    """The UNetConfig of these options; raises CheckpointError naming the first that no UNet of ours can have."""
    try:
        return UNetConfig(**options)
    except ValidationError as error:
        raise CheckpointError(f"no network of ours: {explain(error)}") from error
