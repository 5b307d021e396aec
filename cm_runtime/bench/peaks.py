"""Peak rates of a machine: a matrix product, for arithmetic, and a copy, for memory.

Both are measured in a process of their own, whose number of threads is set before it loads a library.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cm_runtime.bench.machine import free_bytes
from cm_runtime.bench.results import Estimate, Peaks
from cm_runtime.bench.turns import timer
from cm_runtime.errors import EngineError, MissingExtraError, RequestError
from cm_runtime.extras import EXTRAS, require

SIZE, GPU_SIZE = 3072, 8192  # rows of a matrix
COPIED = 512 << 20  # bytes: beyond the caches of all processors but the largest
LEAST = 6  # repetitions: an interval of 95% takes as many
PATIENCE = 300.0  # seconds
THREADS = tuple(f"{library}_NUM_THREADS" for library in ("OMP", "OPENBLAS", "GOTO", "MKL", "BLIS"))
CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from cm_runtime.bench import peaks
print(json.dumps(peaks.measure_here(*json.loads(sys.argv[2]))))
"""


def measure_peaks(threads: int, device: str = "cpu", *, size: int | None = None, seconds: float = 0.3) -> Peaks:
    """The rates of ``threads`` threads on the CPU, or of a GPU (``cuda:N``), in about 3 s on two cores.

    size: rows of the matrices; seconds: at least, for each of both, and at least 6 repetitions. An estimate is their
    median, with its 95% interval by order statistics. On the CPU NumPy's product and copy are measured, the copy by
    ``threads`` Python threads; on a GPU torch's, in plain float32. Raises MissingExtraError where that takes torch
    and there is none, EngineError where it fails.
    """
    if threads < 1:
        raise RequestError(f"threads must be at least 1, not {threads}")
    if device != "cpu" and importlib.util.find_spec("torch") is None:
        raise MissingExtraError("torch", EXTRAS["torch"], f"measuring the peaks of {device}")
    rates = _in_child(threads, device, size or (SIZE if device == "cpu" else GPU_SIZE), seconds)
    return Peaks(
        threads=threads,
        device=device,
        matrix_gflop_per_s=_estimate(rates["gflop_per_s"]),
        copy_gb_per_s=_estimate(rates["gb_per_s"]),
        library=rates["library"],
    )


def drift(first: Peaks, last: Peaks) -> float:
    """The change of the matrix product's rate, as a share of the first."""
    return abs(last.matrix_gflop_per_s.value / first.matrix_gflop_per_s.value - 1)


def _in_child(threads: int, *arguments: Any) -> dict[str, Any]:
    """`measure_here` (threads, *arguments) in a process whose libraries have that many threads."""
    call = [sys.executable, "-P", "-c", CHILD, json.dumps(sys.path), json.dumps([threads, *arguments])]
    environment = os.environ | dict.fromkeys(THREADS, str(threads)) | {"MKL_DYNAMIC": "FALSE", "OMP_DYNAMIC": "FALSE"}
    try:
        child = subprocess.run(
            call, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"the machine's peaks cannot be measured: {error}") from error
    if child.returncode:
        last = (child.stderr.strip() or f"the process ended with status {child.returncode}").splitlines()[-1]
        raise EngineError(f"the machine's peaks cannot be measured: {last}")
    rates: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return rates


def _estimate(rates: Sequence[float]) -> Estimate:
    """The median, and the order statistics that hold it with at least 95%, where there are enough."""
    ranks, n = sorted(rates), len(rates)
    k, outside = -1, 0  # of 2^n ways, in how many at most k of n samples are below the median
    while 40 * (outside + math.comb(n, k + 1)) <= 1 << n:
        k += 1
        outside += math.comb(n, k)
    low, high = (ranks[k], ranks[-1 - k]) if k >= 0 else (None, None)
    return Estimate(value=statistics.median(ranks), low=low, high=high)


# In the child


def measure_here(threads: int, device: str, size: int, seconds: float) -> dict[str, Any]:
    """The rates of every repetition and the library; on the CPU also the number of threads of this process."""
    if device != "cpu":
        return _on_gpu(device, size, seconds)
    copies = _copies(threads, seconds)
    products = _products(size, seconds)
    threads = len(os.listdir("/proc/self/task"))
    return {"gflop_per_s": products, "gb_per_s": copies, "library": _blas(), "running": threads}


def _copies(threads: int, seconds: float) -> list[float]:
    """GB/s of NumPy's copy, which lets other Python threads run."""
    count = min(COPIED, free_bytes() // 8 or COPIED) // 4
    source, target = (np.empty(count, np.float32) for _ in range(2))
    parts = np.array_split(target, threads), np.array_split(source, threads)
    with ThreadPoolExecutor(threads) as pool:
        for side in parts:  # the kernel finds pages when they are first written, near the thread that does
            list(pool.map(np.copyto, side, [1.0] * threads))
        return _rates(timer(lambda: list(pool.map(np.copyto, *parts))), 2 * source.nbytes / 1e9, seconds)


def _products(size: int, seconds: float) -> list[float]:
    """GFLOP/s of NumPy's matrix product."""
    a, b = np.random.default_rng(0).random((2, size, size), np.float32)
    product = np.empty_like(a)
    return _rates(timer(lambda: np.matmul(a, b, out=product)), 2 * size**3 / 1e9, seconds)


def _on_gpu(device: str, size: int, seconds: float) -> dict[str, Any]:
    torch: Any = require("torch", f"measuring the peaks of {device}")
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} cannot use {device}")
    torch.set_float32_matmul_precision("highest")  # no TF32
    torch.cuda.set_device(device)

    def gpu_timer(work: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000

        return run

    free, _ = torch.cuda.mem_get_info()
    source, target = (torch.ones(min(COPIED, free // 8) // 4, device=device) for _ in range(2))
    copies = _rates(gpu_timer(lambda: target.copy_(source)), 2 * source.nbytes / 1e9, seconds)
    a, b, product = (torch.randn(size, size, device=device) for _ in range(3))
    products = _rates(gpu_timer(lambda: torch.mm(a, b, out=product)), 2 * size**3 / 1e9, seconds)
    return {
        "gflop_per_s": products,
        "gb_per_s": copies,
        "library": f"torch {torch.__version__} (CUDA {torch.version.cuda}, {torch.cuda.get_device_name()})",
    }


def _rates(measure: Callable[[], float], amount: float, seconds: float) -> list[float]:
    """``amount`` over the seconds of each repetition, after one that does not count."""
    measure()
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while len(rates) < LEAST or time.perf_counter() < end:
        rates.append(amount / measure())
    return rates


def _blas() -> str:
    """Such as: numpy 2.4.6 (OpenBLAS 0.3.31)."""
    config: Any = np.show_config(mode="dicts")
    blas = config.get("Build Dependencies", {}).get("blas", {})
    name = str(blas.get("name", "unknown BLAS")).removeprefix("scipy-").replace("openblas", "OpenBLAS")
    library = f"{name} {blas.get('version', '')}".strip()
    return f"numpy {np.__version__} ({library})"
