"""``cm-runtime sample`` into a folder of shards."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cm_runtime.cli import parsing
from cm_runtime.cli.progress import counted
from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from cm_runtime.backends.base import Backend
    from cm_runtime.generation.job import Job
    from cm_runtime.request import Request

KINDS = ("npz", "png", "wds", "parquet")
FILES = (".png", ".npz")  # what names end in that are of no folder


@dataclass(frozen=True)
class Shards:
    """What is asked for: --shards and the options that belong to it."""

    folder: Path
    kind: Any
    size: int
    force: bool
    is_on_ray: bool
    address: str | None


@dataclass(frozen=True)
class Opening:
    """How an engine is asked for."""

    model: Path
    backend: str
    device: str
    threads: int | None
    precision: str
    micro_batch: str

    def as_of(self, job: Job) -> Opening:
        """With the job's own where nothing else is asked."""
        return replace(
            self,
            backend=job.backend if self.backend == "auto" else self.backend,
            device=job.place if self.device == "auto" else self.device,
            threads=job.threads if self.threads is None else self.threads,
            precision=job.precision if self.precision == "auto" else self.precision,
            micro_batch=str(job.micro_batch) if self.micro_batch == "auto" else self.micro_batch,
        )


def wanted(
    output: str | None, kind: str | None, size: int | None, force: bool, runner: str | None, address: str | None
) -> Shards | None:
    """The shards that the options ask for; None for a picture or arrays.

    A folder is a path that ends in / or that is one, or any with --shards. Raises RequestError for options that do not
    fit together.
    """
    path = Path(output or ("samples" if kind else "samples.png"))
    is_folder = (output or "").endswith("/") or (path.suffix not in FILES and (kind is not None or os.path.isdir(path)))
    if not is_folder:
        given = {"--shards": kind, "--shard-size": size, "--force": force or None, "--runner": runner}
        for option, value in {**given, "--ray-address": address}.items():
            if value is not None:
                raise RequestError(f"{option} is for a folder of shards, which {path} is not: give -o NAME/")
        return None
    if kind is not None and kind not in KINDS:
        raise RequestError(f"--shards takes npz, png, wds or parquet, not {kind!r}")
    if size is not None and size < 1:
        raise RequestError(f"--shard-size must be at least 1, not {size}")
    if runner not in (None, "local", "ray"):
        raise RequestError(f"--runner takes local or ray, not {runner!r}")
    if address is not None and runner != "ray":
        raise RequestError("--ray-address is for --runner ray")
    return Shards(path, kind or "npz", 1000 if size is None else size, force, runner == "ray", address)


def draw(asked: Shards, opening: Opening, count: int, request: Callable[[Backend, int], Request]) -> None:
    """Draws those of ``count`` images' shards that are not there; request: of an engine, with a micro-batch."""
    from cm_runtime import backends
    from cm_runtime.errors.wording import quantity
    from cm_runtime.files import atomic
    from cm_runtime.files.streams import exists
    from cm_runtime.generation import job, ray_runner
    from cm_runtime.subprocesses import cores

    if not exists(opening.model):
        raise RequestError(f"{opening.model}: no such model")
    atomic.check_writable(asked.folder / job.MANIFEST if os.path.isdir(asked.folder) else asked.folder)
    old = job.kept(asked.folder)
    if old is not None and not asked.force and old.file_sha256 == job.identity(opening.model):
        opening = opening.as_of(old)
    threads = parsing.threads(opening.threads) or cores()
    each = min(asked.size, max(count, 1))
    how: Any = (opening.backend, opening.device, threads, opening.precision, each)
    engine = backends.load(opening.model, *how)
    chosen = request(engine, parsing.micro_batch(opening.micro_batch, each, engine.micro_batch))
    whole = job.of(engine, chosen, opening.model, asked.kind, asked.size, threads)
    with job.opened(whole, asked.folder, force=asked.force) as todo:
        made = (
            ray_runner.run(opening.model, whole, asked.folder, todo, address=asked.address)
            if asked.is_on_ray
            else job.run(engine, whole, asked.folder, todo)
        )
        images = sum(job.size(whole, number) for number in todo)
        for _ in counted(made, images, "images", lambda number: job.size(whole, number)):
            pass
    shards = len(whole.numbers)
    kept = shards - len(todo)
    there = f" ({kept} {'was' if kept == 1 else 'were'} there)" if kept else ""
    filled = f"{quantity(whole.count, 'image')} in {quantity(shards, 'shard')}{there}"
    typer.echo(f"{asked.folder}/: {filled}, {quantity(len(whole.sigmas), 'step')}, seed {whole.seed}")
