"""Plant faults in copies of a checkout, one at a time, and see which tests notice.

    python tests/faults/run.py                                  # every fault, with the test files that it names
    python tests/faults/run.py --only "clamp into a copy" --full -o result.json

A fault is killed by the first test that fails with it and passes without it. With --full a fault that survives its own
test files meets all quick tests. Exit status: 0 if all are killed, 1 if not, 2 if the list does not fit the tree.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from catalogue import Fault, errors, load, place, sources, tracked

HERE = Path(__file__).resolve()
COPIES = 2  # faults at a time
LIMIT = 300.0  # seconds for a fault's own test files
LONG_LIMIT = 3600.0  # and for all tests
TIERS = "not slow and not gpu and not tensorrt"
# Tests that compare sources with what is recorded of them: any change fails there
RECORDS = ("test_built.py", "test_faults.py")
WORKERS = ("-n", "2", "--dist", "worksteal")


@dataclass(frozen=True)
class Outcome:
    """The end of one fault. verdict: killed, survived, or invalid: the tests did not start with it, or did not end."""

    name: str
    verdict: str
    test: str
    seconds: float

    def __str__(self) -> str:
        end = {"killed": f"killed by {self.test}", "survived": "SURVIVED", "invalid": f"INVALID: {self.test}"}
        return f"{self.name}: {end[self.verdict]} ({self.seconds:.0f} s)"


class Copy:
    """A copy of a checkout's tracked files, in which tests run."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self.tree = folder / "tree"
        self._temporary = folder / "temporary"
        self._temporary.mkdir(parents=True)
        for name in tracked(tree):
            target = self.tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, target, follow_symlinks=False)
        self.sources = sources(self.tree)
        tests = [path.relative_to(self.tree).as_posix() for path in self.tree.glob("tests/**/test_*.py")]
        self.tests = sorted(tests, key=lambda path: (path.count("/"), path))  # those of kernels, built first, are slow
        product = self._python(["-c", "import cm_runtime; print(cm_runtime.__file__)"], 60)[1].strip()
        if not Path(product).is_relative_to(self.tree):
            raise SystemExit(f"the tests would run {product}, which is not the copy in {self.tree}")

    def files(self, names: Sequence[str]) -> list[str]:
        """The paths of test files, by their names and in their order."""
        return [path for name in dict.fromkeys(names) for path in self.tests if Path(path).match(name)]

    def write(self, path: str, content: str) -> None:
        """Write a source file, and forget its bytecode: two versions may have one size and one time."""
        target = self.tree / path
        target.write_text(content, encoding="utf-8")
        Path(importlib.util.cache_from_source(target)).unlink(missing_ok=True)

    def failures(
        self, paths: Sequence[str], without: Sequence[str], limit: float, *options: str
    ) -> tuple[list[str], str]:
        """The tests that fail among those of ``paths``, and an error where they could not run to their end."""
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", TIERS, "--tb=no", "-rfE", *options]
        words += [f"--ignore-glob=*/{name}" for name in RECORDS] + [f"--deselect={test}" for test in without]
        status, output = self._python([*words, *paths], limit)
        lines = [line.split(" ", 1)[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        failed = [line.split(" - ")[0] for line in lines]
        if status is None:
            return failed, "" if failed else f"no failure within {limit:.0f} s"
        if any("::" not in test for test in failed) or (status != 0 and not failed):
            return [], " ".join(["pytest ended with", str(status), *output.splitlines()[-3:]])
        return failed, ""

    def _python(self, words: Sequence[str], limit: float) -> tuple[int | None, str]:
        """The exit status, None after ``limit`` seconds, and the output of a Python process that sees this copy."""
        environment = {**os.environ, "PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
        environment["PYTEST_DEBUG_TEMPROOT"] = str(self._temporary)
        environment.pop("PYTEST_ADDOPTS", None)
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=self.tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, output


def plant(copy: Copy, fault: Fault, without: Sequence[str], *, limit: float = LIMIT, full: bool = False) -> Outcome:
    """Run a fault's own test files with it, or all tests."""
    begin = time.monotonic()
    path = place(fault, copy.sources)
    content = copy.sources[path]
    copy.write(path, content.replace(fault.find, fault.replace))
    try:
        if full:
            failed, error = copy.failures(["tests"], without, LONG_LIMIT, "-x", *WORKERS)
        else:
            failed, error = copy.failures(copy.files(fault.tests), without, limit, "-x")
    finally:
        copy.write(path, content)
    verdict = "invalid" if error else "killed" if failed else "survived"
    return Outcome(fault.name, verdict, error or (failed[0] if failed else ""), round(time.monotonic() - begin, 1))


def unsound(copy: Copy, tests: Sequence[str]) -> list[str]:
    """Those of ``tests`` that fail in a copy without a fault, and so can kill none."""
    failed, error = copy.failures(tests, (), LONG_LIMIT, *WORKERS)
    if error:
        raise SystemExit(f"the tests do not run in a copy without a fault: {error}")
    for test in failed:
        print(f"left out, since it fails without a fault: {test}", flush=True)
    return failed


def run(
    tree: Path, faults: Sequence[Fault], *, limit: float = LIMIT, full: bool = False
) -> tuple[list[Outcome], list[str]]:
    """Plant all ``faults``, a few at a time; the outcomes in their order, and the tests that were left out.

    The tests that killed then run without a fault; where one fails, its faults are planted again without it.
    """
    outcomes: dict[str, Outcome] = {}
    without: list[str] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        copies: queue.Queue[Copy] = queue.Queue()
        for i in range(COPIES):
            copies.put(Copy(tree, Path(folder, str(i))))

        def one(fault: Fault) -> None:
            copy = copies.get()
            try:
                outcomes[fault.name] = plant(copy, fault, without, limit=limit)
            finally:
                copies.put(copy)
            print(outcomes[fault.name], flush=True)

        remaining = list(faults)
        while remaining:
            with ThreadPoolExecutor(COPIES) as pool:
                try:
                    list(pool.map(one, remaining))
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
            killers = {outcomes[fault.name].test for fault in remaining if outcomes[fault.name].verdict == "killed"}
            copy = copies.get()
            wrong = unsound(copy, sorted(killers)) if killers else []
            copies.put(copy)
            without += wrong
            remaining = [fault for fault in remaining if outcomes[fault.name].test in wrong]
        survivors = [fault for fault in faults if outcomes[fault.name].verdict == "survived"]
        if full and survivors:
            print("survivors, with all quick tests:", flush=True)
            copy = copies.get()
            without += unsound(copy, ["tests"])
            for fault in survivors:
                outcomes[fault.name] = plant(copy, fault, without, full=True)
                print(outcomes[fault.name], flush=True)
    return [outcomes[fault.name] for fault in faults], without


def main() -> int:
    """Parse the words, plant the faults, print and store their outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=HERE.parents[2], help="the checkout; default: this one")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        metavar="SECONDS",
        help="for a fault's own test files; default: %(default)g",
    )
    parser.add_argument("--full", action="store_true", help="survivors meet all quick tests")
    parser.add_argument("-o", "--output", type=Path, help="store the outcomes as JSON")
    words = parser.parse_args()
    begin, tree, faults = time.monotonic(), words.tree.resolve(), load()
    reasons = errors(faults, sources(tree), list(tree.glob("tests/**/test_*.py")))
    reasons += [f"there is no fault {name!r}" for name in words.only or () if name not in {f.name for f in faults}]
    if reasons:
        print("\n".join(reasons), file=sys.stderr)
        return 2
    if words.only:
        faults = [fault for fault in faults if fault.name in words.only]
    outcomes, without = run(tree, faults, limit=words.limit, full=words.full)
    killed = sum(outcome.verdict == "killed" for outcome in outcomes)
    seconds = round(time.monotonic() - begin)
    print(f"{killed} of {len(faults)} faults killed, {killed / len(faults):.1%}, in {seconds} s")
    if words.output:
        commit = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True)
        result = {
            "commit": commit.stdout.strip(),
            "killed": killed,
            "count": len(faults),
            "seconds": seconds,
            "left_out": without,
            "faults": [asdict(outcome) for outcome in outcomes],
        }
        words.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if killed == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
