"""Processes that share a run: one, or as many as torchrun started. They change nothing but its speed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Its default arguments keep the process group that exists when it is first imported, which DDP does: imported before
# there is one, it lets destroy_process_group end gloo's threads, which abort now and then if left to Python's own end.
import torch.distributed.nn.functional
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cm_runtime.backends.torch import find_device
from cm_runtime.errors import TrainingError
from cm_runtime.errors.reasons import first_line

T = TypeVar("T")


def is_lead() -> bool:
    """True in the process that writes and prints: the only one, or torchrun's rank 0."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Workers:
    """This process as number ``rank`` of ``world``, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def lead(self) -> bool:
        """True for the worker that writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This worker's positions in a batch of ``count`` images."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def parallel(self, model: nn.Module) -> nn.Module:
        """``model`` with gradients averaged over all workers by its backward pass."""
        if self.world == 1:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def total(self, *values: float) -> list[float]:
        """The sum over all workers of each value."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """Return True in every worker if ``flag`` is true in one."""
        return self.total(flag)[0] > 0

    def from_lead(self, compute: Callable[[], T]) -> T:
        """Compute a value in the lead and return it in every worker."""
        if self.world == 1:
            return compute()
        box: list[Any] = [compute() if self.lead else None]
        dist.broadcast_object_list(box, src=0, device=self.device)
        value: T = box[0]
        return value


@contextmanager
def join_workers(device: str) -> Iterator[Workers]:
    """Join the workers of this run, by the environment that torchrun sets; gloo on CPUs, NCCL on GPUs.

    ``device`` is auto, cpu, cuda or cuda:N; on GPUs worker i of a machine has cuda:i. Raises EngineError for a device
    that is not there, TrainingError where the workers cannot meet.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Workers(0, 1, find_device(device))
        return
    worker_device = find_device(device)
    if worker_device.type == "cuda":
        worker_device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(worker_device)
    try:
        dist.init_process_group("nccl" if worker_device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"the {world} workers cannot meet: {first_line(error)}") from error
    try:
        yield Workers(dist.get_rank(), world, worker_device)
    except RuntimeError as error:  # gloo and NCCL raise it when another worker has ended; cm-runtime's errors are none
        raise TrainingError(f"worker {dist.get_rank()} cannot go on: {first_line(error)}") from error
    finally:
        dist.destroy_process_group()
