"""Files of tests as findings: pytest on the GPU or in the host build, and under compute-sanitizer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from gpu.session import follow_parent
from gpu.survey import ROOT

# Without the project's settings, which ask for pytest-timeout and are strict about it.
PYTEST = (
    *("-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "--confcutdir", str(ROOT / "tests")),
    *("-o", f"pythonpath={ROOT / 'tests'}", "--import-mode", "importlib", "-p", "no:cacheprovider"),
    *("-q", "--no-header", "--tb", "line", "--disable-warnings"),
)
SANITIZED = "every_launch or in_place or beside"  # few tests, for each launch takes many times as long


def environment(where: str) -> dict[str, str]:
    """The environment of a run: this checkout in front of what PYTHONPATH has; kernels on the GPU or the host."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CM_RUNTIME_KERNELS": where}


def run(file: str, mark: str, where: str, seconds: float) -> dict[str, Any]:
    """Run the tests of ``file``, from tests/ on, that have ``mark``, all of them whatever fails.

    Raises RuntimeError where one fails, and where there are none or all are skipped.
    """
    words = [sys.executable, *PYTEST, *(["-m", mark] if mark else []), str(ROOT / "tests" / file)]
    return _read(words, where, seconds)


def run_sanitizer(file: str, tool: str, seconds: float) -> dict[str, Any]:
    """Run a few tests of ``file`` on the GPU under a tool of compute-sanitizer."""
    checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    words = [*checker, sys.executable, *PYTEST, "-k", SANITIZED, str(ROOT / "tests" / file)]
    return _read(words, "gpu", seconds)


def _read(words: Sequence[str], where: str, seconds: float) -> dict[str, Any]:
    options: Any = {"capture_output": True, "text": True, "env": environment(where), "cwd": ROOT}
    child = subprocess.run(words, timeout=max(seconds - 2, 1), preexec_fn=follow_parent, **options)
    lines = child.stdout.strip().splitlines() or ["pytest wrote nothing"]
    summary = next(
        (line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error|skipped)", line)), lines[-1]
    )
    if child.returncode or "passed" not in summary:
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
        raise RuntimeError(" | ".join([summary, *failures[:10], child.stderr[-300:].strip()]).replace("\n", " "))
    return {"where": where, "summary": summary.strip("= ")}
