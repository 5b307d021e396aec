"""The process that reads mutated files: ``python child.py FOLDER``, one JSON line of standard input after the other.

{"target": NAME, "first": 0, "count": 10} is answered by a line for each input as it is begun, and one for each that
ends in anything but a result or a CmRuntimeError of one line.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from mutations import mutate
from targets import TARGETS, Target

from cm_runtime.errors import LONGEST, CmRuntimeError

SECONDS = 10
MEMORY = 1 << 30  # bytes that one input may take beyond what the reader itself does


class TooLongError(BaseException):
    """Ten seconds are over. No reader catches it."""


def seeds(target: Target, folder: Path) -> list[Path]:
    """The target's real files, made once."""
    home = folder / target.name
    if not (home / "ready").exists():
        (home / "seeds").mkdir(parents=True, exist_ok=True)
        target.make(home / "seeds")
        (home / "ready").touch()
    return sorted((home / "seeds").iterdir())


def place(target: Target, originals: list[Path], number: int, folder: Path) -> Path:
    """The mutated file, or the folder that holds it."""
    random = Random(f"{target.name} {number}")
    source = random.choice(originals)
    whole = folder / target.name / "input" / source.name
    parts = sorted(each for each in source.rglob("*") if each.is_file()) if source.is_dir() else [source]
    for part in parts:
        copy = whole / part.relative_to(source) if source.is_dir() else whole
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(part.read_bytes())
    part = random.choice([each for each in parts if target.mutates(each)])
    others = [each.read_bytes() for each in originals if each.is_file() and each != source][:3]
    copy = whole / part.relative_to(source) if source.is_dir() else whole
    copy.write_bytes(mutate(part.read_bytes(), random, others))
    return whole


def attempt(target: Target, path: Path) -> dict[str, Any]:
    """How reading ended."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        target.read(path)
        return {}
    except CmRuntimeError as error:
        line = str(error)
        if "\n" in line or not line.strip() or len(line) > LONGEST + 20:
            return {"fault": "line", "what": f"{type(error).__name__} of {len(line)} characters: {line[:200]!r}"}
        return {}
    except TooLongError:
        return {"fault": "hang", "what": traceback.format_exc(limit=-3)}
    except MemoryError:
        return {"fault": "memory", "what": traceback.format_exc(limit=-4)}
    except Exception:
        return {"fault": "exception", "what": traceback.format_exc(limit=-4)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _too_long(*_: object) -> None:
    raise TooLongError


def _virtual_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> None:
    folder = Path(sys.argv[1])
    signal.signal(signal.SIGALRM, _too_long)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    for line in sys.stdin:
        order = json.loads(line)
        target = TARGETS[order["target"]]
        originals = seeds(target, folder)
        for original in originals:  # unlimited: what a reader imports is no input's; and real files are read
            target.read(original)
        resource.setrlimit(resource.RLIMIT_AS, (_virtual_memory() + MEMORY, hard))
        for number in range(order["first"], order["first"] + order["count"]):
            print(json.dumps({"begun": number}), flush=True)
            began = time.perf_counter()
            path = place(target, originals, number, folder)
            if outcome := attempt(target, path):
                took = round(time.perf_counter() - began, 1)
                print(json.dumps({"number": number, "seconds": took, "path": str(path), **outcome}), flush=True)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        print(json.dumps({"done": target.name}), flush=True)


if __name__ == "__main__":
    main()
