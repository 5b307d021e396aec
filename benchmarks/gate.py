"""A check of the gate: planted slow-downs, measured and judged as CI does it.

    python benchmarks/gate.py --runs 20 --json runs/gate.json

Two copies of the package are made: a clean one, and one whose `sample` waits, busily, for a given share of the time
that it took. The second is measured against the first by `cm-runtime bench run --against` and judged by `cm-runtime
bench compare --fail-above 5%`, both as commands. Slow-downs of 10% and 3% and none at all take turns.

Exit status: 0 where at least 19 of 20 of the 10% ones are called REGRESSION and none of the others; 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORDS = {0: "PASS", 3: "REGRESSION", 4: "INCONCLUSIVE"}
PLANT = """

def _slowed(draw: Any) -> Any:
    import time

    def slow(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        images = draw(*arguments, **options)
        until = began + (time.perf_counter() - began) * {factor}
        while time.perf_counter() < until:
            pass
        return images

    return slow


sample = _slowed(sample)
"""


def plant(work: Path, percent: float) -> Path:
    """A copy of the package that takes ``percent`` longer: the folder that holds it."""
    root = work / f"slower-{percent:g}"
    shutil.copytree(ROOT / "cm_runtime", root / "cm_runtime", ignore=shutil.ignore_patterns("__pycache__"))
    if percent:
        with (root / "cm_runtime" / "generation" / "stream.py").open("a", encoding="utf-8") as file:
            file.write(PLANT.format(factor=1 + percent / 100))
    return root


def judge(new: Path, base: Path, options: argparse.Namespace, result: Path) -> dict[str, Any]:
    """One run and its verdict: {verdict, ratio, seconds}."""
    began = time.perf_counter()
    words = ["run", "--steps", options.steps, "--batch", options.batch, "--budget", options.budget]
    _bench(new, *words, "--against", base, "-o", result, "--force", statuses=(0,))
    seconds = time.perf_counter() - began
    status = _bench(new, "compare", result, "--fail-above", options.gate, statuses=tuple(WORDS))
    sides = {each["role"]: each for each in json.loads(result.read_text())["scenarios"][0]["contenders"]}
    inverse = sides["base"]["time_ratio"]
    ratio = [None if inverse[end] is None else 1 / inverse[end] for end in ("high", "value", "low")]
    return {"verdict": WORDS[status], "ratio": ratio, "seconds": seconds}


def _bench(root: Path, *words: object, statuses: tuple[int, ...]) -> int:
    command = [sys.executable, "-P", "-m", "cm_runtime", "bench", *map(str, words)]
    child = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    if child.returncode not in statuses:
        raise SystemExit(f"error: {' '.join(command)}: status {child.returncode}: {child.stderr.strip()}")
    return child.returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="The file's first lines say what is measured."
    )
    add = parser.add_argument
    add("--runs", type=int, default=20, help="of each slow-down (%(default)s)")
    add("--percent", type=float, nargs="+", default=[0, 3, 10], help="slow-downs (%(default)s)")
    add("--gate", default="5%", help="what compare allows")
    add("--budget", type=float, default=5, help="seconds for each of both builds (%(default)s)")
    add("--steps", type=int, default=2, help="(%(default)s)")
    add("--batch", type=int, default=1, help="(%(default)s)")
    add("--json", type=Path, help="write the figures there, after every run")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments``, by default the process's own, and return the exit status."""
    options = _parser().parse_args(arguments)
    runs: dict[float, list[dict[str, Any]]] = {percent: [] for percent in options.percent}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = plant(work, 0).rename(work / "base")
        builds = {percent: plant(work, percent) for percent in options.percent}
        for number in range(options.runs):
            for percent, build in builds.items():
                one = judge(build, base, options, work / "run.json")
                runs[percent].append(one)
                low, middle, high = one["ratio"]
                ratio = f"{middle:.3f}" if low is None else f"{middle:.3f} [{low:.3f}, {high:.3f}]"
                print(f"run {number + 1}, {percent:g}% slower: {one['verdict']}, {ratio}", flush=True)
                if options.json:
                    text = json.dumps({f"{percent:g}": each for percent, each in runs.items()}, indent=1)
                    options.json.write_text(text + "\n", encoding="utf-8")
    for percent, each in runs.items():
        counts = Counter(one["verdict"] for one in each)
        print(f"{percent:g}%: " + ", ".join(f"{counts[word]} {word}" for word in WORDS.values()))
    return 0 if meets_requirement({percent: [one["verdict"] for one in each] for percent, each in runs.items()}) else 1


def meets_requirement(verdicts: dict[float, list[str]]) -> bool:
    """True where slow-downs of 10% and more are REGRESSION in 95% of their runs, and smaller ones never."""
    for percent, words in verdicts.items():
        share = words.count("REGRESSION") / len(words)
        if (share < 0.95) if percent >= 10 else (share > 0):
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
