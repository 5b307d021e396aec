"""``cm-runtime sample`` into a folder of shards."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cm_runtime.choices import Runner, ShardKind
from cm_runtime.cli.options import DrawFlags, EngineFlags, replacing
from cm_runtime.cli.progress import count
from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from cm_runtime.generation.job import Job
    from cm_runtime.request import Draw

FILES = (".png", ".npz")  # what names end in that are of no folder


@dataclass(frozen=True)
class ShardFlags:
    """Options of a folder of shards."""

    shards: Annotated[ShardKind | None, typer.Option(help="What a folder is filled with.", show_default="npz")] = None
    shard_size: Annotated[int | None, typer.Option(help="Images in each shard.", show_default="1000")] = None
    force: Annotated[bool, typer.Option("--force", help=replacing("Of shards: those of another job."))] = False
    runner: Annotated[
        Runner | None,
        typer.Option(help="Who draws shards: this process, or a Ray cluster.", show_default="local"),
    ] = None
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT|auto", help="The cluster; without, one on this machine.")
    ] = None

    def folder(self, output: str | None) -> Path | None:
        """The folder that the options ask for; None for a picture or arrays.

        A folder is a path that ends in / or that is one, or any with --shards. Raises RequestError for options that do
        not fit together.
        """
        path = Path(output or ("samples" if self.shards else "samples.png"))
        has_no_ending = path.suffix not in FILES and (self.shards is not None or os.path.isdir(path))
        if not (has_no_ending or (output or "").endswith("/")):
            for name, value in vars(self).items():
                if value is not None and value is not False:
                    option = f"--{name.replace('_', '-')}"
                    raise RequestError(f"{option} is for a folder of shards, which {path} is not: give -o NAME/")
            return None
        if self.shard_size is not None and self.shard_size < 1:
            raise RequestError(f"--shard-size must be at least 1, not {self.shard_size}")
        if self.ray_address is not None and self.runner != "ray":
            raise RequestError("--ray-address is for --runner ray")
        return path


@dataclass(frozen=True)
class ShardTask:
    """Shards to draw: of a model, in a folder, as the options say."""

    model: Path
    folder: Path
    shards: ShardFlags
    flags: DrawFlags
    engine: EngineFlags

    def as_of(self, job: Job) -> ShardTask:
        """With the job's own where no option says other."""
        engine = EngineFlags(
            backend=job.backend if self.engine.backend == "auto" else self.engine.backend,
            device=job.place if self.engine.device == "auto" else self.engine.device,
            precision=job.precision if self.engine.precision == "auto" else self.engine.precision,
            threads=job.threads if self.engine.threads is None else self.engine.threads,
        )
        size = str(job.micro_batch) if self.flags.micro_batch in (None, "auto") else self.flags.micro_batch
        return replace(self, engine=engine, flags=replace(self.flags, micro_batch=size))


def draw(task: ShardTask, images: Draw) -> None:
    """Draw those shards of ``images`` that are not there."""
    from cm_runtime import backends
    from cm_runtime.errors.wording import quantity
    from cm_runtime.files import atomic
    from cm_runtime.files.streams import exists
    from cm_runtime.generation import job, ray_runner
    from cm_runtime.request import sampling_request
    from cm_runtime.subprocesses import cores

    model, folder, flags = task.model, task.folder, task.shards
    if not exists(model):
        raise RequestError(f"{model}: no such model")
    atomic.check_writable(folder / job.MANIFEST if os.path.isdir(folder) else folder)
    old = job.load_job(folder)
    if old is not None and not flags.force and old.file_sha256 == job.identity(model):
        task = task.as_of(old)
    options = task.engine.options()
    options = replace(options, threads=options.threads or cores())
    shards = job.Shards(flags.shards or "npz", 1000 if flags.shard_size is None else flags.shard_size)
    size = min(shards.size, max(images.count or 1, 1))
    engine = backends.open_model(model, options, size)
    request = sampling_request(engine.manifest, task.flags.complete(engine, images, size))
    whole = job.Job.from_request(engine, request, model, shards, options.threads)
    with job.open_folder(whole, folder, force=flags.force) as numbers_left:
        numbers = (
            ray_runner.run(model, whole, folder, numbers_left, address=flags.ray_address)
            if flags.runner == "ray"
            else job.run(engine, whole, folder, numbers_left)
        )
        total = sum(job.size(whole, number) for number in numbers_left)
        for _ in count(numbers, total, "images", lambda number: job.size(whole, number)):
            pass
    shard_count = len(whole.numbers)
    before = shard_count - len(numbers_left)
    there = f" ({before} {'was' if before == 1 else 'were'} there)" if before else ""
    contents = f"{quantity(whole.count, 'image')} in {quantity(shard_count, 'shard')}{there}"
    typer.echo(f"{folder}/: {contents}, {quantity(len(whole.sigmas), 'step')}, seed {whole.seed}")
