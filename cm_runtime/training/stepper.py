"""One step of training: from a place in the sequence of images to new weights, averages and target."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cm_runtime.networks.consistency import ConsistencyModel
from cm_runtime.training.batches import Stream
from cm_runtime.training.config import Phase, TrainConfig
from cm_runtime.training.distributed import Workers
from cm_runtime.training.ema import Averages, Target, mu_of
from cm_runtime.training.losses import loss_of
from cm_runtime.training.second_points import Denoise
from cm_runtime.training.state import moments


class Stepper:
    """One phase's weights, optimizer, averages, target and loss."""

    def __init__(
        self, phase: Phase, config: TrainConfig, model: ConsistencyModel, teacher: Denoise | None, workers: Workers
    ) -> None:
        self.model = model.train()
        self.averages = Averages(model, phase.ema)
        self._target = Target(model, mu_of(phase))
        if config.compile:
            for network in {model, self._target.network, *((teacher,) if isinstance(teacher, nn.Module) else ())}:
                network.compile()
        self._phase, self._workers = phase, workers
        self._layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self._student = workers.parallel(model)
        self._dtype = dtype_of(phase)
        self._loss = loss_of(phase, config.sigma_data, teacher, workers.device)
        self._autocast = torch.autocast(workers.device.type, torch.bfloat16, enabled=phase.precision == "bf16")
        self.optimizer = optimizer_of(phase, model)

    def gradients(self, k: int, stream: Stream, first: int) -> tuple[float, float]:
        """Compute the gradients of step ``k``, whose images begin at ``first``: (mean loss, norm) over all workers.

        Gradients longer than the phase's clip are scaled down to it.
        """
        phase, share = self._phase, self._workers.share(self._phase.batch)
        size = phase.micro_batch or len(share)
        self.optimizer.zero_grad()
        total = 0.0
        for start in range(share.start, share.stop, size):
            count = min(size, share.stop - start)
            with self._no_sync(is_last=start + count == share.stop):
                total += self._backward(k, stream, first + start, count)
        loss, *_ = self._workers.total(total / phase.batch)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if phase.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), phase.clip, norm, foreach=True)
        return loss, norm.item()

    def update(self, k: int) -> None:
        """Step along the gradients."""
        rate = self._phase.learning_rate * learning_rate_factor(self._phase, k)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.averages.update(k)
        self._target.update(k)

    def state(self) -> dict[str, Any]:
        """Collect all that the next step depends on, but for the position in the sequence."""
        return {
            "model": self.model.state_dict(),
            "target": self._target.state(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.averages.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned and `training.state.check_fit` has checked."""
        self.model.load_state_dict(state["model"])
        self._target.load(state["target"])
        self.optimizer.load_state_dict(moments(state, self.optimizer))
        self.averages.load(state["ema"])

    def _backward(self, k: int, stream: Stream, first: int, count: int) -> float:
        batch = stream.batch(first, count, self._dtype, self._layout)
        with self._autocast:
            losses = self._loss(self._student, self._target.network, batch, k)
        total: Tensor = losses.sum()
        # DistributedDataParallel takes the mean over the workers, of whom each has its share of the batch
        torch.autograd.backward(total * (self._workers.world / self._phase.batch))
        return total.item()

    def _no_sync(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Let workers exchange gradients once, after their last micro-batch."""
        if is_last or not isinstance(self._student, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._student.no_sync()


def optimizer_of(phase: Phase, model: ConsistencyModel) -> torch.optim.Optimizer:
    """Build the phase's optimizer: RAdam over all tensors in one call, or Adam as one kernel."""
    if phase.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), phase.learning_rate, betas=phase.betas, fused=True)
    return torch.optim.RAdam(model.parameters(), phase.learning_rate, betas=phase.betas, foreach=True)


def dtype_of(phase: Phase) -> torch.dtype:
    """Data type of the phase's weights and images."""
    return torch.float64 if phase.precision == "fp64" else torch.float32


def learning_rate_factor(phase: Phase, step: int) -> float:
    """Learning-rate factor: 1, rising from 0 over the warm-up, falling to 0 over the last ``decay`` of the steps."""
    rise = min(1.0, (step + 1) / phase.warmup) if phase.warmup else 1.0
    tail = phase.decay * phase.steps
    fall = min(1.0, (phase.steps - step) / tail) if tail else 1.0
    return rise * fall
