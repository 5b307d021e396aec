"""A check of the p50 that `cm-runtime bench run` reports, against a plain loop around onnxruntime.

    python benchmarks/independent.py --batch 1 8 64 --rounds 8

The loop below knows nothing of cm-runtime: onnxruntime, NumPy, an exported file, two noise levels. It and the command,
each in a process of its own, take turns; a round gives a ratio of their medians, of whole requests and of the network
alone. A request of cm-runtime does more than one of the loop (its noise is addressed, its inputs and outputs are
checked), which shows where the network takes few milliseconds.

Exit status: 0 where the median ratios of whole requests are within 5% at every batch; 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # a checkout that is not installed

from cm_runtime.bench.turns import take_turns  # noqa: E402

MODEL = ROOT / "cm_runtime" / "models" / "fashion-mnist.onnx"
LEVELS = (80.0, 1.11776)  # what the bundled model stores for two steps
WITHIN = 0.05

LOOP = """
import json, sys, time
import numpy as np
import onnxruntime as ort

path, batch, threads, seconds, levels = json.loads(sys.argv[1])
options = ort.SessionOptions()
options.intra_op_num_threads = threads
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
inputs = {each.name: each for each in session.get_inputs()}
shape = [batch, *inputs["x"].shape[1:]]
rng = np.random.default_rng(0)
label = {"label": np.arange(batch, dtype=np.int64) % 10} if "label" in inputs else {}

def draw():
    x0 = np.zeros(shape, np.float32)
    for level in levels:
        spread = level if level == levels[0] else (level**2 - 0.002**2) ** 0.5
        x = x0 + np.float32(spread) * rng.standard_normal(shape, np.float32)
        feed = {"x": x, "sigma": np.full(batch, level, np.float32), **label}
        began = time.perf_counter()
        denoised = session.run(None, feed)[0]
        inside[-1] += time.perf_counter() - began
        x0 = denoised.clip(-1, 1)
    return np.rint((x0.transpose(0, 2, 3, 1) + 1) * 127.5).astype(np.uint8)

times, inside, ends = [], [], time.perf_counter() + seconds
while time.perf_counter() < ends or len(times) < 10:
    inside.append(0.0)
    began = time.perf_counter()
    draw()
    times.append(time.perf_counter() - began)
print(json.dumps([1e3 * float(np.median(each[len(times) // 5 :])) for each in (times, inside)]))
"""


def loop_ms(batch: int, threads: int, seconds: float) -> tuple[float, float]:
    """The plain loop's median request and its network's part, in milliseconds; its first fifth is its warm-up."""
    options = json.dumps([str(MODEL), batch, threads, seconds, LEVELS])
    child = subprocess.run([sys.executable, "-c", LOOP, options], stdout=subprocess.PIPE, text=True, check=True)
    request, network = json.loads(child.stdout)
    return float(request), float(network)


def bench_ms(batch: int, threads: int, seconds: float, result: Path) -> tuple[float, float]:
    """The p50 of `cm-runtime bench run` and its network's share of it, in milliseconds."""
    words = ["run", str(MODEL), "--batch", batch, "--threads", threads, "--budget", seconds, "-o", result, "--force"]
    command = [sys.executable, "-m", "cm_runtime", "bench", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    (scenario,) = json.loads(result.read_text(encoding="utf-8"))["scenarios"]
    subject = scenario["contenders"][0]
    p50 = float(subject["latency"]["p50"]["value"])
    return p50, p50 * (1 - subject["outside_network"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments``, by default the process's own, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="of each, each round (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of both (%(default)s)")
    options = parser.parse_args(arguments)
    is_within = True
    with tempfile.TemporaryDirectory() as folder:
        for batch in options.batch:
            setup = batch, options.threads, options.seconds
            sides = {"bench": partial(bench_ms, *setup, Path(folder) / "run.json"), "loop": partial(loop_ms, *setup)}
            pairs = take_turns(sides, range(options.rounds))
            for part, name in enumerate(("requests", "network")):
                ours, theirs = ([pair[part] for pair in pairs[side]] for side in sides)
                ratios = sorted(here / there for here, there in zip(ours, theirs, strict=True))
                middle = statistics.median(ratios)
                is_within &= name == "network" or abs(middle - 1) <= WITHIN
                print(
                    f"batch {batch}, {name}: bench run {statistics.median(ours):.3f} ms, loop"
                    f" {statistics.median(theirs):.3f} ms, ratio {middle:.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]",
                    flush=True,
                )
    return 0 if is_within else 1


if __name__ == "__main__":
    sys.exit(main())
