"""The result of a check: one JSON file, which is whole at every moment and which later calls complete.

A finding is one measurement or one file of tests. It is done when it has a result that no contender was late for.
What was cut short or failed is tried again by a later call, behind what was never tried; its old result stays so long.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CUT = "cut short"


class Findings:
    """The findings of `path` so far; every change of them is written before the method returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"runs": [], "findings": {}, "skipped": {}}
        self.read()

    def read(self) -> None:
        """Take over what another process has written."""
        if self.path.exists():
            self.content = json.loads(self.path.read_text())

    @property
    def run(self) -> int:
        """The number of the call that is under way."""
        return len(self.content["runs"]) - 1

    def open_run(self, facts: dict[str, Any]) -> None:
        """Begin a call on the machine that ``facts`` describe. Raises ValueError for the file of another GPU."""
        gpus = {json.dumps((run["gpu"] or {}).get("name")) for run in (*self.content["runs"], facts)}
        if len(gpus) > 1:
            raise ValueError(f"{self.path} has findings of several GPUs, {' and '.join(sorted(gpus))}: name another -o")
        self.content["runs"].append(facts)
        self.content["skipped"] = {}
        self.write()

    def pending(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that are not done and that this call has not tried, the least tried first."""
        known = self.content["findings"]
        todo = [name for name in names if name not in known or not _is_done(known[name])]
        todo = [name for name in todo if known.get(name, {}).get("tried") != self.run]
        return sorted(todo, key=lambda name: known.get(name, {}).get("attempts", 0))

    def start(self, name: str) -> None:
        """Note that a finding is being tried: whoever reads the file after a cut knows which it was."""
        entry = self.content["findings"].setdefault(name, {"attempts": 0})
        entry |= {"attempts": entry["attempts"] + 1, "tried": self.run, "failed": CUT}
        self.write()

    def finish(self, name: str, result: dict[str, Any], seconds: float) -> None:
        """Keep a result, unless there is one that fewer contenders were late for."""
        entry = self.content["findings"][name]
        del entry["failed"]
        if "result" not in entry or len(result.get("late", ())) <= len(entry["result"].get("late", ())):
            entry |= {"result": result, "run": self.run, "seconds": round(seconds, 1)}
        self.write()

    def fail(self, name: str, reason: str) -> None:
        """Keep the reason why a finding has no new result."""
        self.content["findings"][name]["failed"] = reason
        self.write()

    @property
    def failures(self) -> dict[str, str]:
        """Why findings failed, by their names; those that a limit cut short did not."""
        reasons = {name: entry.get("failed", CUT) for name, entry in self.content["findings"].items()}
        return {name: reason for name, reason in reasons.items() if reason != CUT}

    def explain(self, names: Iterable[str], reason: str) -> None:
        """Keep the reason why a process left one of ``names`` unfinished."""
        for name in names:
            entry = self.content["findings"].get(name, {})
            if entry.get("tried") == self.run and entry.get("failed") == CUT:
                self.fail(name, reason)

    def skip(self, part: str, reason: str) -> None:
        """Keep the reason why findings of a part were not tried."""
        self.content["skipped"][part] = reason
        self.write()

    def write(self) -> None:
        """Replace the file by what is known now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(draft, self.path)


def _is_done(entry: dict[str, Any]) -> bool:
    return "result" in entry and not entry["result"].get("late")
