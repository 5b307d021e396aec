"""Download of published data sets: their original files, once, checked by sha256."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rich.progress import Progress

from cm_runtime.errors import DataError, data_error
from cm_runtime.errors.reasons import system_reason
from cm_runtime.extras import require
from cm_runtime.files import streams
from cm_runtime.training.data.catalogue import DATA_SETS, RemoteFile
from cm_runtime.training.data.idx import PREFIX, Split

CHUNK = 2**16


def download(name: str, split: Split, cache: Path | None, bar: Progress) -> Path:
    """Download one split of the data set ``name``, a key of DATA_SETS.

    The files lie in ``<cache>/data/<name>``; cache defaults to ``CM_RUNTIME_CACHE``, else to the platform's folder
    for user caches. Files there already are only checked. ``CM_RUNTIME_MIRROR``, a base address, replaces the
    published addresses by ``<mirror>/<name>/<file>``. Returns the one archive, or the folder of many files.
    Raises DataError if a file cannot be downloaded whole, MissingExtraError without pooch.
    """
    pooch = require("pooch", "downloading a data set")
    root = cache or Path(os.environ.get("CM_RUNTIME_CACHE") or pooch.os_cache("cm-runtime"))
    folder = root.expanduser() / "data" / name
    files = DATA_SETS[name]
    other_split: Split = "test" if split == "train" else "train"
    mirror = os.environ.get("CM_RUNTIME_MIRROR")
    for file, remote in files.items():
        if file.startswith(PREFIX[other_split]):
            continue
        urls = (f"{mirror.rstrip('/')}/{name}/{file}",) if mirror else remote.urls
        fetch(folder / file, RemoteFile(remote.sha256, remote.size, urls), bar)
    return folder / next(iter(files)) if len(files) == 1 else folder


def fetch(target: Path, remote: RemoteFile, bar: Progress | None = None) -> None:
    """Make ``target`` the published file: nothing to do if it is, else try each address in turn.

    pooch downloads to a temporary name in the same folder, checks the sha256 and renames, so ``target`` is
    whole or absent, whatever is interrupted and however many processes do this at once.
    Raises DataError, MissingExtraError.
    """
    pooch = require("pooch", "downloading a data set")
    from requests import RequestException

    if streams.exists(target):
        streams.regular(target, DataError)  # pooch reads it to its end
    failures: list[Exception] = []
    display = bar or Progress(disable=True)
    with display, _quiet(pooch.get_logger()):
        downloader = _downloader(remote.size, display, target.name)
        for url in remote.urls:
            try:
                pooch.retrieve(url, f"sha256:{remote.sha256}", target.name, target.parent, downloader=downloader)
                return
            except (RequestException, ValueError) as error:
                failures.append(error)
            except OSError as error:
                wrong = f"cannot be written ({system_reason(error)})"
                raise data_error(target.parent, wrong, "set CM_RUNTIME_CACHE to a folder that can") from error
    attempts = "; ".join(f"{url}: {_reason(error)}" for url, error in zip(remote.urls, failures, strict=True))
    cure = f"check the network, set CM_RUNTIME_MIRROR, or put the original file at {target}"
    raise data_error(target.name, f"could not be downloaded ({attempts})", cure) from failures[-1]


def _downloader(size: int, bar: Progress, name: str) -> Callable[[str, str, object], None]:
    """Build pooch's downloader, which stops a server that sends more than ``size`` bytes."""
    # identity: where a server labels a .gz file as encoded, requests would unpack it
    http = require("pooch", "downloading a data set").HTTPDownloader(
        chunk_size=CHUNK, headers={"Accept-Encoding": "identity"}
    )

    def write(url: str, path: str, _: object) -> None:
        task = bar.add_task(name, total=size)
        try:
            with open(path, "wb") as file:
                http(url, _Metered(file, size, lambda count: bar.advance(task, count)), None)
        finally:
            bar.remove_task(task)
        os.chmod(path, 0o644)  # a temporary file is private; a cache may be shared

    return write


class _Metered:
    """A file, as far as pooch uses one, that reports its growth and raises ValueError past ``limit`` bytes."""

    def __init__(self, file: IO[bytes], limit: int, advance: Callable[[int], None]) -> None:
        self._file, self._room, self._advance = file, limit, advance

    def write(self, data: bytes) -> None:
        self._room -= len(data)
        if self._room < 0:
            raise ValueError("the server sends more than the published file")
        self._file.write(data)
        self._advance(len(data))

    def flush(self) -> None:
        self._file.flush()


def _reason(error: Exception) -> str:
    """Explain an error in a few words, in place of the chained text of requests and urllib3."""
    from requests import exceptions

    match error:
        case exceptions.HTTPError(response=response) if response is not None:
            return f"HTTP {response.status_code}"
        case exceptions.Timeout():
            return "timed out"
        case exceptions.ChunkedEncodingError():
            return "the connection broke before the end"
        case exceptions.ConnectionError():
            return "no connection"
        case exceptions.RequestException():
            return str(error)
    return "what came is not the published file, its sha256 or length differs"


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Silence pooch's own lines on stderr; the progress bar says as much."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
