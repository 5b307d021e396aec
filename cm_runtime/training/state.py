"""Training state as `--resume` reads it: checked whole before anything is built from it or overwritten."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm_runtime.checkpoints.native import check_tensors, load_plain, shapes_of
from cm_runtime.errors import CheckpointError, ConfigError, TrainingError
from cm_runtime.files import streams
from cm_runtime.networks.consistency import ModelConfig, build
from cm_runtime.training.config import TrainConfig, parse_config
from cm_runtime.training.ema import mu_of

STATE_FORMAT = "cm-runtime training state 2"
STATE_KEYS = {"config", "inputs", "phase", "step", "images", "seconds", "model", "target", "optimizer", "ema"}
MOST_SECONDS = 1e12
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of Adam and RAdam, for each tensor


def read_state(path: Path) -> tuple[dict[str, Any], TrainConfig]:
    """Read the state in ``path`` and its configuration.

    Its position in the run fits that configuration; its tensors are for `check_fit`. Raises TrainingError.
    """
    streams.regular(path, TrainingError)
    try:
        state = load_plain(path)
    except CheckpointError as error:
        raise TrainingError(f"{error}; put a copy back, or start anew with --force") from error
    if not isinstance(state.get("format"), str) or state["format"] != STATE_FORMAT:
        raise TrainingError(f"{path} is not a training state of this version; start anew with --force")
    if absent := STATE_KEYS - state.keys():
        raise damage(path, f"it has no {min(absent)}")
    try:
        config = parse_config(state["config"], "config")
    except (ConfigError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise damage(path, str(error)) from error
    phase, step, seconds, inputs = (state[key] for key in ("phase", "step", "seconds", "inputs"))
    if type(phase) is not int or not 0 <= phase < len(config.phase):
        raise damage(path, "its phase is none of the configuration's")
    if type(step) is not int or not 0 <= step <= config.phase[phase].steps:
        raise damage(path, f"its step is none of phase {phase}")
    images = sum(each.steps * each.batch for each in config.phase[:phase]) + step * config.phase[phase].batch
    if type(state["images"]) is not int or state["images"] != images:
        raise damage(path, f"it counts other images than the {images} up to its step")
    if type(seconds) not in (int, float) or not 0 <= seconds < MOST_SECONDS:
        raise damage(path, "its seconds are no time")
    if not isinstance(inputs, dict):
        raise damage(path, "its inputs are no checksums")
    return state, config


def check_fit(state: Mapping[str, Any], config: TrainConfig, model: ModelConfig, path: Path) -> None:
    """Raise TrainingError unless the tensors of ``state`` fit its phase, which trains ``model``."""
    phase = config.phase[state["phase"]]
    network = build(model, "meta")
    shapes = shapes_of(network)
    try:
        check_tensors(shapes, state["model"], "its weights do not fit")
        if mu_of(phase) is not None:
            check_tensors(shapes, state["target"], "its target does not fit")
        for rate in (f"{each:g}" for each in phase.ema):
            if not isinstance(state["ema"], dict) or rate not in state["ema"]:
                raise CheckpointError(f"it has no average of rate {rate}")
            check_tensors(shapes, state["ema"][rate], f"its average of rate {rate} does not fit")
        _check_moments(state["optimizer"], [tuple(each.shape) for each in network.parameters()])
    except CheckpointError as error:
        raise damage(path, str(error)) from error


def damage(path: Path, wrong: str) -> TrainingError:
    """Word the error of a file that a run cannot go on from."""
    return TrainingError(f"{path} is damaged: {wrong}; put a copy back, or start anew with --force")


def moments(state: Mapping[str, Any], fresh: torch.optim.Optimizer) -> dict[str, Any]:
    """Build the state dict of an optimizer from the moments of ``state`` and the options of ``fresh``."""
    return {"state": state["optimizer"]["state"], "param_groups": fresh.state_dict()["param_groups"]}


def _check_moments(optimizer: Any, shapes: list[tuple[int, ...]]) -> None:
    states = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(states, dict):
        raise CheckpointError("its optimizer has no state")
    for number, tensors in states.items():
        if type(number) is not int or not 0 <= number < len(shapes):
            raise CheckpointError("its optimizer is of another network")
        if not isinstance(tensors, dict) or tensors.keys() != MOMENTS:
            raise CheckpointError(f"its optimizer's moments of tensor {number} are not complete")
        for name, tensor in tensors.items():
            shape = () if name == "step" else shapes[number]
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise CheckpointError(f"its optimizer's {name} of tensor {number} does not fit")
            if tensor.layout != torch.strided or tensor.is_meta or not bool(tensor.isfinite().all()):
                raise CheckpointError(f"its optimizer's {name} of tensor {number} is not dense, or not finite")
