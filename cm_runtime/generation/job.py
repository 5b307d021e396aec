"""Many images as shards in a folder: a job that may stop at any moment and go on later, in as many processes as wanted.

A `Job` is all that determines the bytes, and is the folder's manifest.json. Shard ``k`` holds the images from
``start + k * shard_size`` on. It is drawn in micro-batches of one size, the last of them filled with images that are
dropped, so that its bytes do not depend on what else is drawn, or when, or by whom.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
from pydantic import Field, ValidationError, model_validator

from cm_runtime import __version__, sampling
from cm_runtime.backends.base import Backend
from cm_runtime.choices import BackendName, ShardKind
from cm_runtime.errors import DataError, EngineError, OutOfMemoryError, OutputError, RequestError, data_error
from cm_runtime.errors.reasons import output_errors
from cm_runtime.errors.wording import quantity
from cm_runtime.extras import require
from cm_runtime.files import atomic, locks, streams
from cm_runtime.files.records import Record, explain, first_fault
from cm_runtime.files.workspaces import sweep
from cm_runtime.generation import formats
from cm_runtime.generation.prefetch import prefetch
from cm_runtime.request import INDICES, Draw, Output, Request, sampling_request
from cm_runtime.sampling import Batch

MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
NEXT = "manifest.next.json"  # of the job that a folder is growing into; it becomes the manifest when all is there
MOST_IMAGES = 1_000_000_000  # in a shard
MOST_LABELS = 1 << 18
_LARGEST = 4 << 20  # bytes of a manifest
AHEAD = 2  # micro-batches that are drawn before the one that is being written is


@dataclass(frozen=True)
class Shards:
    """Files that a folder is filled with: their kind, and the images in each."""

    kind: ShardKind = "npz"
    size: int = 1000


class Job(Record):
    """The request, the model, the files, and what rounds differently; unknown keys are refused."""

    format_version: Literal[1] = 1
    model_sha256: str = Field(description="of the checkpoint")
    file_sha256: str = Field(description="of the file that is run, by `identity`")
    image_shape: tuple[int, int, int] = Field(description="(C, H, W)")
    sigmas: tuple[float, ...]
    seed: int
    start: int
    count: int
    labels: Literal["all", "random"] | tuple[int, ...] | None
    output: Output
    format: ShardKind
    shard_size: int
    micro_batch: int = Field(ge=1)
    backend: BackendName
    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    threads: int
    versions: tuple[str, ...] = Field(description="of the packages that compute or write")

    @model_validator(mode="after")
    def _fits(self) -> Job:
        if self.shard_size < 1:
            raise ValueError(f"a shard holds at least 1 image, not {self.shard_size}")
        if self.shard_size > MOST_IMAGES:
            raise ValueError(f"a shard holds at most {MOST_IMAGES} images, not {self.shard_size}")
        if self.count < 1 or not 0 <= self.start <= INDICES - self.count:
            raise ValueError(f"there is no such range as {quantity(self.count, 'image')} from {self.start}")
        if self.numbers.stop > formats.MOST:  # and no len(), which ends at 2^63
            raise ValueError(
                f"{quantity(self.numbers.stop, 'shard')} are more than {formats.MOST}; give a larger --shard-size"
            )
        if isinstance(self.labels, tuple) and len(self.labels) > MOST_LABELS:
            raise ValueError(f"{quantity(len(self.labels), 'label')} are more than {MOST_LABELS}")
        if self.format != "npz":
            if self.output != "uint8":
                raise ValueError(f"pictures hold bytes: --float is for --shards npz, not {self.format}")
            if self.image_shape[0] not in (1, 3):
                raise ValueError(f"a picture has 1 or 3 channels, not {self.image_shape[0]}; take --shards npz")
        return self

    @classmethod
    def from_request(cls, engine: Backend, request: Request, model: Path, shards: Shards, threads: int) -> Job:
        """The job of drawing a request with an engine that was opened from ``model`` with ``threads``.

        Raises RequestError for what cannot be shards of that kind.
        """
        values = {field.name: getattr(request, field.name) for field in fields(Draw)}
        for field in fields(Draw):
            if field.name not in (*cls.model_fields, "steps") and values.pop(field.name) != field.default:
                raise RequestError(f"shards are drawn without another {field.name}")
        del values["steps"]  # their number is that of the noise levels
        try:
            return cls(
                **_traits(engine, shards.kind),
                **values,
                file_sha256=identity(model),
                format=shards.kind,
                shard_size=shards.size,
                threads=threads,
            )
        except ValidationError as error:
            raise RequestError(first_fault(error)[1]) from error

    @property
    def place(self) -> Literal["cpu", "cuda:0"]:
        """The device as `backends.load` takes it."""
        return "cuda:0" if self.device == "cuda" else "cpu"

    @property
    def numbers(self) -> range:
        """The numbers of all shards."""
        return range(-(-self.count // self.shard_size))


def identity(model: Path) -> str:
    """The SHA-256 of a model's file, or over those of a folder's.

    An export's weights may lie beside it; its manifest then has the name of their file, which has their hash.
    """
    if not model.is_dir():
        return atomic.sha256(model)
    files = sorted(path for path in model.rglob("*") if path.is_file())
    return atomic.sha256_of_files({str(path.relative_to(model)): path for path in files}, "{sha256}  {name}\n")


def size(job: Job, number: int) -> int:
    """The number of images in a shard."""
    return min(job.shard_size, job.count - number * job.shard_size)


def missing_shards(job: Job, folder: Path) -> list[int]:
    """The shards that are not there. Raises DataError for a file under a shard's name that is not whole.

    The last shard of a folder that grows is missing until it has its images of the larger job.
    """
    return [number for number in job.numbers if not _is_there(job, number, folder)]


def make_shard(engine: Backend, job: Job, number: int, folder: Path) -> None:
    """Draw one shard and write it, whole or not at all, unless it is there.

    Any number of processes may do so in one folder: those that are at the same shard write the same bytes. Raises
    EngineError for an engine that would make others, OutputError, DataError.
    """
    if not _is_there(job, number, folder):
        for _ in run(engine, job, folder, [number]):
            pass


def run(engine: Backend, job: Job, folder: Path, numbers: Sequence[int]) -> Iterator[int]:
    """Draw shards and write them beside the drawing of what follows; yield the number of each that is there."""
    _check(engine, job)
    parts = prefetch((part for number in numbers for part in draw_shard(engine, job, number)), AHEAD)
    with closing(parts):
        for number in numbers:
            batches = -(-size(job, number) // job.micro_batch)
            where = formats.path(folder, job.format, number)
            formats.write(where, job.format, _contents(job, number), islice(parts, batches))
            yield number


def draw_shard(engine: Backend, job: Job, number: int) -> Iterator[Batch]:
    """The images of one shard. Raises OutOfMemoryError where the engine would go on with smaller micro-batches."""
    first, count = job.start + number * job.shard_size, size(job, number)
    images = -(-count // job.micro_batch) * job.micro_batch  # the last micro-batch filled
    draw = Draw(
        count=images,
        sigmas=job.sigmas,
        seed=job.seed,
        start=min(first, INDICES - images),
        labels=job.labels,
        micro_batch=job.micro_batch,
        output=job.output,
    )
    for part in sampling.batches(engine, sampling_request(engine.manifest, draw)):
        if len(part.index) != job.micro_batch:
            raise OutOfMemoryError(
                f"no memory for {quantity(job.micro_batch, 'image')} at once: give a smaller --micro-batch"
            )
        at = int(part.index[0])
        inside = slice(max(first - at, 0), first + count - at)
        labels = None if part.labels is None else part.labels[inside]
        yield Batch(part.index[inside], labels, part.images[inside])


# The folder


def load_job(folder: Path, name: str = MANIFEST) -> Job | None:
    """Load the job that a folder holds, if any. Raises DataError."""
    where = folder / name
    if not os.path.lexists(where):
        return None
    try:
        return Job.model_validate_json(streams.read_bytes(where, DataError, _LARGEST))
    except ValidationError as error:
        wrong = f"is no job of this version of cm-runtime ({explain(error)})"
        raise data_error(where, wrong, "give another folder") from error


@contextmanager
def open_folder(job: Job, folder: Path, *, force: bool = False) -> Iterator[list[int]]:
    """Open the job's folder, made if need be, for one process at a time; yield the shards that it lacks.

    The block makes them, and when it ends well SHA256SUMS is written. A folder whose job differs in a smaller count
    alone grows: its full shards stay, and until the larger job is finished the smaller one can be gone on with.
    force: shards of another job are removed. Raises OutputError where another process has the folder, or it holds
    another job; DataError as `missing_shards`.
    """
    with output_errors(folder):
        folder.mkdir(exist_ok=True)
        atomic.check_writable(folder / MANIFEST)
    with locks.claim(folder):
        with output_errors(folder):
            sweep(folder)
            _settle(job, folder, force)
        numbers = missing_shards(job, folder)
        yield numbers
        with output_errors(folder):
            if (folder / NEXT).exists():
                os.replace(folder / NEXT, folder / MANIFEST)
            if numbers or not (folder / SUMS).exists():
                _write_sums(job, folder)


def _settle(job: Job, folder: Path, force: bool) -> None:
    """Leave the folder with this job's manifest, or one that it grows from, and no shard of another."""
    old, later = load_job(folder), load_job(folder, NEXT)
    if old is None and any(folder.glob("shard-*")):
        raise OutputError(f"{folder} holds shards without their {MANIFEST}; give another folder")
    if old is None:
        (folder / NEXT).unlink(missing_ok=True)
        _write_manifest(job, folder / MANIFEST)
    elif not _grows(old, job):
        if not force:
            raise OutputError(f"{folder} holds another job: {_differences(old, job)}; give another folder, or --force")
        (folder / SUMS).unlink(missing_ok=True)
        for each in (later, old):  # the manifest goes last, for as long as there are any that it describes
            if each:
                _remove_all(each, folder)
        (folder / NEXT).unlink(missing_ok=True)
        _write_manifest(job, folder / MANIFEST)
    else:
        if later and later != job:
            _give_up(later, job, folder)
        if old != job:
            (folder / SUMS).unlink(missing_ok=True)
            _write_manifest(job, folder / NEXT)
        else:
            (folder / NEXT).unlink(missing_ok=True)


def _grows(old: Job, new: Job) -> bool:
    """True if every image of ``old`` is the same in ``new``, and so is every full shard."""
    return new.count >= old.count and old.model_copy(update={"count": new.count}) == new


def _give_up(later: Job, job: Job, folder: Path) -> None:
    """Remove what was drawn to grow the folder into ``later`` and is not of ``job``, another stage of the same."""
    for number in later.numbers:
        if number not in job.numbers or (size(later, number) != size(job, number) and _holds(later, number, folder)):
            formats.remove(formats.path(folder, later.format, number))


def _remove_all(job: Job, folder: Path) -> None:
    for number in job.numbers:
        formats.remove(formats.path(folder, job.format, number))


def _write_manifest(job: Job, where: Path) -> None:
    with atomic.write(where) as temporary:
        temporary.write_text(job.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _differences(old: Job, new: Job) -> str:
    """Name the fields in which two jobs differ."""
    differences = []
    for name in Job.model_fields:
        was, now = getattr(old, name), getattr(new, name)
        if name == "versions":
            was, now = ", ".join(was), ", ".join(now)
        elif name.endswith("sha256"):
            was, now = was[:12], now[:12]
        if getattr(old, name) != getattr(new, name):
            differences.append(f"its {name.replace('_', ' ')} {'are' if name.endswith('s') else 'is'} {was}, not {now}")
    return ", ".join(differences)


def _write_sums(job: Job, folder: Path) -> None:
    with atomic.write(folder / SUMS) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number in job.numbers:
            for member in formats.members(formats.path(folder, job.format, number)):
                file.write(f"{atomic.sha256(member)}  {member.relative_to(folder)}\n")


def _is_there(job: Job, number: int, folder: Path) -> bool:
    """As `_is_whole`, but a whole shard of the job that the folder grows from is not this job's, and no fault."""
    try:
        return _is_whole(job, number, folder)
    except DataError:
        old = load_job(folder)
        if old and _grows(old, job) and _holds(old, number, folder):
            return False
        raise


def _holds(job: Job, number: int, folder: Path) -> bool:
    """True if what is under the shard's name is the job's, and False for anything else."""
    try:
        return number in job.numbers and _is_whole(job, number, folder)
    except DataError:
        return False


def _is_whole(job: Job, number: int, folder: Path) -> bool:
    return formats.is_whole(formats.path(folder, job.format, number), job.format, _contents(job, number))


def _contents(job: Job, number: int) -> formats.Contents:
    channels, height, width = job.image_shape
    text = {"seed": job.seed, "start": job.start + number * job.shard_size, "count": size(job, number)}
    also = {name: getattr(job, name) for name in ("sigmas", "labels", "micro_batch", "model_sha256")}
    return formats.Contents(text["count"], (height, width, channels), job.output, job.labels is not None, text | also)


# The engine


def _traits(engine: Backend, kind: ShardKind) -> dict[str, Any]:
    """Engine properties and package versions that the bytes of a shard depend on."""
    versions = [f"cm-runtime {__version__}", engine.version, f"numpy {np.__version__}"]
    if kind != "npz":
        versions.append(f"pillow {PIL.__version__}")
    if kind == "parquet":
        versions.append(f"pyarrow {require('pyarrow', '--shards parquet').__version__}")
    return {
        "model_sha256": engine.manifest.source_sha256,
        "image_shape": engine.manifest.image_shape,
        "backend": engine.name,
        "device": engine.device.partition(":")[0],
        "precision": engine.precision,
        "versions": tuple(versions),
    }


def _check(engine: Backend, job: Job) -> None:
    here = job.model_copy(update=_traits(engine, job.format))
    if here != job:
        raise EngineError(f"this engine does not make the bytes of the job: {_differences(job, here)}")
