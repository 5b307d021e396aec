"""The stand-in and the kernels' host build, compiled once for each state of their sources, into build/driver."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
KERNELS = ROOT / "kernels"
CACHE = ROOT / "build" / "driver"
SANITISERS = "-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined -Wno-clobbered"


@cache
def library(sanitised: bool = False) -> Path:
    """Folder of libcuda.so.1, host.so and kernels.txt; a test without g++ and make is skipped."""
    if shutil.which("g++") is None or shutil.which("make") is None:
        pytest.skip("needs g++ and make")
    folder = CACHE / f"{_key()}{'-san' if sanitised else ''}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of pytest's workers builds, the others wait
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as unfinished:
                _build(Path(unfinished), sanitised)
                shutil.copytree(unfinished, folder.with_suffix(".new"), ignore=shutil.ignore_patterns("*.o"))
            folder.with_suffix(".new").rename(folder)
    return folder


def _key() -> str:
    """A hash of all that decides what is built."""
    paths = [path for pattern in ("*.cpp", "*.h", "*.def", "Makefile") for path in FOLDER.glob(pattern)]
    paths += [
        path for pattern in ("*.cu", "*.h", "*.cpp", "Makefile", "kernels.json") for path in KERNELS.glob(pattern)
    ]
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    content = b"".join(path.name.encode() + path.read_bytes() for path in [*sorted(paths), Path(__file__)])
    return hashlib.sha256(version + content).hexdigest()[:16]


def _build(folder: Path, sanitised: bool) -> None:
    compiler = f"g++ {SANITISERS}" if sanitised else "g++"
    for source, words in ((FOLDER, ["--jobs=2"]), (KERNELS, ["host"])):
        command = ["make", "--silent", "-C", str(source), f"BUILD={folder}", f"CXX={compiler}", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MAKEFLAGS": ""})
        assert done.returncode == 0, done.stderr
    report = json.loads((KERNELS / "kernels.json").read_text())
    lines = [report["fatbin_sha256"]]
    for name, gpus in report["kernels"].items():
        registers = [gpus[gpu]["registers"] for gpu in ("sm_80", "sm_90", "sm_120")]
        numbers = [max(each["shared"] for each in gpus.values()), *registers, *report["parameters"][name]]
        lines.append(" ".join(map(str, [name, *numbers])))
    (folder / "kernels.txt").write_text("\n".join(lines) + "\n")
