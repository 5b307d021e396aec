"""The run folder: the files of a run, by which it can be stopped at any moment, resumed and repeated.

config.toml      the whole configuration
run.json         every start and resumption: command, versions, machine, checksums of data and init
state.pt         weights, target, optimiser, averages and position, from which --resume goes on
ckpt.pt          the averaged weights so far, for export and sample
phase-N-METHOD.pt  the averaged weights at the end of phase N, from which the next one starts
log.jsonl        one line every few steps: phase, step, loss, learning rate, images/s
samples/         grids of the same noise as training goes on
tensorboard/     the same as curves over images seen, and the grids
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.checkpoints.native import Checkpoint, save_checkpoint, save_plain
from cm_runtime.errors import OutputError, TrainingError
from cm_runtime.errors.reasons import output_errors
from cm_runtime.files import atomic, image_writer, streams
from cm_runtime.files.locks import try_lock
from cm_runtime.files.workspaces import sweep
from cm_runtime.training.config import TrainConfig
from cm_runtime.training.state import STATE_FORMAT, read_state
from cm_runtime.training.tensorboard import Board

MOST_LOG = 1 << 28  # bytes
MOST_SESSIONS = 1 << 26
NOTES = {
    "ect": "r nears t by stages and the weight 1/(t - r) grows with them: compare it within a stage only.",
    "ict": "The grid's points double and the weight 1/(t - r) grows with them: compare it between doublings only.",
    "ct": "The grid grows with the steps: this loss may rise while the images get better.",
}  # beside the curves of TensorBoard
# Keys that a resumed run may change: they decide where and when, not what.
FREE = ("data.source", "init", "device", "save_every", "sample_every", "tensorboard")


class RunFolder:
    """A folder that one run owns while it trains. inputs: {name: SHA-256} of data and init."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "ckpt.pt"
        self.state = path / "state.pt"
        self._log = path / "log.jsonl"
        self._session_file = path / "run.json"
        self.inputs: dict[str, str] = {}
        self._config: dict[str, Any] = {}
        self._sessions: list[dict[str, Any]] = []
        self._lines: bytes | None = None  # of the log, if some must go
        self._board: Board | None = None
        self._curves_with_note: set[str] = set()

    @contextmanager
    def open(
        self, config: TrainConfig, inputs: dict[str, str], *, resume: bool, force: bool
    ) -> Iterator[dict[str, Any] | None]:
        """Own the folder; yield the state to go on from, or None for a fresh start.

        Raises OutputError if another run is in it, or it holds a run and neither resume nor force is set. Raises
        TrainingError if there is nothing to resume, or the configuration or an input is another.
        """
        if resume and not self.path.exists():
            raise TrainingError(f"there is nothing to resume in {self.path}; start without --resume")
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC  # no pipe is waited for, no link emptied
            lock = os.fdopen(os.open(self.path / ".lock", flags, 0o666), "rb")
        with lock:
            if not try_lock(lock):
                raise OutputError(f"another run is training in {self.path}")
            self._config, self.inputs = config.model_dump(mode="json"), inputs
            state = self._read_state(config) if resume else None
            if not resume:
                self._clear(force)
                with atomic.write(self.path / "config.toml") as temporary:
                    temporary.write_text(_toml(config), encoding="utf-8")
            self._sweep()
            try:
                yield state
            finally:
                if self._board:
                    self._board.close()

    def begin(self, session: dict[str, Any], images: int, *, tensorboard: bool) -> None:
        """Append ``session``, a start or resumption after ``images``, to run.json.

        The log loses the lines of steps that a killed run had logged and not saved: they are repeated.
        """
        if self._lines is not None:
            with atomic.write(self._log) as temporary:
                temporary.write_bytes(self._lines)
        with atomic.write(self._session_file) as temporary:
            entry = {**session, "inputs": self.inputs, "from_images": images}
            lines = json.dumps([*self._sessions, entry], indent=1)
            temporary.write_text(lines + "\n", encoding="utf-8")
        if tensorboard:
            self._board = Board(self.path / "tensorboard", images)

    def save(self, state: dict[str, Any], checkpoint: Checkpoint) -> None:
        """Save the checkpoint, then the state: a kill between the two loses nothing."""
        save_checkpoint(checkpoint, self.checkpoint)
        save_plain({"format": STATE_FORMAT, "config": self._config, "inputs": self.inputs, **state}, self.state)

    def phase_checkpoint(self, phase: int, method: str) -> Path:
        """Path of the checkpoint of a finished phase."""
        return self.path / f"phase-{phase}-{method}.pt"

    def keep(self, phase: int, method: str) -> None:
        """Copy the checkpoint of a finished phase, once: after a kill ckpt.pt may be of the next phase already."""
        target = self.phase_checkpoint(phase, method)
        if target.is_file():
            return
        with atomic.write(target) as temporary:
            shutil.copyfile(self.checkpoint, temporary)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to log.jsonl, and a point to each curve."""
        with output_errors(self._log), self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._board:
            curves = {key: value for key, value in record.items() if isinstance(value, float) and key != "loss"}
            curve = f"loss/{record['method']}"  # losses of two methods do not compare
            curves[curve] = record["loss"]
            if (note := NOTES.get(record["method"])) and curve not in self._curves_with_note:
                self._curves_with_note.add(curve)
                self._board.note(curve, record["images"], note)
            self._board.scalars(record["images"], curves)

    def grid(self, name: str, pictures: NDArray[np.uint8], text: dict[str, Any]) -> None:
        """Write a sample grid."""
        folder = self.path / "samples"
        with output_errors(folder):
            folder.mkdir(exist_ok=True)
        picture = image_writer.grid(pictures)
        image_writer.save_png(picture, folder / f"{name}.png", text)
        if self._board:
            self._board.grid(text["images"], picture)

    def _read_state(self, config: TrainConfig) -> dict[str, Any]:
        """Read the state, and check all that a resumption reads."""
        if not streams.exists(self.state):
            raise TrainingError(f"there is nothing to resume in {self.path}; start without --resume")
        state, saved_config = read_state(self.state)
        if key := _difference(saved_config.model_dump(), config.model_dump()):
            raise TrainingError(f"{self.path} was started with another {key}; use the same config to resume")
        for name, sha256 in self.inputs.items():
            if state["inputs"].get(name) != sha256:
                raise TrainingError(f"{self.path} was started with another {name}; use the same to resume")
        self._sessions = self._read_sessions()
        self._lines = self._lines_up_to((state["phase"], state["step"]))
        return state

    def _read_sessions(self) -> list[dict[str, Any]]:
        """Read the sessions in run.json."""
        path = self._session_file
        if not streams.exists(path):
            return []
        try:
            sessions = json.loads(streams.read_bytes(path, TrainingError, MOST_SESSIONS))
            json.dumps(sessions, indent=1)  # which nests less deeply than it reads
        except (ValueError, RecursionError) as error:
            raise TrainingError(f"{path} is damaged: it is no JSON; move it away") from error
        if not isinstance(sessions, list) or not all(isinstance(each, dict) for each in sessions):
            raise TrainingError(f"{path} is damaged: it is no list of sessions; move it away")
        return sessions

    def _lines_up_to(self, position: tuple[int, int]) -> bytes | None:
        """The log without the lines of later steps; None if it has none. A kill may have cut the last line."""
        if not streams.exists(self._log):
            return None
        content = streams.read_bytes(self._log, TrainingError, MOST_LOG)
        lines = content.splitlines(keepends=True)
        earlier = []
        for number, line in enumerate(lines, 1):
            at = _position(line)
            if at is None and number < len(lines):
                raise TrainingError(f"{self._log} is damaged: line {number} is none that a run writes; move it away")
            if at is not None and at <= position:
                earlier.append(line)
        return None if len(earlier) == len(lines) else b"".join(earlier)

    def _outputs(self) -> list[Path]:
        """Paths of all that a run writes."""
        names = "state.pt", "ckpt.pt", "log.jsonl", "config.toml", "run.json", "samples", "tensorboard"
        return [*(self.path / name for name in names), *self.path.glob("phase-*.pt")]

    def _sweep(self) -> None:
        """Remove the drafts of a killed run, of the kinds that a run writes."""
        sweep(self.path, (".pt", ".toml", ".jsonl", ".json"))
        sweep(self.path / "samples", (".png",))

    def _clear(self, force: bool) -> None:
        """Remove an earlier run. Raises OutputError if there is one, unless ``force``."""
        if not force and (names := [path.name for path in self._outputs() if path.exists()]):
            raise OutputError(f"{self.path} holds {names[0]}; go on with --resume, or start over with --force")
        for path in self._outputs():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _difference(a: Any, b: Any, key: str = "") -> str:
    """Name the first key whose value differs, "" if none; those in FREE may."""
    if key in FREE or a == b:
        return ""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(str(k), a.get(k), b.get(k)) for k in {**a, **b}]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(a, b, strict=True))]
    else:
        return key
    return next(filter(None, (_difference(x, y, f"{key}.{k}".lstrip(".")) for k, x, y in pairs)), "")


def _position(line: bytes) -> tuple[int, int] | None:
    """Parse (phase, step) of a log line; None if it is no such line, or was cut short."""
    try:
        record = json.loads(line.decode())
        phase, step = record["phase"], record["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (phase, step) if type(phase) is int and type(step) is int and line.endswith(b"\n") else None


def _toml(config: TrainConfig) -> str:
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
