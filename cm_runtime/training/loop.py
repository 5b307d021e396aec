"""The training loop: phases in turn, every step a function of (config, step), stopped and resumed at any step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from cm_runtime import schedule
from cm_runtime.artifact import TrainingSummary
from cm_runtime.backends.torch import chosen_device
from cm_runtime.checkpoint import Checkpoint
from cm_runtime.errors import Interrupted, TrainingError
from cm_runtime.model import ConsistencyModel, ModelConfig, build
from cm_runtime.training import grids
from cm_runtime.training.config import EctPhase, EdmPhase, TrainConfig
from cm_runtime.training.data import ImageSet
from cm_runtime.training.ema import Averages
from cm_runtime.training.losses import loss_of
from cm_runtime.training.run import RunFolder
from cm_runtime.training.stopping import stop_signals
from cm_runtime.training.stream import Stream
from cm_runtime.unet import UNetConfig

GRID_IMAGES = 64
_LOG_EVERY = 10


@dataclass(frozen=True)
class Report:
    """Where training is, for a progress bar."""

    phase: int
    method: str
    step: int
    steps: int
    loss: float
    images_per_second: float


def train(
    config: TrainConfig,
    data: ImageSet,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    report: Callable[[Report], None] = lambda _: None,
) -> Path:
    """Runs every phase and returns the path of the checkpoint.

    Raises TrainingError where the loss is not finite, Interrupted after SIGINT or SIGTERM, and what RunFolder raises.
    """
    device = chosen_device(config.device)
    model_config = model_config_of(config, data)
    torch.manual_seed(config.seed)
    model = build(model_config).to(device)
    stream = Stream(
        data, seed=config.seed, classes=bool(model_config.network.num_classes), flip=config.data.flip, device=device
    )
    folder = RunFolder(out)
    with folder.open(config, resume=resume, force=force) as state, stop_signals() as stopping:
        run = _Run(config, model, stream, data.name, folder, report, stopping)
        first, step = run.restore(state) if state else (0, 0)
        for index in range(first, len(config.phase)):
            run.phase(index, step, state if index == first else None)
            step = 0
    return folder.checkpoint


def model_config_of(config: TrainConfig, data: ImageSet) -> ModelConfig:
    """The model that ``config`` makes of ``data``. Raises TrainingError for images no UNet of it can take."""
    channels, height, width = data.image_shape
    if height != width:
        raise TrainingError(f"images must be square, not {height}x{width}; set data.image_size to crop and resize")
    try:
        network = UNetConfig(
            **config.network.model_dump(),
            image_size=height,
            image_channels=channels,
            num_classes=data.num_classes if config.data.classes else 0,
        )
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise TrainingError(f"the network does not fit {data.name}: {reason}") from error
    return ModelConfig(
        network=network,
        precond=config.precond,
        sigma_data=config.sigma_data,
        sigma_boundary=0.0 if config.precond == "edm" else schedule.SIGMA_MIN,
    )


class _Run:
    """The parts of one run that every phase shares."""

    def __init__(
        self,
        config: TrainConfig,
        model: ConsistencyModel,
        stream: Stream,
        data_name: str,
        folder: RunFolder,
        report: Callable[[Report], None],
        stopping: Callable[[], bool],
    ) -> None:
        self.config, self.model, self.stream, self.data_name = config, model, stream, data_name
        self.folder, self.report, self.stopping = folder, report, stopping
        self.images, self.seconds = 0, 0.0

    def restore(self, state: dict[str, Any]) -> tuple[int, int]:
        """Takes weights and counters from ``state``: (phase, step) to go on with. Raises TrainingError."""
        if state["shape"] != self._shape():
            raise TrainingError(
                f"{self.folder.path} was started on images of {state['shape']}, not of {self._shape()};"
                " use the same data to resume"
            )
        self.model.load_state_dict(state["model"])
        self.images, self.seconds = state["images"], state["seconds"]
        return state["phase"], state["step"]

    def _shape(self) -> list[int]:
        """(C, H, W, classes) of what the model is for."""
        return [*self.model.config.image_shape, self.model.config.network.num_classes]

    def phase(self, index: int, first: int, state: dict[str, Any] | None) -> None:
        """Trains one phase from step ``first``; the model leaves it holding the averaged weights."""
        phase = self.config.phase[index]
        model = self.model.train()
        loss_fn = loss_of(phase)
        optimizer = torch.optim.RAdam(model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.99), foreach=True)
        averages = Averages(model, phase.ema)
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            averages.load(state["ema"])
        autocast = torch.autocast(
            next(model.parameters()).device.type, torch.bfloat16, enabled=phase.precision == "bf16"
        )
        saved = first
        for step in range(first, phase.steps):
            began = time.perf_counter()
            torch.manual_seed(_step_seed(self.config.seed, index, step))
            x, label = self.stream.batch(self.images, phase.batch)
            for group in optimizer.param_groups:
                group["lr"] = phase.learning_rate * learning_rate_factor(phase, step)
            try:
                with autocast:
                    loss = loss_fn(model, x, label, step / phase.steps)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"out of memory at phase {index} step {step}; lower phase.{index}.batch or the network's channels"
                ) from error
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), phase.clip, foreach=True)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                raise self._diverged("the loss is", index, step, saved)
            optimizer.step()
            averages.update(step)
            self.images += phase.batch
            self.seconds += time.perf_counter() - began
            done = step + 1
            rate = phase.batch / (time.perf_counter() - began)
            where = Report(index, phase.method, done, phase.steps, loss.item(), rate)
            self.report(where)
            if done % _LOG_EVERY == 0 or done == phase.steps:
                self._log(where, optimizer.param_groups[0]["lr"], norm.item())
            stop = self.stopping()
            # the grid first: a kill between the two draws it again, and so loses nothing
            if done % self.config.sample_every == 0 or done == phase.steps:
                self._grid(phase, f"{index}-{phase.method}-{done:06d}", averages)
            if done % self.config.save_every == 0 or done == phase.steps or stop:
                if not _finite(self._stored(averages)):
                    raise self._diverged(f"the weights in {self.config.weights} are", index, step, saved)
                self._save(index, done, optimizer, averages)
                saved = done
            if stop and not (done == phase.steps and index == len(self.config.phase) - 1):
                raise Interrupted(f"stopped at phase {index} step {done}; go on with --resume --out {self.folder.path}")
        model.load_state_dict(averages.state()[f"{phase.ema[0]:g}"])
        self.folder.keep(index, phase.method)

    def _diverged(self, what: str, index: int, step: int, saved: int) -> TrainingError:
        good = f"the last good checkpoint is of step {saved}" if self.folder.checkpoint.exists() else "nothing is saved"
        return TrainingError(
            f"{what} not finite at phase {index} step {step}; {good} in {self.folder.path};"
            " try a lower learning_rate or precision fp32"
        )

    def _stored(self, averages: Averages) -> dict[str, dict[str, Tensor]]:
        """The averages as the checkpoint holds them."""
        if self.config.weights == "float32":
            return averages.state()
        return {rate: {k: v.half() for k, v in weights.items()} for rate, weights in averages.state().items()}

    def _save(self, index: int, step: int, optimizer: torch.optim.Optimizer, averages: Averages) -> None:
        phase = self.config.phase[index]
        checkpoint = Checkpoint(
            config=self.model.config,
            default_ema=f"{phase.ema[0]:g}",
            ema=self._stored(averages),
            training=TrainingSummary(
                method=phase.method,
                data=self.data_name,
                steps=step + sum(p.steps for p in self.config.phase[:index]),
                images=self.images,
                seconds=round(self.seconds, 1),
                config=self.config.model_dump(mode="json", exclude={"data": {"source"}}),
            ),
        )
        state = {
            "config": self.config.model_dump(mode="json"),
            "shape": self._shape(),
            "phase": index,
            "step": step,
            "images": self.images,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": averages.state(),
        }
        self.folder.save(state, checkpoint)

    def _log(self, where: Report, learning_rate: float, norm: float) -> None:
        self.folder.log(
            {
                "phase": where.phase,
                "method": where.method,
                "step": where.step,
                "images": self.images,
                "seconds": round(self.seconds, 2),
                "loss": where.loss,
                "learning_rate": learning_rate,
                "gradient_norm": norm,
                "images_per_second": round(where.images_per_second, 1),
            }
        )

    def _grid(self, phase: EdmPhase | EctPhase, name: str, averages: Averages) -> None:
        config = self.model.config
        if config.image_shape[0] not in (1, 3):  # no picture can show these
            return
        averaged = build(config).to(next(self.model.parameters()).device)
        averaged.load_state_dict(averages.state()[f"{phase.ema[0]:g}"])
        pictures = grids.draw(averaged, phase.method, GRID_IMAGES, self.config.seed)
        self.folder.grid(name, pictures, {"seed": self.config.seed, "images": self.images})


def learning_rate_factor(phase: EdmPhase | EctPhase, step: int) -> float:
    """1, rising from 0 over the warm-up and falling to 0 over the last ``decay`` share of the steps."""
    rise = min(1.0, (step + 1) / phase.warmup) if phase.warmup else 1.0
    tail = phase.decay * phase.steps
    fall = min(1.0, (phase.steps - step) / tail) if tail else 1.0
    return rise * fall


def _finite(stored: dict[str, dict[str, Tensor]]) -> bool:
    return all(bool(tensor.isfinite().all()) for weights in stored.values() for tensor in weights.values())


def _step_seed(seed: int, phase: int, step: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{phase}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
