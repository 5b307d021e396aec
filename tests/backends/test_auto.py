"""The choice of an engine: measured, remembered, believed only as far as it goes."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest

import cm_runtime as cm
from cm_runtime.backends import auto, measurements, trials
from cm_runtime.backends.base import Backend
from cm_runtime.backends.measurements import Measurement, Question
from cm_runtime.errors import ArtifactError, EngineError, MissingExtraError
from cm_runtime.extras import EXTRAS
from cm_runtime.manifest import Manifest, read_manifest


class Fake(Backend):
    """An engine that takes a while, and answers ``offset`` everywhere."""

    device = "cpu"
    version = "fake 1"

    def __init__(self, name: str, manifest: Manifest, seconds: float, offset: float = 0.0) -> None:
        self.name, self.manifest, self.seconds, self.offset = name, manifest, seconds, offset
        self.runs = 0

    def evaluate(self, feed: Mapping[str, Any]) -> Any:
        self.runs += 1
        time.sleep(self.seconds)
        return np.full(feed["x"].shape, self.offset, np.float32)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own, no waiting."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trials, "PAUSE", 0.0)
    monkeypatch.setattr(trials, "SECONDS", 0.01)
    monkeypatch.setattr(trials, "_waiting_seconds", lambda: 0.0)


@pytest.fixture
def asked(boundary: exports.Files) -> Question:
    return auto.question(boundary.onnx, read_manifest(boundary.onnx), "cpu")


@pytest.fixture
def opened() -> list[str]:
    return []


def opening(asked: Question, opened: list[str], **engines: Any) -> Callable[[str], Backend]:
    """Opens fakes of so many seconds, or raises what is given in their place."""

    def open_engine(name: str) -> Backend:
        opened.append(name)
        made = engines[name]
        if isinstance(made, Exception):
            raise made
        return made if isinstance(made, Backend) else Fake(name, asked.manifest, made)

    return open_engine


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Lines other than that which announces a measurement."""
    return [record.getMessage() for record in caplog.records if record.name == "cm_runtime"]


def kept() -> list[Path]:
    folder = measurements.folder()
    return sorted(folder.iterdir()) if folder.is_dir() else []


@pytest.mark.process
@pytest.mark.parametrize(("ort", "openvino"), [(0.001, 0.01), (0.01, 0.001)])
def test_the_faster_is_taken_and_next_time_opened_alone(
    asked: Question, opened: list[str], ort: float, openvino: float
) -> None:
    best = "ort" if ort < openvino else "openvino"
    open_engine = opening(asked, opened, ort=ort, openvino=openvino)
    assert auto.fastest(asked, open_engine).name == best
    assert opened == ["ort", "openvino"]
    again = auto.fastest(asked, open_engine)
    assert (again.name, opened[2:]) == (best, [best])
    assert again.runs == 0  # type: ignore[attr-defined]
    (path,) = kept()
    assert set(json.loads(path.read_text())["seconds"]) == {"ort", "openvino"}
    assert auto.explain(asked).startswith(f"{best}, device cpu: measured at batch 8: {best} ")


@pytest.mark.process
def test_real_engines_rank_as_they_are_timed_here(boundary: exports.Files) -> None:
    """The whole path with ONNX Runtime and OpenVINO, and what is said of it."""
    model = cm.load(boundary.onnx, micro_batch=4)
    asked = auto.question(boundary.onnx, model.manifest, "cpu", batch=4)
    answer = measurements.load(asked)
    assert answer is not None and next(iter(answer.seconds)) == model.name
    assert asked.batch == 4


OTHERS: dict[str, Callable[[Question], Question]] = {
    "threads": lambda q: replace(q, threads=1),
    "precision": lambda q: replace(q, precision="fp32"),
    "batch": lambda q: replace(q, batch=1),
    "device": lambda q: replace(q, device="cuda:0"),
    "engines": lambda q: replace(q, names=("ort",)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_every_part_of_the_question_counts(asked: Question, what: str) -> None:
    assert OTHERS[what](asked).key != asked.key
    assert replace(asked).key == asked.key


def test_so_do_the_file_the_machine_and_the_versions(
    asked: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = asked.key
    copy = tmp_path / "elsewhere.onnx"
    copy.write_bytes(asked.path.read_bytes())
    assert replace(asked, path=copy).key == key
    copy.write_bytes(asked.path.read_bytes().replace(b"F.out", b"F.Out", 1))
    assert replace(asked, path=copy).key != key
    for name, value in (("version", lambda _: "99"), ("processor", lambda: "another")):
        with monkeypatch.context() as patch:
            patch.setattr(measurements, name, value)
            assert asked.key != key


SECONDS = ["3", "{}", '{"ort": 1' + "0" * 400 + "}", '{"ort": "x"}', '{"ort": -1}', '{"ort": NaN}', '{"magic": 1}']


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "[" * 100000, *(f'{{"seconds": {each}}}' for each in SECONDS), None]
)
def test_what_cannot_be_believed_is_measured_anew(asked: Question, opened: list[str], content: str | None) -> None:
    path = measurements.folder() / f"{asked.key}.json"
    path.parent.mkdir(parents=True)
    if content is None:
        path.write_bytes(b"\xff\xfe\x00")
    else:
        path.write_text(content)
    assert auto.fastest(asked, opening(asked, opened, ort=0.01, openvino=0.001)).name == "openvino"
    assert opened == ["ort", "openvino"]
    assert measurements.load(asked) is not None


@pytest.mark.process
@pytest.mark.parametrize("obstacle", ["a file for a folder", "a folder for a file"])
def test_a_cache_that_cannot_be_written_is_none(
    asked: Question, opened: list[str], obstacle: str, tmp_path: Path
) -> None:
    if obstacle == "a file for a folder":
        (tmp_path / "cache").write_text("")
    else:
        (measurements.folder() / f"{asked.key}.json").mkdir(parents=True)
    for _ in range(2):
        assert auto.fastest(asked, opening(asked, opened, ort=0.01, openvino=0.001)).name == "openvino"
    assert opened == ["ort", "openvino"] * 2


def test_a_machine_without_a_home_folder_has_no_cache(
    asked: Question, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a container's user without an entry in /etc/passwd."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert auto.fastest(asked, opening(asked, opened, ort=0.01, openvino=0.001)).name == "openvino"
    assert "measured on first use" in auto.explain(asked)


def test_one_candidate_is_not_measured(asked: Question, opened: list[str]) -> None:
    alone = replace(asked, names=("openvino",))
    assert auto.fastest(alone, opening(asked, opened, openvino=0.001)).runs == 0  # type: ignore[attr-defined]
    assert kept() == []
    assert auto.explain(alone) == "openvino, device cpu: no other installed engine can"


@pytest.mark.parametrize(
    ("precision", "device", "extra"), [("auto", "cpu", "cpu"), ("bf16", "cpu", "openvino"), ("auto", "cuda:0", "cpu")]
)
def test_without_an_engine_the_pip_command_is_named(
    asked: Question, monkeypatch: pytest.MonkeyPatch, precision: str, device: str, extra: str
) -> None:
    def absent(package: str, what: str) -> None:
        raise MissingExtraError(package, EXTRAS[package], what)

    nothing = replace(asked, names=(), precision=precision, device=device)
    monkeypatch.setattr(auto, "has", lambda _: False)
    monkeypatch.setattr(auto, "require", absent)
    with pytest.raises(MissingExtraError, match=rf"cm-runtime\[{extra}\]"):
        auto.fastest(nothing, lambda _: pytest.fail("nothing is there"))
    assert f"pip install 'cm-runtime[{extra}]'" in auto.explain(nothing)


def test_what_no_engine_can_is_said_without_a_pip_command(asked: Question) -> None:
    impossible = auto.question(asked.path, asked.manifest, "cpu", precision="fp16")
    assert impossible.names == ()
    assert auto.explain(impossible) == "no installed engine runs it on cpu in fp16"
    with pytest.raises(EngineError, match=r"no installed engine runs .* on cpu in fp16"):
        auto.fastest(impossible, lambda _: pytest.fail("none can"))


# Engines that fail


@pytest.mark.parametrize("remembered", [False, True])
def test_the_next_is_taken_with_one_line_where_the_best_cannot_start(
    asked: Question, opened: list[str], caplog: pytest.LogCaptureFixture, remembered: bool
) -> None:
    if remembered:
        auto.fastest(asked, opening(asked, opened, ort=0.01, openvino=0.001))
    caplog.clear()
    failing = opening(asked, opened, ort=0.001, openvino=EngineError("no more memory"))
    assert auto.fastest(asked, failing).name == "ort"
    assert warnings(caplog) == ["auto does without openvino: no more memory"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_where_none_starts_the_first_ones_reason_is_given(asked: Question, opened: list[str]) -> None:
    with pytest.raises(EngineError, match="first"):
        auto.fastest(asked, opening(asked, opened, ort=EngineError("first"), openvino=EngineError("second")))


def test_a_file_that_one_calls_damaged_is_not_drawn_from(asked: Question, opened: list[str]) -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        auto.fastest(asked, opening(asked, opened, ort=ArtifactError("damaged"), openvino=0.001))


class Failing(Fake):
    def evaluate(self, feed: Mapping[str, Any]) -> Any:
        raise EngineError("an index out of range")


def test_the_first_engine_that_starts_but_fails_is_not_passed_over(asked: Question, opened: list[str]) -> None:
    """What exports are proved with knows that the file lies."""
    broken = Failing("ort", asked.manifest, 0)
    with pytest.raises(EngineError, match="index out of range"):
        auto.fastest(asked, opening(asked, opened, ort=broken, openvino=0.001))


@pytest.mark.parametrize("offset", [0.01, -1.0, np.nan, np.inf])
def test_an_engine_that_draws_something_else_is_left_out(
    asked: Question, opened: list[str], caplog: pytest.LogCaptureFixture, offset: float
) -> None:
    other = Fake("openvino", asked.manifest, 0.0001, offset)
    assert auto.fastest(asked, opening(asked, opened, ort=0.001, openvino=other)).name == "ort"
    (line,) = warnings(caplog)
    assert line.startswith("auto does without openvino: its images are ")
    assert kept() == []


def test_so_is_one_that_fails_at_once(asked: Question, opened: list[str], caplog: pytest.LogCaptureFixture) -> None:
    broken = Failing("openvino", asked.manifest, 0)
    assert auto.fastest(asked, opening(asked, opened, ort=0.001, openvino=broken)).name == "ort"
    assert warnings(caplog) == ["auto does without openvino: an index out of range"]


class Odd(Fake):
    """Images of another type, or another shape."""

    def evaluate(self, feed: Mapping[str, Any]) -> Any:
        return np.zeros(feed["x"].shape, np.float64) if self.offset else np.zeros((1, 2, 3), np.float32)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_so_is_one_whose_images_are_none(
    asked: Question, opened: list[str], caplog: pytest.LogCaptureFixture, offset: float
) -> None:
    other = Odd("openvino", asked.manifest, 0, offset)
    assert auto.fastest(asked, opening(asked, opened, ort=0.001, openvino=other)).name == "ort"
    (line,) = warnings(caplog)
    assert line.startswith("auto does without openvino: the graph made ")


# One grey level, in fp32; 40 dB in half precision


class Shifted(Fake):
    """Answers its input, off by ``offset``: everywhere, below a noise level, or in one pixel."""

    where = "everywhere"

    def evaluate(self, feed: Mapping[str, Any]) -> Any:
        time.sleep(self.seconds)
        x0 = np.tanh(feed["x"]).astype(np.float32)
        if self.where == "everywhere":
            x0 += self.offset
        elif self.where == "low":
            x0[feed["sigma"] < 0.5] += self.offset
        elif self.where == "high":
            x0[feed["sigma"] > 50] += self.offset
        else:
            x0[:, 0, 0, 0] += self.offset
        return x0


LEVEL = 2 / 255


@pytest.mark.parametrize(
    ("precision", "where", "offset", "is_taken"),
    [
        ("fp32", "everywhere", 0.3 * LEVEL, True),
        ("fp32", "everywhere", 1.2 * LEVEL, False),
        ("fp32", "low", 1.2 * LEVEL, False),
        ("fp32", "high", 1.2 * LEVEL, False),
        ("fp32", "pixel", -1.2 * LEVEL, False),
        ("fp16", "pixel", 12 * LEVEL, True),
        ("fp16", "everywhere", LEVEL, True),
        ("fp16", "everywhere", 3 * LEVEL, False),
        ("fp16", "high", -5 * LEVEL, False),
        ("fp16", "everywhere", np.inf, False),
        ("fp16", "everywhere", np.nan, False),
    ],
)
def test_an_engine_moves_images_by_a_grey_level_or_to_40_db(
    asked: Question, opened: list[str], precision: Any, where: str, offset: float, is_taken: bool
) -> None:
    question = replace(asked, manifest=asked.manifest.model_copy(update={"precision": precision}))
    other = Shifted("openvino", question.manifest, 0.0001, offset)
    other.where = where
    first = Shifted("ort", question.manifest, 0.003)
    taken = auto.fastest(question, opening(question, opened, ort=first, openvino=other))
    assert taken.name == ("openvino" if is_taken else "ort")


@pytest.mark.parametrize(("offset", "is_taken"), [(1, True), (2, False)])
def test_of_a_sampler_its_bytes_do(offset: int, is_taken: bool) -> None:
    images = np.arange(0, 200, dtype=np.float64) - 127.5
    context = nullcontext() if is_taken else pytest.raises(EngineError, match="2 grey levels from those of ort")
    with context:
        trials.compare([images], [images + offset], "fp32", "ort")


# Noise


def test_a_measurement_is_announced_once(asked: Question, opened: list[str], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        auto.fastest(asked, opening(asked, opened, ort=0.001, openvino=0.01))
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("cm_runtime.progress", f"measuring once which engine is faster for {asked.path}: ort or openvino")
    ]


@pytest.mark.process
def test_a_busy_machine_is_measured_again_but_not_for_ever(
    asked: Question, opened: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = itertools.count(step=10)
    monkeypatch.setattr(trials, "_waiting_seconds", lambda: next(waits))
    open_engine = opening(asked, opened, ort=0.001, openvino=0.01)
    for tries in range(1, measurements.MOST_TRIES + 1):
        assert auto.fastest(asked, open_engine).name == "ort"
        answer = measurements.load(asked)
        assert answer is not None and (answer.tries, answer.is_noisy) == (tries, True)
        assert auto.explain(asked).endswith("measured again on next use") == (tries < measurements.MOST_TRIES)
    assert opened == ["ort", "openvino"] * measurements.MOST_TRIES
    assert auto.fastest(asked, open_engine).name == "ort"
    assert opened[2 * measurements.MOST_TRIES :] == ["ort"]
    assert [record.getMessage().split()[1] for record in caplog.records] == ["once", "again,", "again,"]


QUIET = [1.0, 1.01, 1.02, 1.03, 1.01, 1.0]


@pytest.mark.parametrize(
    ("slower", "is_busy", "is_noisy"),
    [
        ([2.0, 2.1, 2.0, 2.1], False, False),
        ([2.0, 2.1, 2.0, 2.1], True, True),
        ([0.9, 1.4, 0.9, 1.4, 1.4, 1.4], False, True),
        ([1.02, 1.03, 1.02, 1.03], False, False),
    ],
    ids=["apart", "busy", "overlapping", "as fast"],
)
def test_noise_is_threads_that_wait_or_times_that_overlap(slower: list[float], is_busy: bool, is_noisy: bool) -> None:
    answer = trials.rank({"ort": QUIET, "openvino": slower}, is_busy, None)
    assert (next(iter(answer.seconds)), answer.is_noisy) == ("ort", is_noisy)


def test_of_two_noisy_measurements_the_less_disturbed_times_count() -> None:
    before = Measurement(seconds={"openvino": 0.5, "ort": 3.0}, is_noisy=True)
    answer = trials.rank({"ort": QUIET, "openvino": [2.0] * 4}, True, before)
    assert answer.seconds == {"openvino": 0.5, "ort": pytest.approx(1.01)}
    quiet = trials.rank({"ort": QUIET, "openvino": [2.0] * 4}, False, before)
    assert next(iter(quiet.seconds)) == "ort" and quiet.tries == 2


@pytest.mark.process
def test_all_is_forgotten(asked: Question, opened: list[str]) -> None:
    assert measurements.forget() == 0
    for batch in (1, 2):
        auto.fastest(replace(asked, batch=batch), opening(asked, opened, ort=0.001, openvino=0.01))
    assert measurements.forget() == 2
    assert kept() == [] and measurements.load(asked) is None


# Candidates


@pytest.mark.parametrize(
    ("precision", "device", "wanted", "names"),
    [
        ("fp32", "cpu", "auto", ("ort", "openvino")),
        ("fp32", "cpu", "fp32", ("ort", "openvino")),
        ("fp32", "cpu", "bf16", ("openvino",)),
        ("fp32", "cpu", "fp16", ()),
        ("fp16", "cpu", "auto", ("ort", "openvino")),
        ("fp16", "cpu", "fp16", ("ort",)),
        ("bf16", "cpu", "auto", ("openvino",)),
        ("bf16", "cpu", "bf16", ("openvino",)),
        ("bf16", "cuda:0", "auto", ("ort",)),
        ("fp32", "cuda:0", "auto", ("ort",)),
        ("fp32", "cuda:0", "bf16", ()),
        ("fp32", "cuda:0", "tf32", ("ort",)),
        ("fp16", "cuda:0", "tf32", ()),
        ("fp32", "cpu", "tf32", ()),
    ],
)
def test_who_can_run_what(
    asked: Question, monkeypatch: pytest.MonkeyPatch, precision: Any, device: str, wanted: str, names: Any
) -> None:
    manifest = asked.manifest.model_copy(update={"precision": precision})
    monkeypatch.setattr(auto, "has", lambda package: True)
    assert auto.candidates(manifest, device, wanted) == names
    monkeypatch.setattr(auto, "has", lambda package: package != "openvino")
    assert auto.candidates(manifest, device, wanted) == tuple(name for name in names if name != "openvino")


@pytest.mark.parametrize(("given", "batch"), [(None, 8), (1, 1), (3, 3), (64, 8), (0, 1)])
def test_the_batch_is_that_of_the_request_up_to_eight(boundary: exports.Files, given: int | None, batch: int) -> None:
    assert auto.question(boundary.onnx, read_manifest(boundary.onnx), "cpu", batch=given).batch == batch


def _load(path: str, line: Any) -> None:
    line.send(cm.load(path).name)


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_at_once_both_get_an_engine(boundary: exports.Files) -> None:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=_load, args=(str(boundary.onnx), theirs)) for _, theirs in pipes]
    for process in processes:
        process.start()
    names = [ours.recv() for ours, _ in pipes]
    for process in processes:
        process.join()
    assert set(names) <= {"ort", "openvino"}
    assert len(kept()) == 1
