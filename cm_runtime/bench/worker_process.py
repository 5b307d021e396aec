"""Worker processes and the requests to them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cm_runtime.errors import EngineError
from cm_runtime.extras import privacy
from cm_runtime.subprocesses import PythonChild

WORKER = Path(__file__).with_name("worker.py")
HERE = Path(__file__).resolve().parents[2]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class WorkerError(EngineError):
    """A worker's request failed. is_absence: for lack of a package, or of a model that it can run."""

    def __init__(self, text: str, is_absence: bool = False) -> None:
        super().__init__(text)
        self.is_absence = is_absence


class Process:
    """A worker. root: the folder that holds the ``cm_runtime`` to run, by default this one."""

    def __init__(self, threads: int, root: Path = HERE) -> None:
        silence = privacy("onnxruntime", "diffusers")  # in builds, too, that do not know of it
        environment = {**os.environ, **silence, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
        self._child = PythonChild([str(WORKER)], root, environment)

    @property
    def pid(self) -> int:
        return self._child.process.pid

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        """The answer of the worker's method ``do``. Raises WorkerError."""
        self._child.send(json.dumps({"do": do, **options}))
        line = self._child.lines.readline()
        if not line:
            raise WorkerError(f"its process {self._child.explain_exit()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"], is_absence=answer["is_absence"])
        return answer

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._child.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
