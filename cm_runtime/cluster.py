"""The shards of a job on a Ray cluster: an engine in each worker, a task for each shard.

Every node must have this package and see the model and the folder under the same paths, as on a shared file system.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from cm_runtime import backends, files
from cm_runtime.backends.base import Backend
from cm_runtime.errors import CmRuntimeError, EngineError, RequestError
from cm_runtime.extras import require
from cm_runtime.job import Job, identity, make

LIVES = 3  # workers that one shard may cost
AT_ONCE = 5000  # shards that Ray is told of, which takes it a millisecond or two for each
PATIENCE = 5.0  # seconds in which an address must answer
OBJECT_STORE = 80 << 20  # bytes, about the least that Ray takes; no more than numbers of shards are in it
# Ray reads these as it is imported and started. What it has to say goes to its log files alone.
QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_NUM_REDIS_GET_RETRIES": "1",  # of 40 seconds each, where something else than Ray answers
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Opening(NamedTuple):
    """What `backends.load` is given on every node. path: None is the model that each node's own package brings."""

    path: Path | None
    backend: str
    device: str
    threads: int
    precision: str


class Share(NamedTuple):
    """What a worker takes of its node, in Ray's words, and how many workers there are."""

    taken: dict[str, int]
    workers: int


def run(
    model: Path | None,
    job: Job,
    folder: Path,
    numbers: Sequence[int],
    *,
    backend: str,
    device: str,
    threads: int,
    precision: str,
    address: str | None,
) -> Iterator[int]:
    """Makes the shards ``numbers`` of a job, and yields the number of each when it is in the folder.

    backend to precision: as in `backends.load`, for each worker. address: a cluster that this machine belongs to,
    HOST:PORT or auto; None is the one that the program is connected to, or else one that is started on this machine
    and stopped at the end. A shard whose worker died is begun again, until it has cost three. Nobody else may be
    writing in the folder. Raises MissingExtraError, RequestError for what is no address, and EngineError for a cluster
    out of reach, for a device that it has not, and with a worker's own line for what that could not do. Shards once
    made stay.
    """
    if not numbers:
        return
    path = None if model in (None, backends.DEFAULT_MODEL) else model.absolute()
    first = "cuda:0" if device.startswith("cuda") else device  # a worker sees no GPU but the one that it was given
    opening = Opening(path, backend, first, threads, precision)
    try:
        with _connected(address) as ray:
            for at in range(0, len(numbers), AT_ONCE):
                now = numbers[at : at + AT_ONCE]
                nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
                part = share(device, threads, nodes, len(now))
                yield from _made(ray, part, (opening, job, folder.absolute()), now)
    finally:
        files.remove_temporary(folder)  # of workers that died


def share(device: str, threads: int, nodes: Sequence[Mapping[str, float]], shards: int) -> Share:
    """A GPU for each worker; else as many cores as its engine has threads: for 0 threads, those of a whole node.

    nodes: the resources of each, as Ray counts them. Raises EngineError where there is nothing to take.
    """
    if device.startswith("cuda"):
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        if not gpus:
            raise EngineError(f"--device {device}: no node of the Ray cluster has a GPU")
        return Share({"num_gpus": 1}, min(gpus, shards))
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise EngineError("no node of the Ray cluster has a core to give")
    taken = min(threads, max(cores)) if threads else min(cores)
    places = sum(count // taken for count in cores) if threads else len(cores)
    return Share({"num_cpus": taken}, min(places, shards))


class Begun:
    """How often each shard was begun. It has a process to itself, which outlives the workers."""

    def __init__(self) -> None:
        self.times: Counter[int] = Counter()

    def again(self, number: int) -> int:
        self.times[number] += 1
        return self.times[number]


class Worker:
    """Makes shards, one at a time, in a process of its own.

    The engine opens with the first of them: Ray starts workers anew for as long as they die before they have a task.
    """

    def __init__(self, begun: Any, opening: Opening, job: Job, folder: Path) -> None:
        self.begun, self.opening, self.job, self.folder = begun, opening, job, folder

    @cached_property
    def engine(self) -> Backend:
        opened = backends.load(*self.opening)  # type: ignore[arg-type]
        path = self.opening.path or backends.DEFAULT_MODEL
        if identity(path) != self.job.file_sha256:
            raise EngineError(f"{path} is another model here than where the job was given")
        return opened

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """{"item": number} -> {"number", "error"}; the error is a line, or empty."""
        import ray

        number, error = int(row["item"]), ""
        try:
            if ray.get(self.begun.again.remote(number)) > LIVES:
                raise EngineError(f"{LIVES} workers died over shard {number}, of too little memory perhaps")
            make(self.engine, self.job, number, self.folder)
        except CmRuntimeError as failure:
            error = f"worker on {socket.gethostname()}: {failure}"
        return {"number": number, "error": error}


def _made(ray: Any, part: Share, work: tuple[Opening, Job, Path], numbers: Sequence[int]) -> Iterator[int]:
    begun = ray.remote(Begun).options(num_cpus=0).remote()
    shards = ray.data.from_items(list(numbers), override_num_blocks=len(numbers)).map(
        Worker,
        fn_constructor_args=(begun, *work),
        compute=ray.data.ActorPoolStrategy(size=part.workers, max_tasks_in_flight_per_actor=1),
        **part.taken,
    )
    shards.context.enable_progress_bars = False
    shards.context.raise_original_map_exception = True
    shards.context.execution_no_progress_timeout_s = -1  # a shard may take hours
    try:
        for rows in shards.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            for number, error in zip(rows["number"].tolist(), rows["error"].tolist(), strict=True):
                if error:
                    raise EngineError(error)
                yield number
    except ray.exceptions.RayError as error:
        raise EngineError(f"Ray failed: {_in_a_line(error)}") from error


def _in_a_line(error: Exception) -> str:
    """What a worker raised, where it was that, or how Ray's account ends."""
    cause = getattr(error, "cause", None)
    return f"{type(cause).__name__}: {cause}".splitlines()[0] if cause else str(error).strip().splitlines()[-1]


# The cluster


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, where its cluster is; quietly. Raises MissingExtraError, RequestError, EngineError."""
    if address not in (None, "auto"):
        _check_answers(address)
    # Without a token from here, Ray would write one into the home folder for the cluster that it starts.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)} if address is None else {}
    with _environment(QUIET | token), _silent_stderr():
        ray, *_ = (require(package, "--runner ray") for package in ("ray", "pandas", "ray.data"))
        is_ours = address is not None or not ray.is_initialized()
        if is_ours:
            _start(ray, address)
    try:
        with _silent_console(logging.getLogger("ray.data")):
            yield ray
    finally:
        if is_ours:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit() or int(port) >= 1 << 16:
        raise RequestError(f"--ray-address takes the HOST:PORT of a cluster, or auto, not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except OSError as error:
        raise EngineError(f"no Ray cluster answers at {address}: {error.strerror or error}") from error


def _start(ray: ModuleType, address: str | None) -> None:
    own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE} if address is None else {}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except (OSError, RuntimeError, ValueError, SystemExit, ray.exceptions.RayError) as error:  # it may end us
        cause = error.__cause__
        reason = str(cause).strip().splitlines()[-1] if cause else " ".join(str(error).split())
        where = f"the Ray cluster at {address} cannot be joined" if address else "Ray cannot start on this machine"
        raise EngineError(f"{where}: {reason.partition('. ')[0]}") from error


# Quiet


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that the user has not set."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Not even Ray's compiled core, which says that it has been told to say nothing, is heard."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _silent_console(logger: logging.Logger) -> Iterator[None]:
    """The logger writes to its files alone."""
    consoles = {handler: handler.level for handler in logger.handlers if isinstance(handler, logging.StreamHandler)}
    for handler in consoles:
        handler.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for handler, level in consoles.items():
            handler.setLevel(level)
