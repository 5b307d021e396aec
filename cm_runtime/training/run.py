"""The run folder: what a run writes, so that it can be stopped at any moment, resumed and repeated.

config.toml      the whole configuration
state.pt         weights, optimiser, averages and position: what --resume goes on from
ckpt.pt          the averaged weights so far: what export and sample take
phase-N-METHOD.pt  the averaged weights at the end of phase N
log.jsonl        one line every few steps: phase, step, loss, learning rate, images/s
samples/         grids of the same noise as training goes on
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime import files, images
from cm_runtime.checkpoint import Checkpoint, load_plain, save_checkpoint, save_plain
from cm_runtime.errors import OutputError, TrainingError
from cm_runtime.training.config import TrainConfig, parse_config

STATE_FORMAT = "cm-runtime training state 1"


class RunFolder:
    """A folder that one run owns while it trains."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "ckpt.pt"
        self._state = path / "state.pt"

    @contextmanager
    def open(self, config: TrainConfig, *, resume: bool, force: bool) -> Iterator[dict[str, Any] | None]:
        """Owns the folder; yields the state to go on from, or None for a fresh start.

        Raises OutputError when another run is in it, or holds one already and neither resume nor force is given,
        and TrainingError when there is nothing to resume or the configuration is another.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OutputError(f"another run is training in {self.path}") from error
            if resume:
                yield self._resumed(config)
                return
            if not force and any((self._state.exists(), self.checkpoint.exists(), *self.path.glob("phase-*.pt"))):
                raise OutputError(f"{self.path} holds a run; go on with --resume, or start over with --force")
            self._clear()
            with files.written(self.path / "config.toml") as temporary:
                temporary.write_text(_toml(config), encoding="utf-8")
            yield None

    def save(self, state: dict[str, Any], checkpoint: Checkpoint) -> None:
        """Checkpoint first, then the state: a kill between the two loses nothing."""
        save_checkpoint(checkpoint, self.checkpoint)
        save_plain({"format": STATE_FORMAT, **state}, self._state)

    def keep(self, phase: int, method: str) -> None:
        """Sets the checkpoint of a finished phase aside."""
        with files.written(self.path / f"phase-{phase}-{method}.pt") as temporary:
            shutil.copyfile(self.checkpoint, temporary)

    def log(self, record: dict[str, Any]) -> None:
        """Appends one line to log.jsonl."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def grid(self, name: str, pictures: NDArray[np.uint8], text: dict[str, Any]) -> None:
        """Writes a sample grid."""
        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        images.save_png(images.grid(pictures), folder / f"{name}.png", text)

    def _resumed(self, config: TrainConfig) -> dict[str, Any]:
        if not self._state.exists():
            raise TrainingError(f"there is nothing to resume in {self.path}; start without --resume")
        state = load_plain(self._state)
        if state.get("format") != STATE_FORMAT:
            raise TrainingError(f"{self._state} is not a training state of this version")
        before = parse_config(state["config"], str(self._state))
        if changed := _changed(before.model_dump(), config.model_dump()):
            raise TrainingError(f"{self.path} was started with another {changed}; use the same config to resume")
        return state

    def _clear(self) -> None:
        for name in ("state.pt", "ckpt.pt", "log.jsonl", "config.toml"):
            (self.path / name).unlink(missing_ok=True)
        for old in self.path.glob("phase-*.pt"):
            old.unlink()
        shutil.rmtree(self.path / "samples", ignore_errors=True)


def _changed(before: Any, after: Any, key: str = "") -> str:
    """The first key whose value differs; where the data lies and how often to save may change."""
    if key in ("data.source", "device", "save_every", "sample_every") or before == after:
        return ""
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = [(str(k), before.get(k), after.get(k)) for k in {**before, **after}]
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple) and len(before) == len(after):
        pairs = [(str(i), b, a) for i, (b, a) in enumerate(zip(before, after, strict=True))]
    else:
        return key
    return next(filter(None, (_changed(b, a, f"{key}.{k}".lstrip(".")) for k, b, a in pairs)), key)


def _toml(config: TrainConfig) -> str:
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
