"""The shards of a job on a Ray cluster: an engine in each worker, a task for each shard.

Every node must have this package and see the model and the folder under the same paths, as on a shared file system.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from pydantic import BaseModel

from cm_runtime import backends
from cm_runtime.errors import EngineError, MissingExtraError, RequestError
from cm_runtime.errors.reasons import system_reason
from cm_runtime.files.workspaces import sweep
from cm_runtime.generation.job import Job
from cm_runtime.subprocesses import PythonChild

MOST_SHARDS = 5000  # shards that Ray gets in one go, which take it a millisecond or two for each
PATIENCE = 5.0  # seconds in which an address must answer
FAREWELL = 30.0  # seconds in which Ray must stop
PACKAGES = ("ray", "pandas", "pyarrow")  # Ray alone does without the last two, Ray Data does not
ROOT = Path(__file__).resolve().parents[2]
DRIVER = "from cm_runtime.generation.ray_driver import main; main()"  # not -m: workers know nothing of a __main__
# Read as Ray is imported. It would else report to its makers, and try what is no Ray cluster for ten minutes.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_NUM_REDIS_GET_RETRIES": "1"}


class Task(BaseModel):
    """Work of the driver. model: None is the one that each node's own package brings."""

    model: Path | None
    job: Job
    folder: Path
    numbers: list[int]
    most: int
    address: str | None


class Answer(BaseModel):
    """A line of the driver's: the number of a shard that is there, or the error that ended the work."""

    number: int | None = None
    error: str = ""


def run(model: Path | None, job: Job, folder: Path, numbers: Sequence[int], *, address: str | None) -> Iterator[int]:
    """Make the shards ``numbers`` of a job, and yield the number of each when it is in the folder.

    address: a cluster that this machine belongs to, HOST:PORT or auto; None is one that is started on this machine and
    stopped at the end. A shard whose worker died is begun again, until it has cost three. Nobody else may be writing in
    the folder. Raises MissingExtraError, RequestError for what is no address, and EngineError for a cluster out of
    reach or lost, for a device that it has not, and with a worker's own line for what that could not do. Shards once
    made stay.
    """
    if not numbers:
        return
    for package in PACKAGES:
        if find_spec(package) is None:
            raise MissingExtraError(package, "ray", "--runner ray")
    if address not in (None, "auto"):
        _check_answers(address)
    path = None if model in (None, backends.DEFAULT_MODEL) else model.absolute()
    task = Task(model=path, job=job, folder=folder.absolute(), numbers=list(numbers), most=MOST_SHARDS, address=address)
    try:
        with _driver(task) as answers:
            for answer in answers:
                if answer.error:
                    raise EngineError(answer.error)
                assert answer.number is not None
                yield answer.number
    finally:
        sweep(folder)  # half-written files of workers that died


@contextmanager
def _driver(task: Task) -> Iterator[Iterator[Answer]]:
    """Ray's driver in a process of its own, which ends with the block.

    Ray's compiled core ends its process where the cluster is lost, and writes to its standard error what it likes. The
    driver stops Ray when its standard input ends: when we have enough, or are no more, whatever ended us.
    """
    child = PythonChild(
        ["-c", DRIVER],
        ROOT,
        {**ENVIRONMENT, **os.environ},
        process_group=0,  # Ctrl-C is for us alone, so that it cannot come again while Ray stops
    )
    process = child.process

    def answers() -> Iterator[Answer]:
        yield from map(Answer.model_validate_json, child.lines)
        if process.wait():
            raise EngineError(re.sub(r"\[[^]]*\] \S+: ", "", f"Ray's driver {child.explain_exit()}"))

    try:
        child.send(task.model_dump_json())
        yield answers()
    finally:
        try:
            with suppress(BrokenPipeError, subprocess.TimeoutExpired):
                child.end_input()
                process.wait(FAREWELL)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what Ray's own end has missed
            child.close()


def _check_answers(address: str) -> None:
    """Raise EngineError in seconds where nothing listens; Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) >= 1 << 16:
        raise RequestError(f"--ray-address takes the HOST:PORT of a cluster, or auto, not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except OSError as error:
        raise EngineError(f"no Ray cluster answers at {address}: {system_reason(error)}") from error
