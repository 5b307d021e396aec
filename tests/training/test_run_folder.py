"""The run folder: who may write in it, what it refuses, and that it takes nothing that is not its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cm_runtime.checkpoints.native import Checkpoint, load_plain, read_checkpoint
from cm_runtime.errors import CmRuntimeError, OutputError, TrainingError
from cm_runtime.files import atomic
from cm_runtime.manifest import TrainingSummary
from cm_runtime.networks.consistency import ModelConfig, build
from cm_runtime.networks.unet import UNetConfig
from cm_runtime.training import loop, provenance
from cm_runtime.training.config import TrainConfig, load_config
from cm_runtime.training.data.image_set import ImageSet
from cm_runtime.training.distributed import Workers
from cm_runtime.training.run_folder import RunFolder
from cm_runtime.training.state import STATE_KEYS

Config = Callable[..., TrainConfig]
INPUTS = {"data": "0" * 64, "init": ""}

NETWORK = UNetConfig(channels=32, channel_mult=(1,), res_blocks=1, head_channels=32, image_size=4, image_channels=1)


def checkpoint(method: str = "edm", steps: int = 1) -> Checkpoint:
    config = ModelConfig(network=NETWORK, precond="edm", sigma_boundary=0.0)
    summary = TrainingSummary(method=method, data="toy", steps=steps, images=1, seconds=1.0)
    return Checkpoint(config, "0.5", {"0.5": build(config).state_dict()}, summary)


Finished = Callable[[Path], None]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_config: Config, toy_images: ImageSet) -> Iterator[Finished]:
    """Makes a folder hold what a run of tiny_config() leaves."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "GRID_IMAGES", 4)
        patch.setattr(provenance, "fingerprint", lambda data: INPUTS["data"])
        loop.train(tiny_config(), toy_images, run)

    def copied(path: Path) -> None:
        shutil.copytree(run, path, dirs_exist_ok=True)

    yield copied


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def opened(path: Path, config: TrainConfig, *, resume: bool = False, force: bool = False) -> dict[str, Any] | None:
    with RunFolder(path).open(config, INPUTS, resume=resume, force=force) as state:
        return state


# fresh folders


def test_a_fresh_folder_is_made_with_its_parents_and_holds_the_whole_configuration(
    tmp_path: Path, tiny_config: Config
) -> None:
    config = tiny_config(
        edm={"learning_rate": 1.2345678901234567e-5, "ema": [0.9, 0.99]},
        network={"attention": [4]},
        data={"image_size": 8, "source": 'a "quoted" \\ päth'},
        seed=(1 << 63) - 1,
    )
    assert opened(tmp_path / "a" / "b", config) is None
    assert load_config(tmp_path / "a" / "b" / "config.toml") == config


@pytest.mark.process
def test_what_a_run_writes_can_be_read_back(tmp_path: Path, tiny_config: Config, finished: Finished) -> None:
    finished(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    with folder.open(tiny_config(), INPUTS, resume=True, force=False):
        folder.save({"phase": 1, "step": 9}, checkpoint(steps=9))
        folder.log({"step": 9, "images": 9})
        folder.keep(7, "edm")
        folder.grid("9", np.zeros((4, 8, 8, 1), np.uint8), {"seed": 9, "images": 9})
    assert read_checkpoint(folder.checkpoint).training.steps == 9
    assert load_plain(tmp_path / "run" / "state.pt")["step"] == 9
    assert (tmp_path / "run" / "phase-7-edm.pt").read_bytes() == folder.checkpoint.read_bytes()
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1]) == {"step": 9, "images": 9}
    with Image.open(tmp_path / "run" / "samples" / "9.png") as picture:
        assert (picture.size, picture.mode, picture.format) == ((16, 16), "L", "PNG")
        assert json.loads(picture.text["cm_runtime"]) == {"seed": 9, "images": 9}  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere/run", "/dev/null"])
def test_a_folder_that_cannot_be_made_is_refused_by_name(tmp_path: Path, tiny_config: Config, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError) as caught:
        opened(tmp_path / place, tiny_config())
    assert str(tmp_path / place) in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


# damage


def resumed(path: Path, config: TrainConfig, data: ImageSet, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loop, "GRID_IMAGES", 1)
    patch.setattr(provenance, "fingerprint", lambda data: INPUTS["data"])
    loop.train(config, data, path, resume=True)


def _moments(state: dict[str, Any], **changes: Any) -> None:
    state["optimizer"]["state"][0] |= changes


@pytest.mark.process
@pytest.mark.parametrize(
    ("damage", "wrong"),
    [
        (lambda state: state.update(format=torch.zeros(2)), "not a training state of this version"),
        (lambda state: state.update(config=1), "config"),
        (lambda state: state["config"]["phase"][1].update(stages=10**400), "a whole number of 1329 bits"),
        (lambda state: state.update(inputs=1), "its inputs are no checksums"),
        (lambda state: state.update(phase="x"), "its phase is none of the configuration's"),
        (lambda state: state.update(phase=2), "its phase is none of the configuration's"),
        (lambda state: state.update(step=10**12), "its step is none of phase 1"),
        (lambda state: state.update(step=-1), "its step is none of phase 1"),
        (lambda state: state.update(step=True), "its step is none of phase 1"),
        (lambda state: state.update(images=10**12), "it counts other images than the 24 up to its step"),
        (lambda state: state.update(seconds=float("nan")), "its seconds are no time"),
        (lambda state: state.update(seconds=10**400), "a whole number of 1329 bits"),
        (lambda state: state["optimizer"]["state"][0]["exp_avg"].fill_(float("nan")), "not dense, or not finite"),
        (lambda state: state.update(model=1), "its weights are not a state dict"),
        (lambda state: state["model"].popitem(), "its weights do not fit: missing"),
        (lambda state: state["model"].update({"F.out.2.bias": torch.zeros(3)}), "F.out.2.bias is"),
        (lambda state: next(iter(state["model"].values())).fill_(float("nan")), "is not finite"),
        (lambda state: state.update(ema={}), "it has no average of rate 0.5"),
        (lambda state: state.update(ema={"0.5": []}), "its weights are not a state dict"),
        (lambda state: state.update(optimizer=1), "its optimizer has no state"),
        (lambda state: state["optimizer"]["state"].update(x={}), "its optimizer is of another network"),
        (lambda state: state["optimizer"]["state"][0].pop("exp_avg"), "moments of tensor 0 are not complete"),
        (lambda state: _moments(state, exp_avg=torch.zeros(())), "exp_avg of tensor 0 does not fit"),
        (lambda state: _moments(state, step=torch.zeros((), dtype=torch.int64)), "step of tensor 0 does not fit"),
    ],
)
def test_a_damaged_state_is_refused_before_anything_is_written(
    tmp_path: Path,
    tiny_config: Config,
    toy_images: ImageSet,
    finished: Finished,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[dict[str, Any]], object],
    wrong: str,
) -> None:
    finished(tmp_path)
    state = load_plain(tmp_path / "state.pt")
    damage(state)
    torch.save(state, tmp_path / "state.pt")
    before = contents(tmp_path)
    with pytest.raises(TrainingError) as caught:
        resumed(tmp_path, tiny_config(), toy_images, monkeypatch)
    line = str(caught.value)
    assert wrong in line and str(tmp_path / "state.pt") in line and line.endswith("start anew with --force")
    assert contents(tmp_path) == before


@pytest.mark.process
@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ([b"\xff\n"], "line 1"),
        ([b"x\n"], "line 1"),
        ([b"[" * 100_000 + b"\n"], "line 1"),
        ([b'{"phase": "x", "step": 0}\n'], "line 1"),
        ([b'{"phase": 0, "step": 1' + b"0" * 5000 + b"}\n"], "line 1"),
    ],
)
def test_a_damaged_line_of_the_log_is_refused_unless_a_kill_left_it(
    tmp_path: Path, tiny_config: Config, finished: Finished, lines: list[bytes], wrong: str
) -> None:
    finished(tmp_path)
    log = tmp_path / "log.jsonl"
    good = log.read_bytes()
    log.write_bytes(b"".join(lines) + good)
    before = contents(tmp_path)
    with pytest.raises(TrainingError, match=rf"log\.jsonl is damaged: {wrong}.*move it away"):
        opened(tmp_path, tiny_config(), resume=True)
    assert contents(tmp_path) == before
    log.write_bytes(good + lines[0][:-1])
    folder = RunFolder(tmp_path)
    with folder.open(tiny_config(), INPUTS, resume=True, force=False):
        folder.begin({}, 24, tensorboard=False)
    assert log.read_bytes() == good


@pytest.mark.parametrize("name", ["state.pt", "log.jsonl", "run.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_special_files_in_a_run_folder_are_not_read(
    tmp_path: Path, tiny_config: Config, finished: Finished, name: str, kind: str
) -> None:
    finished(tmp_path)
    (tmp_path / name).unlink()
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(CmRuntimeError, match=f"{name}.*{kind}"):
        opened(tmp_path, tiny_config(), resume=True)


def test_the_lock_empties_no_file_that_it_is_a_link_to(tmp_path: Path, tiny_config: Config) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    opened(tmp_path / "run", tiny_config())
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.process
@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 30), marks=pytest.mark.slow)], ids=str)
def test_random_damage_ends_in_one_line_or_in_a_run(
    seeds: range,
    tmp_path: Path,
    tiny_config: Config,
    toy_images: ImageSet,
    finished: Finished,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed in seeds:
        rng, run = np.random.default_rng(seed), tmp_path / str(seed)
        finished(run)
        path = run / ("state.pt", "log.jsonl", "run.json")[seed % 3]
        content = bytearray(path.read_bytes())
        for place in rng.integers(0, len(content), 4):
            content[place] = rng.integers(256)
        path.write_bytes(content[: rng.integers(1, len(content) + 1)] if seed % 2 else content)
        before = contents(run)
        try:
            resumed(run, tiny_config(), toy_images, monkeypatch)
        except CmRuntimeError as error:
            assert str(run) in str(error) and "\n" not in str(error)
            assert contents(run) == before
        shutil.rmtree(run)


# what lies there already


def test_a_run_is_neither_overwritten_nor_touched_without_resume_or_force(
    tmp_path: Path, tiny_config: Config, finished: Finished
) -> None:
    finished(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(OutputError, match=r"--resume.*--force"):
        opened(tmp_path / "run", tiny_config())
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    "name", ["ckpt.pt", "state.pt", "phase-0-edm.pt", "samples/mine.png", "log.jsonl", "config.toml"]
)
def test_files_of_somebody_else_are_not_taken_without_force(tmp_path: Path, tiny_config: Config, name: str) -> None:
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with suppress(OutputError):
        opened(tmp_path, tiny_config())
    assert mine.read_text() == "mine"


def test_force_starts_over_and_leaves_other_files_alone(
    tmp_path: Path, tiny_config: Config, finished: Finished
) -> None:
    finished(tmp_path / "run")
    for name in ("notes.txt", "model.onnx", "phase.txt"):
        (tmp_path / "run" / name).write_text("mine")
    assert opened(tmp_path / "run", tiny_config(seed=5), force=True) is None
    assert set(contents(tmp_path / "run")) == {".lock", "config.toml", "notes.txt", "model.onnx", "phase.txt"}
    assert load_config(tmp_path / "run" / "config.toml").seed == 5


def test_force_on_an_empty_folder_is_a_fresh_start(tmp_path: Path, tiny_config: Config) -> None:
    assert opened(tmp_path, tiny_config(), force=True) is None


@pytest.mark.parametrize("how", [{"resume": True}, {"force": True}])
def test_what_a_killed_run_was_writing_is_swept_up(
    tmp_path: Path, tiny_config: Config, finished: Finished, how: dict[str, bool]
) -> None:
    class Killed(BaseException):
        pass

    finished(tmp_path)
    names: list[Path] = []
    for target in ("state.pt", "ckpt.pt"):
        with pytest.raises(Killed), atomic.write(tmp_path / target) as temporary:
            names.append(temporary)
            raise Killed
    for temporary in names:  # SIGKILL lets nothing be removed
        temporary.parent.mkdir()
        temporary.write_bytes(b"half")
    opened(tmp_path, tiny_config(), **how)
    assert not any(temporary.parent.exists() for temporary in names)


def test_what_others_are_writing_is_left_alone(tmp_path: Path, tiny_config: Config, finished: Finished) -> None:
    """A run in a folder below, an export and a drawing beside the checkpoint."""
    finished(tmp_path)
    (tmp_path / "below").mkdir()
    theirs = [tmp_path / name for name in ("below/.cm-01234567.pt", ".cm-01234567.onnx", ".cm-01234567.png")]
    for path in theirs:
        path.mkdir()
    opened(tmp_path, tiny_config(), force=True)
    assert all(path.exists() for path in theirs)


def test_a_refused_run_sweeps_nothing(tmp_path: Path, tiny_config: Config, finished: Finished) -> None:
    finished(tmp_path)
    left = tmp_path / ".cm-01234567.pt"
    left.mkdir()
    with pytest.raises(OutputError):
        opened(tmp_path, tiny_config())
    assert left.exists()


# resume


def test_resume_gives_the_state_back(tmp_path: Path, tiny_config: Config, finished: Finished) -> None:
    finished(tmp_path)
    before = contents(tmp_path)
    state = opened(tmp_path, tiny_config(), resume=True)
    assert state is not None and (state["phase"], state["step"]) == (1, 3)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("exists", [True, False])
def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path: Path, tiny_config: Config, exists: bool) -> None:
    path = tmp_path / "run"
    if exists:
        path.mkdir()
    with pytest.raises(TrainingError, match="nothing to resume") as caught:
        opened(path, tiny_config(), resume=True)
    assert str(path) in str(caught.value)


def test_resume_of_a_mistyped_folder_makes_none(tmp_path: Path, tiny_config: Config) -> None:
    with pytest.raises(TrainingError, match="nothing to resume"):
        opened(tmp_path / "mistyped", tiny_config(), resume=True)
    assert not (tmp_path / "mistyped").exists()


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("seed", {"seed": 1}),
        ("precond", {"precond": "boundary"}),
        ("sigma_data", {"sigma_data": 0.6}),
        ("weights", {"weights": "float16"}),
        ("data.flip", {"data": {"flip": True}}),
        ("data.classes", {"data": {"classes": False, "source": "elsewhere"}}),
        ("network.dropout", {"network": {"dropout": 0.1}}),
        ("network.channel_mult", {"network": {"channel_mult": [1, 3]}}),
        ("network.attention", {"network": {"attention": [4]}}),
        ("phase.0.learning_rate", {"edm": {"learning_rate": 2e-3}}),
        ("phase.0.ema", {"edm": {"ema": [0.5, 0.9]}}),
        ("phase.1.stages", {"ect": {"stages": 4}}),
        ("phase", {"phases": 1}),
    ],
)
def test_resume_with_another_configuration_names_the_key(
    tmp_path: Path, tiny_config: Config, finished: Finished, key: str, changed: dict[str, Any]
) -> None:
    finished(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(TrainingError) as caught:
        opened(tmp_path, tiny_config(**changed), resume=True)
    named = str(caught.value).removeprefix(f"{tmp_path} was started with another ").partition(";")[0]
    assert named.startswith(key) and named.removeprefix(key) in ("", ".0", ".1")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "changed",
    [{"data": {"source": "/moved/elsewhere"}}, {"device": "cpu"}, {"save_every": 7}, {"sample_every": 7}],
)
def test_where_the_data_lies_and_how_often_to_save_may_change(
    tmp_path: Path, tiny_config: Config, finished: Finished, changed: dict[str, Any]
) -> None:
    finished(tmp_path)
    assert opened(tmp_path, tiny_config(**changed), resume=True) is not None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"garbage"),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: torch.save({"format": "another"}, path),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"format": torch.load(path, weights_only=True)["format"]}, path),
        lambda path: torch.save({"format": torch.load(path, weights_only=True)["format"], "config": 3}, path),
    ],
    ids=["empty", "garbage", "truncated", "another format", "a list", "without config", "with a bad config"],
)
def test_a_state_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, tiny_config: Config, finished: Finished, spoil: Callable[[Path], Any]
) -> None:
    finished(tmp_path)
    spoil(tmp_path / "state.pt")
    with pytest.raises(CmRuntimeError) as caught:
        opened(tmp_path, tiny_config(), resume=True)
    assert "state.pt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["data", "init"])
def test_resume_with_other_data_or_another_start_is_refused_by_name(
    tmp_path: Path, tiny_config: Config, finished: Finished, name: str
) -> None:
    finished(tmp_path)
    before = contents(tmp_path)
    with (
        pytest.raises(TrainingError, match=f"another {name};"),
        RunFolder(tmp_path).open(tiny_config(), {**INPUTS, name: "1" * 64}, resume=True, force=False),
    ):
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize("key", sorted(STATE_KEYS | {"format"}))
def test_a_state_without_one_of_its_parts_is_refused(
    tmp_path: Path, tiny_config: Config, finished: Finished, key: str
) -> None:
    finished(tmp_path)
    state = load_plain(tmp_path / "state.pt")
    assert state.keys() > STATE_KEYS
    del state[key]
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(CmRuntimeError, match=r"state\.pt is (damaged: it has no|not a training state)"):
        opened(tmp_path, tiny_config(), resume=True)


# run.json


def test_every_session_is_noted_with_what_it_takes_to_repeat_it(
    tmp_path: Path, tiny_config: Config, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(tmp_path)
    monkeypatch.setattr("sys.argv", ["/anywhere/cm-runtime", "train", "tiny"])
    [first] = json.loads((tmp_path / "run.json").read_text())
    folder = RunFolder(tmp_path)
    with folder.open(tiny_config(), INPUTS, resume=True, force=False):
        data = ImageSet(np.zeros((7, 1, 8, 8), np.uint8), np.arange(7), 7, "seven")
        folder.begin(provenance.session(data, Workers(0, 3, torch.device("cpu"))), 24, tensorboard=False)
    again, second = json.loads((tmp_path / "run.json").read_text())
    assert again == first
    assert (first["from_images"], second["from_images"]) == (0, 24)
    assert (first["workers"], second["workers"]) == (1, 3)
    assert first["inputs"] == second["inputs"] == INPUTS
    assert second["command"] == ["cm-runtime", "train", "tiny"]
    assert second["data"] == {"name": "seven", "images": 7, "shape": [1, 8, 8], "classes": 7}
    assert (second["torch"], second["numpy"]) == (torch.__version__, np.__version__)
    assert second["device"] == "cpu" and second["threads"] == torch.get_num_threads()


@pytest.mark.process
@pytest.mark.parametrize("content", ["", "{}", "[1", "\x00"])
def test_a_damaged_run_json_is_refused_by_name(
    tmp_path: Path, tiny_config: Config, finished: Finished, content: str
) -> None:
    finished(tmp_path)
    (tmp_path / "run.json").write_text(content)
    before = contents(tmp_path)
    with pytest.raises(TrainingError, match=r"run\.json is damaged.*move it away"):
        opened(tmp_path, tiny_config(), resume=True)
    assert contents(tmp_path) == {".lock": b"", **before}


# one at a time


@pytest.mark.process
@pytest.mark.parametrize("how", [{}, {"resume": True}, {"force": True}])
def test_only_one_run_is_in_a_folder_at_a_time(
    tmp_path: Path, tiny_config: Config, finished: Finished, how: dict[str, bool]
) -> None:
    finished(tmp_path)
    before = contents(tmp_path)
    with RunFolder(tmp_path).open(tiny_config(), INPUTS, resume=True, force=False):
        with pytest.raises(OutputError, match="another run"):
            opened(tmp_path, tiny_config(), **how)
        assert contents(tmp_path) == before
    assert opened(tmp_path, tiny_config(), resume=True) is not None


def test_a_run_that_failed_gives_the_folder_back(tmp_path: Path, tiny_config: Config) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        RunFolder(tmp_path).open(tiny_config(), INPUTS, resume=False, force=False),
    ):
        raise ZeroDivisionError
    assert opened(tmp_path, tiny_config(), force=True) is None


# writing


def test_save_writes_the_checkpoint_before_the_state(
    tmp_path: Path, tiny_config: Config, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(tmp_path)
    folder = RunFolder(tmp_path)
    old = (tmp_path / "state.pt").read_bytes()

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("cm_runtime.training.run_folder.save_plain", killed)
    with folder.open(tiny_config(), INPUTS, resume=True, force=False), pytest.raises(Killed):
        folder.save({"step": 2}, checkpoint(steps=2))
    assert read_checkpoint(folder.checkpoint).training.steps == 2
    assert (tmp_path / "state.pt").read_bytes() == old


def spoilt(path: Path) -> None:
    """Makes whatever a run writes impossible to write: /dev/full is a disk without room, folders lie in the way."""
    (path / "log.jsonl").unlink()
    (path / "log.jsonl").symlink_to("/dev/full")
    shutil.rmtree(path / "samples")
    (path / "samples").write_text("in the way")
    (path / "state.pt").unlink()
    (path / "state.pt").mkdir()
    (path / "phase-2-ect.pt").mkdir()


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (lambda folder: folder.log({"step": 2}), "log.jsonl"),
        (lambda folder: folder.grid("1", np.zeros((4, 8, 8, 1), np.uint8), {}), "samples"),
        (lambda folder: folder.save({"step": 2}, checkpoint(steps=2)), "state.pt"),
        (lambda folder: folder.keep(2, "ect"), "phase-2-ect.pt"),
    ],
    ids=["log", "grid", "save", "keep"],
)
def test_what_cannot_be_written_is_one_line_that_names_the_file(
    tmp_path: Path, tiny_config: Config, finished: Finished, write: Callable[[RunFolder], None], named: str
) -> None:
    finished(tmp_path)
    folder = RunFolder(tmp_path)
    with folder.open(tiny_config(), INPUTS, resume=True, force=False):
        folder.begin({}, 24, tensorboard=True)
        spoilt(tmp_path)
        with pytest.raises(OutputError) as caught:
            write(folder)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_state_that_is_no_checkpoint_is_told_with_the_cure(
    tmp_path: Path, tiny_config: Config, finished: Finished
) -> None:
    finished(tmp_path)
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(TrainingError, match="not a torch checkpoint, or is damaged; put a copy back"):
        opened(tmp_path, tiny_config(), resume=True)


@pytest.mark.process
def test_the_commit_is_that_of_the_checkout(real_commit: Callable[[Path], str]) -> None:
    root = Path(provenance.__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("no checkout")
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert head and real_commit(root) in (head, f"{head}+")
