"""Reads mutated files with every reader of the package, in child processes with limits.

    python tests/fuzz/run.py --inputs 10000                     # shared evenly among the readers
    python tests/fuzz/run.py --reader pictures --first 417 --inputs 1

A failure is an input that ends a process, takes over ten seconds or a gigabyte, or ends in anything but a result or a
one-line error of ours. It is printed, its file is kept in --keep, and its number makes it again. Exit status 1 if any.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATIENCE = 30.0  # seconds without a word in which a child that hangs in compiled code is ended


@dataclass(frozen=True)
class Failure:
    """An input that no reader should have trouble with. fault: crash, hang, memory, exception or line."""

    reader: str
    number: int
    fault: str
    what: str

    def __str__(self) -> str:
        return f"{self.reader} {self.number}: {self.fault}: {self.what.strip()}"


class Child:
    """A process of child.py and its lines."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
        environment["XDG_CACHE_HOME"] = str(folder / "cache")
        self._log = (folder / "log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "child.py"), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def order(self, **what: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def line(self, seconds: float) -> dict[str, Any] | None:
        """The next line; None when the process has ended. Raises queue.Empty when none comes in time."""
        text = self._lines.get(timeout=seconds)
        return None if text is None else json.loads(text)

    def close(self) -> int:
        self.process.kill()
        self._log.close()
        return self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout
        for text in self.process.stdout:
            if text.startswith("{"):
                self._lines.put(text)
        self._lines.put(None)


def fuzz(readers: list[str], first: int, count: int, folder: Path, keep: Path | None = None) -> list[Failure]:
    """Failures among inputs ``first`` to ``first + count - 1`` of each reader.

    A child that dies or hangs costs one failure, and another goes on behind that input.
    """
    failures: list[Failure] = []
    child = Child(folder)
    for reader in readers:
        current, start = -1, first
        child.order(target=reader, first=start, count=count)
        while True:
            try:
                line = child.line(PATIENCE if current >= 0 else 300)
            except queue.Empty:
                line, fault = None, "hang"
            else:
                fault = "crash"
            if line is None:
                status = child.close()
                log = (folder / "log").read_text(errors="replace")[-2000:]
                if current < 0:
                    raise RuntimeError(f"{reader}: its real files cannot be read\n{log}")
                what = "no word for half a minute" if fault == "hang" else f"exit status {status}\n{log[-300:]}"
                failures.append(Failure(reader, current, fault, what))
                _keep(folder / reader / "input", keep, failures[-1])
                child, start = Child(folder), current + 1
                if start >= first + count:
                    break
                child.order(target=reader, first=start, count=first + count - start)
                current = -1
            elif "done" in line:
                break
            elif "begun" in line:
                current = line["begun"]
            else:
                failures.append(Failure(reader, line["number"], line["fault"], line["what"]))
                _keep(Path(line["path"]), keep, failures[-1])
    child.close()
    return failures


def _keep(path: Path, keep: Path | None, failure: Failure) -> None:
    if keep is None or not path.exists():
        return
    target = keep / f"{failure.reader}-{failure.number}" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(path, target)


def main() -> int:
    sys.path.insert(0, str(HERE.parent))
    sys.path.insert(0, str(HERE))
    sys.path.insert(0, str(HERE.parents[1]))
    from targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="in all")
    parser.add_argument("--first", type=int, default=0, help="number of each reader's first input")
    parser.add_argument("--reader", action="append", choices=sorted(TARGETS), help="only this; may be given again")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="folder for inputs that fail")
    options = parser.parse_args()
    readers = options.reader or list(TARGETS)
    each = -(-options.inputs // len(readers))
    total = 0
    with tempfile.TemporaryDirectory(prefix="cm-fuzz-") as folder:
        for reader in readers:
            failures = fuzz([reader], options.first, each, Path(folder), options.keep)
            total += len(failures)
            print(f"{reader}: {each} inputs, {len(failures)} failures", flush=True)
            for failure in failures[:20]:
                print(f"  {failure}".replace("\n", "\n    "), flush=True)
    print(f"{each * len(readers)} inputs, {total} failures")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
