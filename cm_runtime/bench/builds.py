"""Builds to measure: this one, and the one that ``--against`` names."""

from __future__ import annotations

import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cm_runtime import backends
from cm_runtime.bench.worker_process import HERE
from cm_runtime.errors import RequestError
from cm_runtime.files import streams
from cm_runtime.subprocesses import commit, git

MOST_WHEEL = 1 << 30  # bytes, packed or not
MOST_FILES = 10_000
PARTS = ("cm_runtime", "export", "kernels")  # of a checkout, what a build consists of


@dataclass(frozen=True)
class Build:
    """root: the folder to import ``cm_runtime`` from; model: another model file in place of the scenario's own."""

    root: Path
    commit: str
    model: Path | None = None


def this_build() -> Build:
    """The build that runs now."""
    return Build(HERE, _commit(HERE))


def base_build(against: str, work: Path) -> Build:
    """The build of ``--against``: a model file, a wheel, a source tree, or a git revision of this checkout or folder.

    work: where a wheel or a revision is unpacked. Raises RequestError.
    """
    path = Path(against)
    if path.suffix == ".whl" and streams.exists(path):
        return Build(_with_package(_unpack(path, work / "base"), against), path.name)
    if against and streams.exists(path / "cm_runtime" / "__init__.py"):  # "" would be this folder
        return Build(path.resolve(), _commit(path.resolve()))
    if streams.exists(path) and backends.is_model(path):
        return Build(HERE, _commit(HERE), path)
    repository = HERE if _commit(HERE) else Path.cwd()
    name = f"{against}^{{commit}}".replace("\0", " ")  # which no revision has
    revision = git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", name)
    if not revision:
        raise RequestError(f"{against!r} is no model file, wheel or source tree, nor a git revision of {repository}")
    root = work / "base"
    root.mkdir()
    archive = work / "base.tar"
    top = git(repository, "rev-parse", "--show-toplevel") or ""
    if git(Path(top), "archive", "--format=tar", f"--output={archive}", revision) is None:
        raise RequestError(f"git cannot unpack {against}")
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(root, filter="data")
    except (tarfile.TarError, OSError) as error:
        raise RequestError(f"{against} cannot be unpacked: {error}") from error
    archive.unlink()
    return Build(_with_package(root, against), revision)


def _commit(root: Path) -> str:
    return commit(root, *PARTS)


def _unpack(path: Path, root: Path) -> Path:
    """Unpack the package of the wheel ``path`` into ``root``, and return that. Raises RequestError."""
    streams.regular(path, RequestError, MOST_WHEEL)
    try:
        with zipfile.ZipFile(path) as wheel:
            entries = [each for each in wheel.infolist() if each.filename.startswith("cm_runtime/")]
            if len(entries) > MOST_FILES or sum(each.file_size for each in entries) > MOST_WHEEL:
                raise RequestError(f"{path} unpacks to more than a build of cm-runtime has")
            wheel.extractall(root, entries)  # leaves ".." out of names, and writes no links
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib, lzma, struct and codecs raise a dozen, which have no common base
        reason = str(error).strip() or type(error).__name__
        raise RequestError(f"{path} is no wheel, or is damaged: {reason}") from error
    return root


def _with_package(root: Path, against: str) -> Path:
    if not (root / "cm_runtime" / "__init__.py").is_file():
        raise RequestError(f"{against} holds no cm_runtime")
    return root
