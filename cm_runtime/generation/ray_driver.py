"""Ray's driver: reads a task, writes a line for each shard, and stops Ray when input ends."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from cm_runtime import backends
from cm_runtime.backends.base import Backend
from cm_runtime.errors import CmRuntimeError, EngineError
from cm_runtime.generation.job import Job, identity, make_shard
from cm_runtime.generation.ray_runner import Answer, Task

LIVES = 3  # workers that one shard may cost
OBJECT_STORE = 80 << 20  # bytes, about the least that Ray takes; no more than numbers of shards are in it


class Share(NamedTuple):
    """Resources that a worker takes of its node, in Ray's words, and the number of workers."""

    resources: dict[str, int]
    workers: int


def share(device: str, threads: int, nodes: Sequence[Mapping[str, float]], shards: int) -> Share:
    """A GPU for each worker; else as many cores as its engine has threads: for 0 threads, those of a whole node.

    nodes: the resources of each, as Ray counts them. Raises EngineError where there is nothing to take.
    """
    if device == "cuda":
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        if not gpus:
            raise EngineError("--device cuda:0: no node of the Ray cluster has a GPU")
        return Share({"num_gpus": 1}, min(gpus, shards))
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise EngineError("no node of the Ray cluster has a core to give")
    each = min(threads, max(cores)) if threads else min(cores)
    places = sum(count // each for count in cores) if threads else len(cores)
    return Share({"num_cpus": each}, min(places, shards))


class Attempts:
    """Count of the attempts at each shard, in a process of its own, which outlives the workers."""

    def __init__(self) -> None:
        self.times: Counter[int] = Counter()

    def again(self, number: int) -> int:
        self.times[number] += 1
        return self.times[number]


class Worker:
    """Makes shards, one at a time, in a process of its own.

    The engine opens with the first of them: Ray starts workers anew for as long as they die before they have a task.
    """

    def __init__(self, attempts: Any, model: Path | None, job: Job, folder: Path) -> None:
        self.attempts, self.model, self.job, self.folder = attempts, model or backends.DEFAULT_MODEL, job, folder

    @cached_property
    def engine(self) -> Backend:
        job = self.job
        engine = backends.load(self.model, job.backend, job.place, job.threads, job.precision)
        if identity(self.model) != job.file_sha256:
            raise EngineError(f"{self.model} is another model here than where the job was given")
        return engine

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """{"item": number} -> {"number", "error"}; the error is a line, or empty."""
        import ray

        number, error = int(row["item"]), ""
        try:
            if ray.get(self.attempts.again.remote(number)) > LIVES:
                raise EngineError(f"{LIVES} workers died over shard {number}, of too little memory perhaps")
            make_shard(self.engine, self.job, number, self.folder)
        except CmRuntimeError as failure:
            error = f"worker on {socket.gethostname()}: {failure}"
        return {"number": number, "error": error}


def make_shards(task: Task) -> Iterator[int]:
    """The numbers of the shards as they are there. Raises EngineError."""
    with _connect(task.address) as ray:
        attempts = ray.remote(Attempts).options(num_cpus=0).remote()
        for at in range(0, len(task.numbers), task.most):
            numbers = task.numbers[at : at + task.most]
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            part = share(task.job.device, task.job.threads, nodes, len(numbers))
            shards = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map(
                Worker,
                fn_constructor_args=(attempts, task.model, task.job, task.folder),
                compute=ray.data.ActorPoolStrategy(size=part.workers, max_tasks_in_flight_per_actor=1),
                **part.resources,
            )
            shards.context.enable_progress_bars = False
            shards.context.raise_original_map_exception = True
            shards.context.execution_no_progress_timeout_s = -1  # a shard may take hours
            for rows in shards.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
                for number, error in zip(rows["number"].tolist(), rows["error"].tolist(), strict=True):
                    if error:
                        raise EngineError(error)
                    yield number


@contextmanager
def _connect(address: str | None) -> Iterator[Any]:
    """Ray, where its cluster is. Raises EngineError for Ray's own failures, which may end the process."""
    # Without a token from here, Ray would write one into the home folder for the cluster that it starts.
    if address is None:
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    import ray
    import ray.data

    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE} if address is None else {}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (OSError, RuntimeError, ValueError, SystemExit, ray.exceptions.RayError) as error:
        cause = error.__cause__
        reason = str(cause).strip().splitlines()[-1] if cause else " ".join(str(error).split())
        where = f"the Ray cluster at {address} cannot be joined" if address else "Ray cannot start on this machine"
        raise EngineError(f"{where}: {reason.partition('. ')[0]}") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    except ray.exceptions.RayError as error:
        raise EngineError(f"Ray failed: {_in_a_line(error)}") from error
    finally:
        ray.shutdown()


def _in_a_line(error: Exception) -> str:
    """One line of an error: the worker's own where it raised one, else the last of Ray's."""
    cause = getattr(error, "cause", None)
    return f"{type(cause).__name__}: {cause}".splitlines()[0] if cause else str(error).strip().splitlines()[-1]


def main() -> None:
    """Run the driver. All that Ray and its children print goes to this process's standard error."""
    task = Task.model_validate_json(sys.stdin.buffer.readline())
    threading.Thread(target=_stop_with_input, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: Answer) -> None:
        print(answer.model_dump_json(), file=answers, flush=True)

    try:
        for number in make_shards(task):
            say(Answer(number=number))
    except EngineError as error:
        say(Answer(error=str(error)))


def _stop_with_input() -> None:
    """Interrupt the main thread when standard input ends."""
    os.read(0, 1)  # past sys.stdin, whose lock a process must have to end
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
