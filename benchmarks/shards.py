"""Many images as shards: memory, speed and what a kill costs, of the bundled model on this machine's cores.

    python benchmarks/shards.py                    # 50000 images, twice: over half an hour on two cores
    python benchmarks/shards.py --count 5000       # a look

Peak memory: of `cm-runtime sample` drawing them all, against 1000 images; at most a tenth more. Throughput: of shards
as that command draws them, in turns with the bare engine: the same micro-batches, two evaluations each and nothing
else; the median of the turns' ratios, at most 5% less. Killed: the same command ended by SIGKILL three times and run
again, the sha256 of each shard against those of the run that nothing disturbed.

Exit status: 0 all within bounds; 1 one is not, or a one-line error; 2 usage.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from cm_runtime import backends, noise
from cm_runtime.errors import CmRuntimeError
from cm_runtime.generation import job
from cm_runtime.request import Draw, even_micro_batch, sampling_request

ROOT = Path(__file__).resolve().parents[1]
FEW = 1000  # images that peak memory is compared with
MOST_MEMORY, LEAST_SPEED = 1.10, 0.95
KILLS = 3
STEPS = 2


class Run(NamedTuple):
    """A process that ended by itself: its wall time in seconds and its peak memory in MB."""

    seconds: float
    memory: float


def start(count: int, folder: Path, backend: str) -> subprocess.Popen[bytes]:
    """`cm-runtime sample`, drawing into a folder."""
    words = ["sample", "--count", count, "--steps", STEPS, "--backend", backend, "--shards", "npz", "-o", folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "cm_runtime", *map(str, words)], env=environment)


def run_once(count: int, folder: Path, backend: str) -> Run:
    """Draw into a folder, and measure the process. Raises CalledProcessError."""
    began = time.perf_counter()
    process = start(count, folder, backend)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), process.args)
    return Run(time.perf_counter() - began, usage.ru_maxrss / 1024)


def run_with_kills(count: int, folder: Path, backend: str) -> int:
    """Kill the run `KILLS` times, each some way further, and let it end; returns the number of kills."""
    kills = 0
    for part in range(1, KILLS + 1):
        process = start(count, folder, backend)
        shards = -(-count // 1000) * part // (KILLS + 1)
        while process.poll() is None and len(list(folder.glob("shard-*"))) <= shards:
            time.sleep(0.05)
        time.sleep(0.3 * part)  # into the next shard
        process.kill()
        kills += process.wait() < 0
    run_once(count, folder, backend)
    return kills


def ratios(folder: Path, backend: str, turns: int, shards: int) -> list[float]:
    """Images a second of shards over those of the bare engine, one ratio a turn."""
    threads = len(os.sched_getaffinity(0))
    engine: Any = backends.load(None, backend, threads=threads)  # type: ignore[arg-type]
    micro_batch = even_micro_batch(1000, engine.micro_batch)
    request = sampling_request(engine.manifest, Draw(count=turns * shards * 1000, steps=STEPS, micro_batch=micro_batch))
    whole = job.Job.from_request(engine, request, backends.DEFAULT_MODEL, job.Shards(), threads)
    index = np.arange(micro_batch, dtype=np.uint64)
    x = np.float32(request.sigmas[0]) * noise.normal(0, index, 0, engine.manifest.image_shape)
    label = (index % np.uint64(engine.manifest.num_classes)).astype(np.int64)

    def bare(images: int) -> float:
        began = time.perf_counter()
        for _ in range(0, images, micro_batch):
            for sigma in request.sigmas:
                engine.denoise(x, sigma, label)
        return -(-images // micro_batch) * micro_batch / (time.perf_counter() - began)

    def draw_shards(numbers: range) -> float:
        began = time.perf_counter()
        for _ in job.run(engine, whole, folder, numbers):
            pass
        return len(numbers) * 1000 / (time.perf_counter() - began)

    quotients = []
    bare(4 * micro_batch)
    with job.open_folder(whole, folder):
        for turn in range(turns):
            numbers = range(turn * shards, (turn + 1) * shards)
            pair = [lambda: bare(shards * 1000), lambda these=numbers: draw_shards(these)]  # type: ignore[misc]
            order = (0, 1) if turn % 2 else (1, 0)
            rates = {which: pair[which]() for which in order}
            print(f"turn {turn}: bare {rates[0]:.1f} images/s, shards {rates[1]:.1f}", file=sys.stderr, flush=True)
            quotients.append(rates[1] / rates[0])
    return quotients


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000, help="images of a run (%(default)s)")
    parser.add_argument("--backend", default="ort", help="(%(default)s)")
    parser.add_argument("--turns", type=int, default=7, help="of the comparison of speeds (%(default)s)")
    parser.add_argument("--turn-shards", type=int, default=2, help="in each turn (%(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            speeds = ratios(folder / "turns", options.backend, options.turns, options.turn_shards)
            few = run_once(FEW, folder / "few", options.backend)
            many = run_once(options.count, folder / "many", options.backend)
            kills = run_with_kills(options.count, folder / "killed", options.backend)
            sums = [(folder / name / job.SUMS).read_text() for name in ("many", "killed")]
            manifest = job.load_job(folder / "many")
    except (CmRuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    assert manifest is not None
    rate, memory = statistics.median(speeds), many.memory / few.memory
    is_same = sums[0] == sums[1] and kills == KILLS
    rows = [
        (
            f"peak memory, {options.count} images over {FEW}",
            f"{memory:.3f}",
            f"<= {MOST_MEMORY}",
            memory <= MOST_MEMORY,
        ),
        (
            "throughput, shards over the bare engine",
            f"{rate:.3f}",
            f">= {LEAST_SPEED}",
            rate >= LEAST_SPEED,
        ),
        (f"shards with the same sha256 after {kills} kills", "all" if is_same else "not all", "all", is_same),
    ]
    print(f"{', '.join(manifest.versions)}, {manifest.threads} threads, micro-batch {manifest.micro_batch}")
    print(f"{options.count} images in {many.seconds:.0f} s, peak {many.memory:.0f} MB; {FEW}: {few.memory:.0f} MB")
    for name, value, bound, is_met in rows:
        print(f"{name:<48} {value:>8} {bound:>8} {'met' if is_met else 'MISSED'}")
    if options.json:
        figures = {"throughput ratios": speeds, "memory ratio": memory, "run": many._asdict(), "few": few._asdict()}
        options.json.write_text(json.dumps(figures | {"kills": kills, "same": is_same}, indent=1) + "\n")
    return 0 if all(is_met for *_, is_met in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
