"""Folders that diffusers saved: a ConsistencyModelPipeline, or a bare UNet2DModel with or without its scheduler.

    folder/unet/config.json  diffusion_pytorch_model.safetensors     or the same in folder/ itself
    folder/scheduler/scheduler_config.json                           or folder/scheduler_config.json

Weights may be one file or shards with an index, .safetensors or .bin; of .bin nothing is unpickled but tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from cm_runtime.checkpoints import diffusers_options, diffusers_tensors, published
from cm_runtime.checkpoints.native import Checkpoint, load_safetensors, load_torch
from cm_runtime.checkpoints.openai import EMA
from cm_runtime.checkpoints.published import Published
from cm_runtime.choices import Form
from cm_runtime.errors import CheckpointError
from cm_runtime.files import atomic, streams
from cm_runtime.files.records import explain
from cm_runtime.networks.consistency import ModelConfig
from cm_runtime.schedule import NoiseRange

WEIGHTS = "diffusion_pytorch_model"
SCHEDULER = "scheduler_config.json"
JSON_LIMIT = 16 << 20  # bytes; an index of shards is the largest, some 100 kB


def read(folder: Path, precond: Form | None = None, model_card: Published | None = None) -> Checkpoint:
    """The model in ``folder``. Its scheduler decides the preconditioning form; without one ``precond`` or a name must.

    Raises CheckpointError: what is missing or damaged, and the first option, tensor or shard that does not fit.
    """
    where = folder / "unet" if os.path.isdir(folder / "unet") else folder
    config = _json(where / "config.json", f"{folder} is no diffusers folder of a UNet2DModel")
    schedulers = [path for path in (folder / "scheduler" / SCHEDULER, folder / SCHEDULER) if streams.exists(path)]
    scheduler = _json(schedulers[0], str(folder)) if schedulers else None
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise CheckpointError(f"{where}: its config.json is of a {kind}, and cm-runtime reads a UNet2DModel")
    try:
        network = diffusers_options.network_of(config)
        form, sampler = _form(scheduler, precond, model_card)
        weight_files = _weights(where)
        weights = diffusers_tensors.to_ours(_tensors(weight_files), network)
        N = sampler.pop("num_train_timesteps", None)
        boundary = 0.0 if form == "edm" else sampler.get("sigma_min", NoiseRange.sigma_min)
        files = [where / "config.json", *schedulers[:1], *weight_files]
        model = ModelConfig(network=network, precond=form, sigma_boundary=boundary, **sampler)
        published_range = model.noise_range == NoiseRange()
        return Checkpoint(
            config=model,
            default_ema=EMA,
            ema={EMA: {f"F.{name}": tensor for name, tensor in weights.items()}},
            training=published.summary(model_card, "diffusers", N),
            sha256=atomic.sha256_of_files({path.name: path for path in files}),
            sigmas=model_card.sigmas if model_card and published_range else {},
        )
    except ValidationError as error:
        raise CheckpointError(f"{folder}: its scheduler: {explain(error)}") from error
    except CheckpointError as error:
        raise error if str(where) in str(error) else CheckpointError(f"{folder}: {error}") from error


def _form(
    scheduler: Mapping[str, Any] | None, precond: Form | None, model_card: Published | None
) -> tuple[Form, dict[str, Any]]:
    """The form, and what else the scheduler says: without one, nothing."""
    if scheduler is None:
        return published.form(model_card, precond), {}
    if precond not in (None, "boundary") or (model_card is not None and model_card.precond != "boundary"):
        raise CheckpointError(f"its {diffusers_options.SCHEDULER} decides the preconditioning form, which is boundary")
    return "boundary", diffusers_options.sampler_of(scheduler)


def _weights(where: Path) -> list[Path]:
    """The files with the tensors: the whole ones before shards, safetensors before .bin, full precision before fp16."""
    for ending in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin"):
        if streams.exists(path := where / f"{WEIGHTS}{ending}"):
            return [path]
        if streams.exists(index := where / f"{WEIGHTS}{ending}.index.json"):
            return _shards(index)
    raise CheckpointError(f"{where}: it has no {WEIGHTS}.safetensors or .bin")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all of them beside it."""
    shards = _json(index, str(index.parent)).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index} has no weight_map")
    names = sorted(set(map(str, shards.values())))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names a shard in another folder: {name}")
    return [index.parent / name for name in names]


def _tensors(paths: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        content = load_safetensors(path) if path.suffix == ".safetensors" else load_torch(path)
        if not isinstance(content, Mapping) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
        ):
            raise CheckpointError(f"{path} holds no tensors by name")
        if twice := tensors.keys() & content.keys():
            raise CheckpointError(f"{path} holds {min(twice)}, which another shard holds too")
        tensors.update(content)
    return tensors


def _json(path: Path, complaint: str) -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError."""
    if not streams.exists(path):
        raise CheckpointError(f"{complaint}: there is no {path.name} in {path.parent}")
    try:
        content = json.loads(streams.read_text(path, CheckpointError, JSON_LIMIT))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content
