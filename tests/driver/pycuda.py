"""pycuda, built once from its source against the stand-in, into build/pycuda: `make test-pycuda`.

It has no wheels, and its build takes 80 s of CPU: tests that need it are skipped unless CM_RUNTIME_PYCUDA is set, and
where it cannot be built: for want of CUDA's headers (of a toolkit in CUDA_HOME or /usr/local/cuda, or of the wheel
nvidia-cuda-runtime), of a compiler, or of an index of packages.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import pytest

from driver.build import ROOT, library

VERSION = "2026.1"
NEEDS = ["mako", "markupsafe", "platformdirs", "pytools", "siphash24", "typing-extensions"]  # NumPy is there
SITE = """
BOOST_INC_DIR, BOOST_LIB_DIR, USE_SHIPPED_BOOST = [], [], True
CUDA_TRACE, CUDA_ENABLE_GL, CUDA_ENABLE_CURAND = False, False, False
CUDA_INC_DIR = [{headers!r}]
CUDADRV_LIB_DIR, CUDADRV_LIBNAME = [{link!r}], ["cuda"]
CUDART_LIB_DIR, CUDART_LIBNAME, CURAND_LIB_DIR, CURAND_LIBNAME = [], [], [], []
CXXFLAGS, LDFLAGS = ["-O1"], []
"""


@cache
def pycuda_folder() -> Path:
    """Folder for PYTHONPATH that has pycuda and what it needs; the test is skipped where there is none."""
    if not os.environ.get("CM_RUNTIME_PYCUDA"):
        pytest.skip("pycuda is built only by make test-pycuda")
    headers = _headers()
    folder = ROOT / "build" / "pycuda" / f"{VERSION}-{sys.implementation.cache_tag}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                try:
                    _build(Path(scratch), headers)
                except subprocess.CalledProcessError as error:
                    pytest.skip(f"pycuda {VERSION} cannot be built: {error.stderr.strip().splitlines()[-1]}")
                (Path(scratch) / "packages").rename(folder)
    return folder


def _headers() -> Path:
    roots = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    roots += [Path(path) / "nvidia" / "cu13" / "include" for path in sys.path]
    found = [root for root in roots if (root / "cuda.h").exists()]
    if not found:
        pytest.skip("pycuda is built with CUDA's headers: pip install nvidia-cuda-runtime")
    return found[0]


def _build(scratch: Path, headers: Path) -> None:
    def pip(*words: str) -> None:
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
        command = [sys.executable, "-m", "pip", words[0], *options, *words[1:]]
        subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True)

    pip("download", "--no-binary", "pycuda", f"pycuda=={VERSION}")
    with tarfile.open(scratch / f"pycuda-{VERSION}.tar.gz") as archive:
        archive.extractall(scratch, filter="data")
    shutil.copy(library() / "libcuda.so.1", scratch / "libcuda.so")
    source = scratch / f"pycuda-{VERSION}"
    (source / "siteconf.py").write_text(SITE.format(headers=str(headers), link=str(scratch)))
    pip("install", "--target", "packages", f"./{source.name}")
    pip("install", "--target", "packages", *NEEDS)
