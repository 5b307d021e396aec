"""Progress where standard error is no terminal, on a clock that takes no time."""

import importlib
import io
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from cm_runtime.cli import progress
from cm_runtime.cli.train import _Progress

bench = importlib.import_module("cm_runtime.cli.bench.run")  # the package has the command under that name


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    it = Clock()
    progress.begin(clock=it)
    yield it
    progress.begin()


def paced(clock: Clock, count: int, seconds: float) -> Iterator[int]:
    for number in range(count):
        clock.now += seconds
        yield number


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_work_of_under_ten_seconds_is_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(progress.count(paced(clock, 9, 1.0), 9, "images", lambda _: 1))) == 9
    assert lines(capsys) == []


def test_long_work_says_what_it_will_do_and_then_a_line_every_half_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    list(progress.count(paced(clock, 50, 2.0), 1000, "images", lambda _: 20))
    first, *rest = lines(capsys)
    assert first == "1000 images, about 100 s" or first == "1000 images, about 2 min"
    assert rest == [
        "images 340/1000, 10/s, 66 s left",
        "images 640/1000, 10/s, 36 s left",
        "images 940/1000, 10/s, 6 s left",
    ]


def test_quiet_is_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress.begin(quiet=True, clock=clock)
    list(progress.count(paced(clock, 50, 2.0), 1000, "images", lambda _: 20))
    progress.say("a plan")
    progress.phase("a phase")
    with progress.spinner("a wait"):
        clock.now += 100
    assert lines(capsys) == []
    assert not logging.getLogger("cm_runtime.progress").isEnabledFor(logging.WARNING)  # what auto measures
    progress.begin(clock=clock)
    assert logging.getLogger("cm_runtime.progress").isEnabledFor(logging.WARNING)


def test_a_wait_says_what_it_is_for_and_how_long_it_has_been(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    left = 75

    class Over:
        def wait(self, seconds: float) -> bool:
            nonlocal left
            clock.now += seconds
            left -= 1
            return left < 0

        def set(self) -> None:
            pass

    progress._wait("precision and recall", Over())
    assert lines(capsys) == [
        "precision and recall",
        "precision and recall: 40 s so far",
        "precision and recall: 70 s so far",
    ]


def test_phases_are_said_once_a_command_takes_long(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress.phase("early")
    clock.now += 11
    progress.phase("reading")
    progress.phase("building")
    assert lines(capsys) == ["reading", "building"]


def test_a_notebook_has_one_line_that_updates(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert progress.place() == "notebook"
    list(progress.count(paced(clock, 40, 0.1), 40, "images", lambda _: 1))
    text = stream.getvalue()
    assert "\n" not in text and "\x1b" not in text
    assert text.count("\r") == 7  # a state every half second after the first second, and the end's two
    assert re.fullmatch(r"\r *\r", text[text.rindex("\r", 0, -1) :])


@pytest.mark.parametrize(("term", "expected"), [("xterm", "terminal"), ("dumb", "lines")])
def test_a_terminal_is_one_whatever_forces_colours(monkeypatch: pytest.MonkeyPatch, term: str, expected: str) -> None:
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert progress.place() == "lines"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert progress.place() == expected


def test_training_says_its_plan_its_phases_its_steps_and_its_saves(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    phase = SimpleNamespace(method="ect", steps=100)
    config: Any = SimpleNamespace(phase=[phase, phase])
    with closing(_Progress("training on 3 images", config, quiet=False)) as display:
        display.begin(0, 20)
        for step in range(21, 81):
            clock.now += 1
            report: Any = SimpleNamespace(method="ect", step=step, steps=100, loss=0.614, images_per_second=12.4)
            display.step(report)
            if step in (55, 75, 80):
                display.save(0, step)
    assert lines(capsys) == [
        "training on 3 images",
        "phase 1 of 2: ect, 100 steps from step 20",
        "ect: step 50/100, loss 0.614, 12 images/s, 50 s left",
        "ect: step 75/100, loss 0.614, 12 images/s, 25 s left, saved",
    ]


def test_a_benchmark_says_how_long_it_will_take_and_when_a_scenario_is_done(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    scenarios: Any = [SimpleNamespace(peers=("torch", "onnx")), SimpleNamespace(peers=())]
    settings: Any = SimpleNamespace(budget_s=4.0)
    with bench._progress(scenarios, settings, "HEAD") as tell:
        for number in range(2):
            for share in (0.0, 0.5):
                clock.now += 35
                tell(number + share, "a block")
        tell(2, "peaks")
    assert lines(capsys) == [
        "6 contenders x 4 s, about 72 s",
        "scenario 1/2, a block",
        "scenario 1/2 is done",
        "scenario 2/2, a block",
        "scenario 2/2 is done",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (120, "2 min"), (5400, "1.5 h"), (86400, "24 h"), (1e6, "12 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text
