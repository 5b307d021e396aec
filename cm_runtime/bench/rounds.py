"""One scenario: its contenders draw the same images, then take turns.

Nothing is timed before the first request's images have been compared. Then rounds: in each, every contender times one
block of requests, in an order that turns round every time, so that whatever the machine does is done to all.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cm_runtime.bench import stats
from cm_runtime.bench.contenders import Side
from cm_runtime.bench.results import MOST_BLOCKS, Agreement, Estimate, Settings
from cm_runtime.bench.scenario import Scenario
from cm_runtime.bench.worker import Block, Facts
from cm_runtime.bench.worker_process import Process, WorkerError
from cm_runtime.sampling import to_uint8

AGREEMENT = 1e-3  # largest difference of a pixel in [-1, 1] before quantisation
GREY = 1.001 * 2 / 255  # and after it, or in tf32
LEAST_PSNR = 40.0  # dB on [-1, 1] data, in half precision
BLOCK_S = 0.25
SETTLE_S = 0.02  # before a block, for the threads of the contender before it to stop spinning
STABLE = 0.05
FEWEST_ROUNDS = 3
MOST_REQUESTS = 500  # in a block
WINDOW = 40  # requests in a block of a server scenario
P99_REQUESTS = 800  # that an interval of the 99th percentile takes at least, in blocks of that size
LONGEST = 4  # times the budget, in a server scenario whose 99th percentile takes more of them
QUICK_START = 3.0  # seconds; what starts faster is started three times

Turn = Callable[[Side], Block | None]


@dataclass(frozen=True)
class Observer:
    """look: called between blocks; tell: (share of the scenario, activity); keep: (side, block number, samples)."""

    look: Callable[[], None]
    tell: Callable[[float, str], None]
    keep: Callable[[str, int, Block], None]


def contest(
    scenario: Scenario, sides: Sequence[Side], reference: Any | str, settings: Settings, work: Path, observer: Observer
) -> None:
    """Measure the sides, the first of which is the subject, and leave the samples in each.

    reference: images (n,H,W,C) float32 of eager torch for the first indices, or why there are none. Raises WorkerError
    where the subject cannot run or draws other images than the reference.
    """
    with ExitStack() as stack:
        subject = sides[0]
        for side in sides:
            observer.tell(0.0, f"starting {side.name}")
            _start(side, work, stack)
            if side.error:
                pass
            elif side is not subject:
                is_allowed = settings.allow_different_images and side.role == "base"
                _compare(side, subject.images, subject.name, subject.is_quantised, is_allowed)
            elif isinstance(reference, str):
                side.reason = f"not compared with torch: {reference}"
            else:
                _compare(side, reference, "torch")
            if subject.error:
                raise subject.error
        sides = [side for side in sides if not side.error]
        (_serve if scenario.kind == "server" else _time_blocks)(scenario, sides, settings, observer)
        if subject.error:
            raise subject.error
        for side in sides:
            if not side.error:
                side.read_memory()


def _start(side: Side, work: Path, stack: ExitStack) -> None:
    """Start, load and draw once; three times where that is quick, for the sake of the cold start's spread."""
    images = work / "first.npy"
    try:
        starts: list[float] = []
        while not starts or (side.role == "subject" and len(starts) < 3 and starts[0] < QUICK_START):
            if side.process:
                side.process.close()
            began = time.perf_counter()
            side.process = Process(side.spec.threads, side.root)
            stack.callback(side.process.close)
            side.facts = Facts(**side.process.ask("load", spec=vars(side.spec)))
            side.first_s = side.process.ask("first", path=str(images))["first_s"]
            starts.append(time.perf_counter() - began)
    except WorkerError as error:
        side.error = error
        return
    side.images, side.cold_start_s = np.load(images), tuple(starts)


def _compare(side: Side, reference: Any, against: str, is_quantised: bool = False, is_allowed: bool = False) -> None:
    """Leave out a side whose images differ from the reference by more than rounding does, unless that is allowed.

    Where either draws bytes, and in tf32, they are held to one grey level, in half precision to 40 dB.
    """
    if side.images.shape[1:] != reference.shape[1:]:
        side.error = WorkerError(f"its images are {side.images.shape[1:]}, those of {against} {reference.shape[1:]}")
        return
    n = min(len(reference), len(side.images))
    difference = float(np.abs(side.images[:n] - reference[:n]).max())
    levels = np.abs(_grey_levels(side.images[:n]) - _grey_levels(reference[:n])).max()
    if side.spec.precision in ("fp16", "bf16"):
        mean = float(np.mean(np.square(side.images[:n].astype(np.float64) - reference[:n])))
        differs = not mean <= 4 * 10 ** (-LEAST_PSNR / 10)
    else:
        is_coarse = side.is_quantised or is_quantised or side.spec.precision == "tf32"
        differs = not difference <= (GREY if is_coarse else AGREEMENT)
    side.agreement = Agreement(
        against=against, max_abs=difference, grey_levels=int(levels), is_allowed=differs and is_allowed
    )
    if differs and not is_allowed:
        side.error = WorkerError(f"its images differ from those of {against} by {difference:.2g}; it was not timed")


def _grey_levels(images: Any) -> Any:
    return to_uint8(np.moveaxis(images, -1, 1)).astype(int)


def _take_turns(
    sides: Sequence[Side],
    rounds: Iterable[Turn],
    is_over: Callable[[int, float], bool],
    budget: float,
    observer: Observer,
) -> None:
    """Measure a block of each side in every round, until ``is_over``(rounds so far, seconds) or the subject fails."""
    began = time.perf_counter()
    for number, turn in enumerate(rounds):
        seconds = time.perf_counter() - began
        if is_over(number, seconds):
            return
        observer.tell(min(seconds / budget, 1.0), f"round {number + 1}")
        for side in sides if number % 2 == 0 else reversed(sides):
            if side.error:
                continue
            if len(sides) > 1:
                time.sleep(SETTLE_S)
            block = turn(side)
            if block is not None:
                side.add(block)
                observer.keep(side.name, number, block)
            observer.look()
        if sides[0].error:
            return


def _time_blocks(_: Scenario, sides: list[Side], settings: Settings, observer: Observer) -> None:
    """Blocks of requests one after another."""
    plans = {}
    for side in sides:
        observer.tell(0.0, f"warming {side.name} up")
        plans[side.name] = _warm(side, settings)
    budget = settings.budget_s * len(sides)

    def is_over(number: int, seconds: float) -> bool:
        return number >= FEWEST_ROUNDS and (seconds >= budget or _is_narrow(sides, settings))

    rounds = itertools.repeat(lambda side: side.measure("block", **plans[side.name]), MOST_BLOCKS)
    _take_turns(sides, rounds, is_over, budget, observer)


def _warm(side: Side, settings: Settings) -> dict[str, int]:
    """Draw until two blocks in a row take the same time, or a fifth of the budget is gone; returns a block's plan."""
    assert side.first_s is not None
    before, requests = side.first_s * 1e3, 1
    began = time.perf_counter()
    is_over = side.is_stable = False
    while not is_over and (block := side.measure("block", requests=requests, lead=0)) is not None:
        side.warmup += requests
        now = float(np.median(block.ns)) / 1e6
        side.is_stable, before = abs(now / before - 1) <= STABLE, now
        length = min(BLOCK_S, settings.budget_s / 16) * 1e3
        enough = max(1, min(MOST_REQUESTS, math.ceil(length / now)))
        is_over = (side.is_stable and requests >= enough) or time.perf_counter() - began > settings.budget_s / 5
        requests = enough
    return {"requests": requests, "lead": int(requests > 1)}


def _is_narrow(sides: Sequence[Side], settings: Settings) -> bool:
    """True where the interval of every median, and of every ratio of the base to the subject, is narrow enough."""
    subject, sides = sides[0], [side for side in sides if not side.error]
    if min(len(side.blocks) for side in sides) < 2 * stats.FEWEST_BLOCKS:
        return False
    estimates = [stats.quantile(side.blocks, 0.5) for side in sides]
    estimates += [stats.ratio(side.medians, subject.medians) for side in sides if side.role == "base"]
    return all(_half_width(each) <= settings.interval for each in estimates)


def _half_width(estimate: Estimate) -> float:
    if estimate.low is None or estimate.high is None:
        return math.inf
    return (estimate.high - estimate.low) / 2 / estimate.value


def _serve(scenario: Scenario, sides: list[Side], settings: Settings, observer: Observer) -> None:
    """Windows of Poisson arrivals, the same ones for every side."""
    assert scenario.rate is not None
    rate, rng = scenario.rate, np.random.default_rng(settings.seed)

    def window() -> Turn:
        arrivals = [float(second) for second in np.cumsum(rng.exponential(1 / rate, WINDOW))]
        return lambda side: side.measure("serve", arrivals=arrivals, most=scenario.batch)

    for side in sides:
        observer.tell(0.0, f"warming {side.name} up")
        window()(side)
        side.warmup = WINDOW
    budget = max(settings.budget_s, P99_REQUESTS / rate) * len(sides)

    def is_over(number: int, seconds: float) -> bool:
        if number < stats.FEWEST_BLOCKS or seconds < budget:
            return False
        return seconds >= LONGEST * budget or all(stats.latency(side.blocks).p99 for side in sides if not side.error)

    _take_turns(sides, (window() for _ in range(MOST_BLOCKS)), is_over, budget, observer)
