"""What TensorRT worked out on this machine and may use again: kernels, and the timings that it chose them by.

A file is a SHA-256 and the content that has it, so that TensorRT never sees a damaged one. It checks itself that a
content is of its version and of the GPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from cm_runtime.errors import ArtifactError, OutputError
from cm_runtime.files import atomic, streams

LOG = logging.getLogger("cm_runtime")
LARGEST = 1 << 30
DIGEST = 32  # bytes


def cache_name(kind: str, *key: str) -> str:
    """Name the file of a ``kind`` that all of ``key`` belong to: an engine's hash, versions, the GPU."""
    return f"{kind}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()}"


def load_cache(name: str) -> bytes:
    """Read what was saved under ``name``; nothing where there is none, or where its hash is another."""
    try:
        content = streams.read_bytes(_folder() / name, ArtifactError, LARGEST)
    except (ArtifactError, OSError, RuntimeError):  # the last where there is no home folder
        return b""
    digest, content = content[:DIGEST], content[DIGEST:]
    return content if hashlib.sha256(content).digest() == digest else b""


def save_cache(name: str, content: bytes) -> None:
    """Write ``content``, whole or not at all; a cache that cannot be written is none."""
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        with atomic.write(_folder() / name) as temporary:
            temporary.write_bytes(hashlib.sha256(content).digest() + content)
    except (OSError, OutputError, RuntimeError) as error:
        LOG.debug("what TensorRT worked out cannot be kept: %s", error)


def _folder() -> Path:
    return atomic.cache_folder() / "tensorrt"
