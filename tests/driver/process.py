"""Subprocesses that find the stand-in where they look for CUDA's driver."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from driver.build import ROOT, library


@dataclass(frozen=True)
class Outcome:
    """A process that has ended; report: the stand-in's lines, "misuse ...", "unsupported ..." and "left ..."."""

    code: int
    out: str
    err: str
    report: tuple[str, ...]


def run_on_driver(
    what: str | Path,
    *arguments: str | Path,
    code: int = 0,
    allowed: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    sanitised: bool = False,
    **options: object,
) -> Outcome:
    """Run Python code, or a file of tests, in a process whose CUDA driver is the stand-in.

    arguments: of the code, or of pytest. environment: further variables. code: the exit status that it has to end
    with. allowed: beginnings of lines of the report that are no failure, such as "left 1 modules"; all others are, and
    so is a report without its end. options: see this package's documentation.
    """
    folder = library(sanitised)
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=sys"]
    words = [*pytest, str(what)] if isinstance(what, Path) else ["-c", dedent(what)]
    words = [sys.executable, *words, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report"
        variables = os.environ | (environment or {})
        variables |= {f"CM_DRIVER_{name.upper()}": str(value) for name, value in options.items()}
        libraries = os.pathsep.join(filter(None, [str(folder), variables.get("LD_LIBRARY_PATH", "")]))
        variables |= {"LD_LIBRARY_PATH": libraries, "CM_DRIVER_REPORT": str(report), "OMP_NUM_THREADS": "1"}
        paths = [str(ROOT), str(ROOT / "tests"), variables.get("PYTHONPATH", "")]
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if sanitised:
            variables |= _sanitiser_variables()
        done = subprocess.run(words, capture_output=True, text=True, env=variables)
        lines = report.read_text().splitlines() if report.exists() else []
    outcome = Outcome(done.returncode, done.stdout, done.stderr, tuple(line for line in lines if line != "end"))
    wrong = [line for line in outcome.report if not line.startswith(tuple(allowed))]
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == code, f"exit status {done.returncode}\n{said}\n" + "\n".join(lines)
    assert lines and lines[-1] == "end", f"the stand-in has not reported\n{said}"
    assert not wrong, "the stand-in reports:\n" + "\n".join(wrong) + f"\n{said}"
    return outcome


def _sanitiser_variables() -> dict[str, str]:
    """Python itself is not sanitised, so the sanitisers' library comes first, and Python's own leaks do not count."""
    found = [
        subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True) for name in ("libasan", "libubsan")
    ]
    options = "detect_leaks=0:handle_segv=0:allow_user_segv_handler=1"
    return {"LD_PRELOAD": " ".join(map(str.strip, found)), "ASAN_OPTIONS": options}
