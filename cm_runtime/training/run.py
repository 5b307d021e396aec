"""The run folder: what a run writes, so that it can be stopped at any moment, resumed and repeated.

config.toml      the whole configuration
run.json         every start and resumption: command, versions, machine, checksums of data and init
state.pt         weights, target, optimiser, averages and position: what --resume goes on from
ckpt.pt          the averaged weights so far: what export and sample take
phase-N-METHOD.pt  the averaged weights at the end of phase N, from which the next one starts
log.jsonl        one line every few steps: phase, step, loss, learning rate, images/s
samples/         grids of the same noise as training goes on
tensorboard/     the same as curves over images seen, and the grids
"""

from __future__ import annotations

import fcntl
import json
import math
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
from cm_runtime.training.board import Board
from cm_runtime.training.config import TrainConfig, parse_config
from cm_runtime.workspaces import sweep

STATE_FORMAT = "cm-runtime training state 2"
STATE_KEYS = {"config", "inputs", "phase", "step", "images", "seconds", "model", "target", "optimizer", "ema"}
# Keys that a run may go on with changed: they decide where and when, not what.
NOTES = {
    "ect": "r nears t by stages and the weight 1/(t - r) grows with them: compare it within a stage only.",
    "ict": "The grid's points double and the weight 1/(t - r) grows with them: compare it between doublings only.",
    "ct": "The grid grows with the steps: this loss may rise while the images get better.",
}  # beside the curves of TensorBoard
FREE = ("data.source", "init", "device", "save_every", "sample_every", "tensorboard")


class RunFolder:
    """A folder that one run owns while it trains."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "ckpt.pt"
        self._state = path / "state.pt"
        self._log = path / "log.jsonl"
        self._sessions = path / "run.json"
        self._made_of: dict[str, Any] = {}
        self._board: Board | None = None
        self._noted: set[str] = set()

    @contextmanager
    def open(
        self, config: TrainConfig, inputs: dict[str, str], *, resume: bool, force: bool
    ) -> Iterator[dict[str, Any] | None]:
        """Owns the folder; yields the state to go on from, or None for a fresh start.

        inputs: {name: SHA-256} of what the run is made from. Raises OutputError when another run is in it, or it holds
        one already and neither resume nor force is given, and TrainingError when there is nothing to resume or the
        configuration or an input is another.
        """
        if resume and not self.path.exists():
            raise TrainingError(f"there is nothing to resume in {self.path}; start without --resume")
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
            self._made_of = {"config": config.model_dump(mode="json"), "inputs": inputs}
            if resume:
                state = self._resumed(config)
                self._sweep()
                with self._closing():
                    yield state
                return
            if not force and (found := [path.name for path in self._own() if path.exists()]):
                raise OutputError(f"{self.path} holds {found[0]}; go on with --resume, or start over with --force")
            self._clear()
            self._sweep()
            with files.written(self.path / "config.toml") as temporary:
                temporary.write_text(_toml(config), encoding="utf-8")
            with self._closing():
                yield None

    def begin(self, session: dict[str, Any], images: int, *, tensorboard: bool) -> None:
        """Notes in run.json that a start or resumption, as ``session`` tells, goes on from ``images`` seen."""
        sessions = []
        if self._sessions.exists():
            try:
                sessions = json.loads(self._sessions.read_text(encoding="utf-8"))
                if not isinstance(sessions, list):
                    raise TypeError
            except (OSError, ValueError, TypeError) as error:
                raise TrainingError(f"{self._sessions} is damaged; move it away") from error
        with files.written(self._sessions) as temporary:
            entry = {**session, "inputs": self._made_of["inputs"], "from_images": images}
            lines = json.dumps([*sessions, entry], indent=1)
            temporary.write_text(lines + "\n", encoding="utf-8")
        if tensorboard:
            self._board = Board(self.path / "tensorboard", images)

    def save(self, state: dict[str, Any], checkpoint: Checkpoint) -> None:
        """Checkpoint first, then the state: a kill between the two loses nothing."""
        save_checkpoint(checkpoint, self.checkpoint)
        save_plain({"format": STATE_FORMAT, **self._made_of, **state}, self._state)

    def kept(self, phase: int, method: str) -> Path:
        """Where the checkpoint of a finished phase is."""
        return self.path / f"phase-{phase}-{method}.pt"

    def keep(self, phase: int, method: str) -> None:
        """Sets the checkpoint of a finished phase aside, once: after a kill it may be of the next phase already."""
        target = self.kept(phase, method)
        if target.is_file():
            return
        with files.written(target) as temporary:
            shutil.copyfile(self.checkpoint, temporary)

    def log(self, record: dict[str, Any]) -> None:
        """Appends one line to log.jsonl, and a point to each curve."""
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OutputError(f"{self._log} cannot be written: {error.strerror or error}") from error
        if self._board:
            curves = {key: value for key, value in record.items() if isinstance(value, float) and key != "loss"}
            curve = f"loss/{record['method']}"  # a loss of one method says nothing beside another's
            curves[curve] = record["loss"]
            if (note := NOTES.get(record["method"])) and curve not in self._noted:
                self._noted.add(curve)
                self._board.note(curve, record["images"], note)
            self._board.scalars(record["images"], curves)

    def grid(self, name: str, pictures: NDArray[np.uint8], text: dict[str, Any]) -> None:
        """Writes a sample grid."""
        folder = self.path / "samples"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error
        picture = images.grid(pictures)
        images.save_png(picture, folder / f"{name}.png", text)
        if self._board:
            self._board.grid(text["images"], picture)

    @contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._board:
                self._board.close()

    def _resumed(self, config: TrainConfig) -> dict[str, Any]:
        if not self._state.exists():
            raise TrainingError(f"there is nothing to resume in {self.path}; start without --resume")
        state = load_plain(self._state)
        if state.get("format") != STATE_FORMAT:
            raise TrainingError(f"{self._state} is not a training state of this version")
        if missing := STATE_KEYS - state.keys():
            raise TrainingError(f"{self._state} is damaged: it has no {min(missing)}")
        before = parse_config(state["config"], str(self._state))
        if changed := _changed(before.model_dump(), config.model_dump()):
            raise TrainingError(f"{self.path} was started with another {changed}; use the same config to resume")
        for name, sha256 in self._made_of["inputs"].items():
            if state["inputs"].get(name) != sha256:
                raise TrainingError(f"{self.path} was started with another {name}; use the same to resume")
        self._forget_after(state["phase"], state["step"])
        return state

    def _forget_after(self, phase: int, step: int) -> None:
        """Drops the lines of steps that a killed run had logged and not saved: they come again."""
        if not self._log.exists():
            return
        lines = self._log.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _position(line) <= (phase, step)]
        if kept != lines:
            with files.written(self._log) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")

    def _own(self) -> list[Path]:
        """All that a run writes."""
        names = "state.pt", "ckpt.pt", "log.jsonl", "config.toml", "run.json", "samples", "tensorboard"
        return [*(self.path / name for name in names), *self.path.glob("phase-*.pt")]

    def _sweep(self) -> None:
        """Removes what a killed run had half written, of its own kinds."""
        sweep(self.path, (".pt", ".toml", ".jsonl", ".json"))
        sweep(self.path / "samples", (".png",))

    def _clear(self) -> None:
        for path in self._own():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _changed(before: Any, after: Any, key: str = "") -> str:
    """The first key whose value differs; where the data lies and how often to save may change."""
    if key in FREE or before == after:
        return ""
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = [(str(k), before.get(k), after.get(k)) for k in {**before, **after}]
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple) and len(before) == len(after):
        pairs = [(str(i), b, a) for i, (b, a) in enumerate(zip(before, after, strict=True))]
    else:
        return key
    return next(filter(None, (_changed(b, a, f"{key}.{k}".lstrip(".")) for k, b, a in pairs)), "")


def _position(line: str) -> tuple[float, float]:
    """(phase, step) of a log line; beyond every position where a kill cut it short."""
    try:
        record = json.loads(line)
        return record["phase"], record["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf, math.inf


def _toml(config: TrainConfig) -> str:
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
