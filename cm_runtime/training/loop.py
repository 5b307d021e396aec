"""The training loop: phases in turn, every step a function of (config, step), stopped and resumed at any step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from cm_runtime.checkpoints.load import load_checkpoint
from cm_runtime.checkpoints.native import Checkpoint, read_checkpoint
from cm_runtime.errors import Interrupted, TrainingError
from cm_runtime.files.records import first_fault
from cm_runtime.manifest import TrainingSummary
from cm_runtime.networks.consistency import ConsistencyModel, ModelConfig, build
from cm_runtime.networks.unet import NetworkShape, UNetConfig
from cm_runtime.schedule import NoiseRange
from cm_runtime.training import preview, provenance, second_points
from cm_runtime.training.batches import Stream
from cm_runtime.training.config import Phase, TrainConfig
from cm_runtime.training.data.image_set import ImageSet
from cm_runtime.training.distributed import Workers, join_workers
from cm_runtime.training.ema import mu_of
from cm_runtime.training.run_folder import RunFolder
from cm_runtime.training.signals import stop_signals
from cm_runtime.training.state import check_fit
from cm_runtime.training.stepper import Stepper, dtype_of, learning_rate_factor

GRID_IMAGES = 64
_LOG_EVERY = 10
WEIGHT_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Report:
    """Progress of a run after a step."""

    phase: int
    method: str
    step: int
    steps: int
    loss: float
    images_per_second: float


@dataclass(frozen=True)
class Observer:
    """Callbacks of a run: with (phase, step) as a phase begins or goes on, and once a step is on the disk."""

    begin: Callable[[int, int], object] = lambda *_: None
    step: Callable[[Report], object] = lambda _: None
    save: Callable[[int, int], object] = lambda *_: None


def train(
    config: TrainConfig,
    data: ImageSet,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    observer: Observer = Observer(),
) -> Path:
    """Run every phase and return the path of the checkpoint. Under torchrun every worker calls it alike.

    Raises TrainingError where the loss is not finite, CheckpointError where ``init`` cannot be read, Interrupted after
    SIGINT or SIGTERM, and what RunFolder raises.
    """
    with join_workers(config.device) as workers:
        for index, phase in enumerate(config.phase):
            if phase.batch < workers.world:
                raise TrainingError(f"phase.{index}.batch {phase.batch} is less than the {workers.world} workers")
        start = _load_init(config)
        if config.network is None and start is not None:
            shape = start.config.network.model_dump(include=set(NetworkShape.model_fields))
            config = config.model_copy(update={"network": NetworkShape(**shape)})
        for index, phase in enumerate(config.phase):
            _check_memory(index, phase, model_config_of(config, data, phase), workers)
        folder = RunFolder(out)
        inputs = {"data": provenance.fingerprint(data), "init": "" if start is None else start.sha256}
        ownership = folder.open(config, inputs, resume=resume, force=force) if workers.lead else nullcontext()
        with ownership as saved_state, stop_signals() as must_stop:
            if saved_state is not None:
                model = model_config_of(config, data, config.phase[saved_state["phase"]])
                check_fit(saved_state, config, model, folder.state)
            state = workers.from_lead(lambda: saved_state)
            if workers.lead:
                images = 0 if state is None else state["images"]
                folder.begin(provenance.session(data, workers), images, tensorboard=config.tensorboard)
            _Run(config, data, folder, observer, must_stop, workers).train_phases(state, start)
    return folder.checkpoint


def _load_init(config: TrainConfig) -> Checkpoint | None:
    """Load the model that the first phase starts from, if any."""
    if config.init is None:
        return None
    return load_checkpoint(
        config.init,
        precond=config.init_precond,
        head_channels=config.init_head_channels,
        image_size=config.init_image_size,
    )


def model_config_of(config: TrainConfig, data: ImageSet, phase: Phase | None = None) -> ModelConfig:
    """Configure the model that a phase of ``config`` (default: the last) trains on ``data``.

    A denoiser is always of the edm form, which its loss is weighted for (arXiv 2206.00364, table 1). Raises
    TrainingError for images no UNet of it can take.
    """
    channels, height, width = data.image_shape
    if height != width:
        raise TrainingError(f"images must be square, not {height}x{width}; set data.image_size to crop and resize")
    assert config.network is not None  # `train` takes that of init where there is none
    try:
        network = UNetConfig(
            **config.network.model_dump(),
            image_size=height,
            image_channels=channels,
            num_classes=data.num_classes if config.data.classes else 0,
        )
    except ValidationError as error:
        raise TrainingError(f"the network does not fit {data.name}: {first_fault(error)[1]}") from error
    form = "edm" if (phase or config.phase[-1]).method == "edm" else config.precond
    return ModelConfig(
        network=network,
        precond=form,
        sigma_data=config.sigma_data,
        sigma_boundary=0.0 if form == "edm" else NoiseRange.sigma_min,
    )


def _check_memory(index: int, phase: Phase, config: ModelConfig, workers: Workers) -> None:
    """Raise TrainingError if the machine has less memory than the phase is sure to take on the CPU.

    Counted are weights, gradients, two moments, averages and target, and the activations that the outermost level
    keeps for its backward pass; on a GPU only the weights, which are drawn on the CPU.
    """
    size = dtype_of(phase).itemsize
    copies = 4 + len(phase.ema) + (mu_of(phase) is not None) if workers.device.type == "cpu" else 1
    weights = copies * size * sum(each.numel() for each in build(config, "meta").parameters())
    network, images = config.network, 0
    if workers.device.type == "cpu":
        share = len(workers.share(phase.batch))
        pixels = (network.image_size // network.patch) ** 2
        activations = 2 * network.res_blocks * network.channels * pixels * size
        images = activations * min(phase.micro_batch or share, share)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if weights + images > memory:
        cure = "network.channels" if weights > images else f"phase.{index}.micro_batch"
        raise TrainingError(
            f"phase {index} takes at least {(weights + images) / 1e9:.0f} GB of memory and the machine has"
            f" {memory / 1e9:.0f} GB; lower {cure}"
        )


class _Run:
    """One run: what its phases share, and its position."""

    def __init__(
        self,
        config: TrainConfig,
        data: ImageSet,
        folder: RunFolder,
        observer: Observer,
        must_stop: Callable[[], bool],
        workers: Workers,
    ) -> None:
        self.config, self.data, self.folder = config, data, folder
        self.observer, self.must_stop, self.workers = observer, must_stop, workers
        network = model_config_of(config, data).network
        self.stream = Stream(
            data, seed=config.seed, classes=bool(network.num_classes), flip=config.data.flip, device=workers.device
        )
        self.images, self.seconds = 0, 0.0

    def train_phases(self, state: dict[str, Any] | None, start: Checkpoint | None) -> None:
        """Train every phase from ``state`` on; without one from ``start``, a model, or from fresh weights."""
        first = 0
        if state is not None:
            first, self.images, self.seconds = state["phase"], state["images"], state["seconds"]
        for index in range(first, len(self.config.phase)):
            if index:  # from the file, so that a run that was stopped starts the phase from the same weights
                path = self.folder.phase_checkpoint(index - 1, self.config.phase[index - 1].method)
                start = self.workers.from_lead(partial(read_checkpoint, path))
            self._train_phase(index, start, state if index == first else None)

    def _train_phase(self, index: int, start: Checkpoint | None, state: dict[str, Any] | None) -> None:
        """Train one phase, from ``state`` if it had begun."""
        phase, lead = self.config.phase[index], self.workers.lead
        stepper = self._build_stepper(phase, start)
        if state is not None:
            stepper.load(state)
        checkpoint_step = first = 0 if state is None else state["step"]
        self.observer.begin(index, first)
        for k in range(first, phase.steps):
            start_time = time.perf_counter()
            try:
                loss, norm = stepper.gradients(k, self.stream, self.images)
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"out of memory at phase {index} step {k}; lower phase.{index}.micro_batch or network.channels"
                ) from error
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._divergence("the loss is", index, k, checkpoint_step)
            stepper.update(k)
            self.images += phase.batch
            seconds = time.perf_counter() - start_time
            self.seconds += seconds
            step, is_last = k + 1, k + 1 == phase.steps
            report = Report(index, phase.method, step, phase.steps, loss, phase.batch / seconds)
            self.observer.step(report)
            stop = self.workers.any(self.must_stop())
            if lead and (step % _LOG_EVERY == 0 or is_last):
                self._log(report, phase.learning_rate * learning_rate_factor(phase, k), norm)
            # the grid first: a kill between the two draws it again, and so loses nothing
            if lead and (step % self.config.sample_every == 0 or is_last):
                self._grid(index, step, stepper)
            if step % self.config.save_every == 0 or is_last or stop:
                if not stepper.averages.is_finite(WEIGHT_DTYPES[self.config.weights]):
                    raise self._divergence(f"the weights in {self.config.weights} are", index, k, checkpoint_step)
                if lead:
                    self._save(index, step, stepper)
                checkpoint_step = step
                self.observer.save(index, step)
            if stop and not (is_last and index == len(self.config.phase) - 1):
                cure = f"go on with the same command and --resume --out {self.folder.path}"
                raise Interrupted(f"stopped at phase {index} step {step}; {cure}")
        if lead:
            self.folder.keep(index, phase.method)

    def _build_stepper(self, phase: Phase, start: Checkpoint | None) -> Stepper:
        """Build the stepper of ``phase``, its weights those of ``start`` or fresh ones."""
        torch.manual_seed(self.config.seed)
        model = build(model_config_of(self.config, self.data, phase))
        teacher: second_points.Denoise | None = None
        if start is not None:
            if difference := _difference(start, model):
                raise TrainingError(f"{self.config.init} is of another network: {difference}")
            start_model = start.model()
            model.load_state_dict(start_model.state_dict())
            if phase.method == "cd":
                teacher = self._to_device(start_model, phase)
        if phase.method == "cd" and phase.teacher == "gaussian":
            teacher = second_points.gaussian(self.stream.rms())
        return Stepper(phase, self.config, self._to_device(model, phase), teacher, self.workers)

    def _to_device(self, model: ConsistencyModel, phase: Phase) -> ConsistencyModel:
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        to: Callable[..., ConsistencyModel] = model.to  # torch's types lack memory_format beside a device
        return to(self.workers.device, dtype_of(phase), memory_format=layout)

    def _divergence(self, subject: str, index: int, step: int, checkpoint_step: int) -> TrainingError:
        """The error of a loss or of weights that are not finite."""
        has_checkpoint = self.folder.checkpoint.exists()
        good = f"the last good checkpoint is of step {checkpoint_step}" if has_checkpoint else "nothing is saved"
        return TrainingError(
            f"{subject} not finite at phase {index} step {step}; {good} in {self.folder.path};"
            " try a lower learning_rate or precision fp32"
        )

    def _save(self, index: int, step: int, stepper: Stepper) -> None:
        phase = self.config.phase[index]
        config = self.config.model_dump(mode="json", exclude={"data": {"source"}})
        checkpoint = Checkpoint(
            config=stepper.model.config,
            default_ema=f"{phase.ema[0]:g}",
            ema=stepper.averages.weights(WEIGHT_DTYPES[self.config.weights]),
            training=TrainingSummary(
                method=phase.method,
                data=self.data.name,
                steps=step + sum(p.steps for p in self.config.phase[:index]),
                images=self.images,
                seconds=round(self.seconds, 1),
                config={**config, "init": self.folder.inputs["init"] or None},
            ),
        )
        position = {"phase": index, "step": step, "images": self.images, "seconds": self.seconds}
        self.folder.save({**position, **stepper.state()}, checkpoint)

    def _log(self, report: Report, learning_rate: float, norm: float) -> None:
        self.folder.log(
            {
                "phase": report.phase,
                "method": report.method,
                "step": report.step,
                "images": self.images,
                "seconds": round(self.seconds, 2),
                "loss": report.loss,
                "learning_rate": learning_rate,
                "gradient_norm": norm,
                "images_per_second": round(report.images_per_second, 1),
            }
        )

    def _grid(self, index: int, step: int, stepper: Stepper) -> None:
        config, phase = stepper.model.config, self.config.phase[index]
        if config.image_shape[0] not in (1, 3):  # no picture can show these
            return
        model = build(config).to(self.workers.device)
        model.load_state_dict(stepper.averages.state()[f"{phase.ema[0]:g}"])
        pictures = preview.draw(model, phase.method, GRID_IMAGES, self.config.seed)
        name = f"{index}-{phase.method}-{step:06d}"
        self.folder.grid(name, pictures, {"seed": self.config.seed, "images": self.images})


def _difference(start: Checkpoint, model: ConsistencyModel) -> str:
    """Name the first key of the network that differs, "" if the weights fit. Dropout has no weights."""
    a, b = start.config.network.model_dump(), model.config.network.model_dump()
    return next((f"{key} {a[key]}, not {b[key]}" for key in b if key != "dropout" and a[key] != b[key]), "")
