"""Processes that end, as by SIGKILL, just before one of the moments at which they change a folder."""

from __future__ import annotations

import gc
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate", "ctypes.dlsym"}
INSIDE = re.compile(r"/\.cm-[^/]+/")
KILLED, FAILED = 77, 78

Act = Callable[[Path], object]


def _is_change(event: str, arguments: tuple[Any, ...]) -> bool:
    """False for what happens inside of a workspace, or is done by shutil.rmtree: all that is one moment for others."""
    if event in ("open", "os.remove", "os.rmdir", "os.mkdir") and INSIDE.search(str(arguments[0])):
        return False
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
        return False
    if event == "open":
        _, mode, flags = arguments
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or bool(mode and {*mode} & {*"wax+"})
    return event in CHANGES


def runs(act: Act, folder: Path, changes: int | None = None) -> bool:
    """True if ``act(folder)`` ended well in a process of its own; False if its change number ``changes`` killed it."""
    child = os.fork()
    if child == 0:
        seen = 0

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if _is_change(event, arguments):
                seen += 1
                if seen == changes:
                    os._exit(KILLED)

        try:
            gc.disable()  # nothing of the parent's is closed here
            sys.addaudithook(audit)
            act(folder)
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(FAILED)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED), f"exit status {status}"
    return status == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def folders(before: Path, act: Act, scratch: Path) -> Iterator[Path]:
    """Copies of the folder ``before``, in each of which ``act`` was killed a change later."""
    for changes in range(1, 1000):
        folder = scratch / f"killed-{changes}"
        shutil.copytree(before, folder)
        if runs(act, folder, changes):
            assert changes > 2
            return
        yield folder
    raise AssertionError("it never ends")
