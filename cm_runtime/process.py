"""What a process of ours that ended leaves to say."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import IO, Any


def epitaph(process: subprocess.Popen[Any], said: IO[bytes]) -> str:
    """How it ended, "was ended by SIGKILL; ..." or "ended with status 1: ...", with the last line it ``said``."""
    status = process.wait()
    said.seek(max(0, said.seek(0, os.SEEK_END) - 2000))
    lines = said.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if status < 0:
        reason = "; was there too little memory?" if status == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-status).name}{reason}"
    return f"ended with status {status}" + (f": {last}" if last else "")
