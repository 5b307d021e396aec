"""TensorRT's log: it prints nothing, and an error names what TensorRT said of it."""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import Any

from cm_runtime.errors import EngineError, OutOfMemoryError

KEPT_LINES = 10_000
# Of TensorRT's messages, those of a want of memory; 5 is ErrorCodeTRT.FAILED_ALLOCATION
MEMORY = "out of memory", "outofmemory", "could not be allocated", "insufficient memory", "error code 5:"


@cache
def _listener(base: Any) -> Any:
    class Listener(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.forget()

        def forget(self) -> None:
            self.lines: deque[str] = deque(maxlen=KEPT_LINES)
            self._errors: deque[str] = deque(maxlen=KEPT_LINES)

        def log(self, severity: Any, message: str) -> None:
            if severity == base.Severity.VERBOSE:
                return
            self.lines.append(f"[{severity.name}] {message}")
            if severity in (base.Severity.ERROR, base.Severity.INTERNAL_ERROR):
                self._errors.append(" ".join(message.split()))

        def last(self) -> str:
            """The last error, on one line."""
            return self._errors[-1] if self._errors else "it gave no reason"

        def require(self, done: bool, what: str) -> None:
            """Raise EngineError if TensorRT has refused ``what``; OutOfMemoryError where it was for want of memory.

            The errors since the last call that was not refused are the reason.
            """
            if done:
                self._errors.clear()
                return
            causes = [each for each in self._errors if any(words in each.lower() for words in MEMORY)]
            reason = causes[-1] if causes else self.last()
            raise (OutOfMemoryError if causes else EngineError)(f"TensorRT refused {what}: {reason}")

    return Listener()


def listener(trt: Any) -> Any:
    """A `trt.ILogger` that prints nothing, and remembers what it hears from now on, without the chatter.

    There is one for all, since TensorRT keeps the first that a process gives it.
    """
    one = _listener(trt.ILogger)
    one.forget()
    return one
