"""The training loop: phases in turn, every step a function of (config, step), stopped and resumed at any step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from cm_runtime.training.data import ImageSet
from cm_runtime.training.distributed import Workers, joined
from cm_runtime.training.ema import mu_of
from cm_runtime.training.run_folder import RunFolder
from cm_runtime.training.signals import stop_signals
from cm_runtime.training.state import check_fit
from cm_runtime.training.stepper import Stepper, dtype_of, finite, learning_rate_factor

GRID_IMAGES = 64
_LOG_EVERY = 10
# A phase begins, or is on the disk, at a step: (which, phase, step).
Milestone = Callable[[Literal["begin", "saved"], int, int], None]
STORED = {"float32": torch.float32, "float16": torch.float16}


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
    milestone: Milestone = lambda *_: None,
) -> Path:
    """Runs every phase and returns the path of the checkpoint. Under torchrun every worker calls it alike.

    report: called after each step; milestone: where a phase begins, and after each save.

    Raises TrainingError where the loss is not finite, CheckpointError where ``init`` cannot be read, Interrupted after
    SIGINT or SIGTERM, and what RunFolder raises.
    """
    with joined(config.device) as workers:
        for index, phase in enumerate(config.phase):
            if phase.batch < workers.world:
                raise TrainingError(f"phase.{index}.batch {phase.batch} is less than the {workers.world} workers")
        start = _start(config)
        if config.network is None and start is not None:
            shape = start.config.network.model_dump(include=set(NetworkShape.model_fields))
            config = config.model_copy(update={"network": NetworkShape(**shape)})
        for index, phase in enumerate(config.phase):
            _check_memory(index, phase, model_config_of(config, data, phase), workers)
        folder = RunFolder(out)
        inputs = {"data": provenance.fingerprint(data), "init": "" if start is None else start.sha256}
        opened = folder.open(config, inputs, resume=resume, force=force) if workers.lead else nullcontext()
        with opened as found, stop_signals() as stopping:
            if found is not None:
                check_fit(found, config, model_config_of(config, data, config.phase[found["phase"]]), folder.state)
            state = workers.from_lead(found)
            run = _Run(config, data, inputs, folder, report, milestone, stopping, workers)
            if workers.lead:
                images = 0 if state is None else state["images"]
                folder.begin(provenance.session(data, workers), images, tensorboard=config.tensorboard)
            run.phases(state, start)
    return folder.checkpoint


def _start(config: TrainConfig) -> Checkpoint | None:
    """The model that the first phase starts from, where there is one."""
    if config.init is None:
        return None
    return load_checkpoint(
        config.init,
        precond=config.init_precond,
        head_channels=config.init_head_channels,
        image_size=config.init_image_size,
    )


def model_config_of(config: TrainConfig, data: ImageSet, phase: Phase | None = None) -> ModelConfig:
    """The model that a phase of ``config`` (default: the last) makes of ``data``.

    A denoiser is always of the edm form, which its loss is weighted for (arXiv 2206.00364, table 1). Raises
    TrainingError for images no UNet of it can take.
    """
    channels, height, width = data.image_shape
    if height != width:
        raise TrainingError(f"images must be square, not {height}x{width}; set data.image_size to crop and resize")
    assert config.network is not None  # `train` takes that of init where none is given
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
    """Raises TrainingError where the machine has less memory than the phase is sure to take on the CPU.

    Counted are weights, gradients, two moments, averages and target, and what each block of the outermost level keeps
    of its images for the way back; on a GPU only the weights, which are drawn on the CPU.
    """
    size = dtype_of(phase).itemsize
    copies = 4 + len(phase.ema) + (mu_of(phase) is not None) if workers.device.type == "cpu" else 1
    weights = copies * size * sum(each.numel() for each in build(config, "meta").parameters())
    network, images = config.network, 0
    if workers.device.type == "cpu":
        share = len(workers.share(phase.batch))
        pixels = (network.image_size // network.patch) ** 2
        kept = 2 * network.res_blocks * network.channels * pixels * size
        images = kept * min(phase.micro_batch or share, share)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if weights + images > memory:
        cure = "network.channels" if weights > images else f"phase.{index}.micro_batch"
        raise TrainingError(
            f"phase {index} takes at least {(weights + images) / 1e9:.0f} GB of memory and the machine has"
            f" {memory / 1e9:.0f} GB; lower {cure}"
        )


class _Run:
    """The parts of one run that every phase shares."""

    def __init__(
        self,
        config: TrainConfig,
        data: ImageSet,
        inputs: dict[str, str],
        folder: RunFolder,
        report: Callable[[Report], None],
        milestone: Milestone,
        stopping: Callable[[], bool],
        workers: Workers,
    ) -> None:
        self.config, self.data, self.inputs, self.folder = config, data, inputs, folder
        self.report, self.milestone, self.stopping, self.workers = report, milestone, stopping, workers
        network = model_config_of(config, data).network
        self.stream = Stream(
            data, seed=config.seed, classes=bool(network.num_classes), flip=config.data.flip, device=workers.device
        )
        self.images, self.seconds = 0, 0.0

    def phases(self, state: dict[str, Any] | None, start: Checkpoint | None) -> None:
        """Runs every phase from ``state`` on; without one from ``start``, a model, or from fresh weights."""
        first = 0
        if state is not None:
            first, self.images, self.seconds = state["phase"], state["images"], state["seconds"]
        for index in range(first, len(self.config.phase)):
            self._phase(index, self._before(index) if index else start, state if index == first else None)

    def _before(self, index: int) -> Checkpoint:
        """What phase ``index`` starts from, as the file holds it: stopped and resumed or not, it is the same."""
        path = self.folder.kept(index - 1, self.config.phase[index - 1].method)
        return self.workers.from_lead(read_checkpoint(path) if self.workers.lead else None)  # type: ignore[return-value]

    def _phase(self, index: int, before: Checkpoint | None, state: dict[str, Any] | None) -> None:
        """Trains one phase, from ``state`` where it had begun."""
        phase, lead = self.config.phase[index], self.workers.lead
        stepper = self._stepper(phase, before)
        if state is not None:
            stepper.load(state)
        saved = first = 0 if state is None else state["step"]
        self.milestone("begin", index, first)
        for k in range(first, phase.steps):
            began = time.perf_counter()
            try:
                loss, norm = stepper.gradients(k, self.stream, self.images)
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"out of memory at phase {index} step {k}; lower phase.{index}.micro_batch or network.channels"
                ) from error
            if not finite(loss, norm):
                raise self._diverged("the loss is", index, k, saved)
            stepper.update(k)
            self.images += phase.batch
            elapsed = time.perf_counter() - began
            self.seconds += elapsed
            done = k + 1
            where = Report(index, phase.method, done, phase.steps, loss, phase.batch / elapsed)
            self.report(where)
            stop = self.workers.any(self.stopping())
            if lead and (done % _LOG_EVERY == 0 or done == phase.steps):
                self._log(where, phase.learning_rate * learning_rate_factor(phase, k), norm)
            # the grid first: a kill between the two draws it again, and so loses nothing
            if lead and (done % self.config.sample_every == 0 or done == phase.steps):
                self._grid(index, done, stepper)
            if done % self.config.save_every == 0 or done == phase.steps or stop:
                if not stepper.averages.finite(STORED[self.config.weights]):
                    raise self._diverged(f"the weights in {self.config.weights} are", index, k, saved)
                if lead:
                    self._save(index, done, stepper)
                saved = done
                self.milestone("saved", index, done)
            if stop and not (done == phase.steps and index == len(self.config.phase) - 1):
                cure = f"go on with the same command and --resume --out {self.folder.path}"
                raise Interrupted(f"stopped at phase {index} step {done}; {cure}")
        if lead:
            self.folder.keep(index, phase.method)

    def _stepper(self, phase: Phase, before: Checkpoint | None) -> Stepper:
        """What trains ``phase``, its weights those of ``before`` or fresh ones."""
        torch.manual_seed(self.config.seed)
        model = build(model_config_of(self.config, self.data, phase))
        teacher: second_points.Denoise | None = None
        if before is not None:
            if difference := _difference(before, model):
                raise TrainingError(f"{self.config.init} is of another network: {difference}")
            start = before.model()
            model.load_state_dict(start.state_dict())
            if phase.method == "cd":
                teacher = self._placed(start, phase)
        if phase.method == "cd" and phase.teacher == "gaussian":
            teacher = second_points.gaussian(self.stream.rms())
        return Stepper(phase, self.config, self._placed(model, phase), teacher, self.workers)

    def _placed(self, model: ConsistencyModel, phase: Phase) -> ConsistencyModel:
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return model.to(self.workers.device, dtype_of(phase), memory_format=layout)  # type: ignore[call-overload, no-any-return]

    def _diverged(self, what: str, index: int, step: int, saved: int) -> TrainingError:
        good = f"the last good checkpoint is of step {saved}" if self.folder.checkpoint.exists() else "nothing is saved"
        return TrainingError(
            f"{what} not finite at phase {index} step {step}; {good} in {self.folder.path};"
            " try a lower learning_rate or precision fp32"
        )

    def _save(self, index: int, step: int, stepper: Stepper) -> None:
        phase = self.config.phase[index]
        config = self.config.model_dump(mode="json", exclude={"data": {"source"}})
        checkpoint = Checkpoint(
            config=stepper.model.config,
            default_ema=f"{phase.ema[0]:g}",
            ema=stepper.averages.stored(STORED[self.config.weights]),
            training=TrainingSummary(
                method=phase.method,
                data=self.data.name,
                steps=step + sum(p.steps for p in self.config.phase[:index]),
                images=self.images,
                seconds=round(self.seconds, 1),
                config={**config, "init": self.inputs["init"] or None},
            ),
        )
        position = {"phase": index, "step": step, "images": self.images, "seconds": self.seconds}
        self.folder.save({**position, **stepper.state()}, checkpoint)

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

    def _grid(self, index: int, step: int, stepper: Stepper) -> None:
        config, phase = stepper.model.config, self.config.phase[index]
        if config.image_shape[0] not in (1, 3):  # no picture can show these
            return
        averaged = build(config).to(self.workers.device)
        averaged.load_state_dict(stepper.averages.state()[f"{phase.ema[0]:g}"])
        pictures = preview.draw(averaged, phase.method, GRID_IMAGES, self.config.seed)
        name = f"{index}-{phase.method}-{step:06d}"
        self.folder.grid(name, pictures, {"seed": self.config.seed, "images": self.images})


def _difference(before: Checkpoint, model: ConsistencyModel) -> str:
    """The first key of the network that differs; nothing where the weights fit. Dropout has no weights."""
    there, here = before.config.network.model_dump(), model.config.network.model_dump()
    differ = (f"{key} {there[key]}, not {here[key]}" for key in here if key != "dropout" and there[key] != here[key])
    return next(differ, "")
