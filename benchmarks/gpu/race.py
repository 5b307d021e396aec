"""Contenders in turns, once their images agree with IEEE float32 as well as the plain network of their type does."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from cm_runtime.backends.torch_settings import products
from cm_runtime.bench.turns import quartiles, ratio, take_turns, timer, until
from gpu.contenders import CONTENDERS, Contender, Plain, Setting, checkpoint
from gpu.plan import Options

LONGEST = 12.0  # seconds of timed rounds
PREPARATION = 150.0  # seconds at most until a contender has drawn
COMPARED = 64  # images that are held to the reference
GREY = 0.1  # grey levels, root mean square: bytes that rounding alone turns over


class Overtime(BaseException):
    """A contender took longer than there was time for; no `except Exception` of a compiler's may swallow it."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise Overtime after ``seconds``, in the main thread.

    A thread sends the signal, not the system's alarm clock, of which there is one, and which pytest's time limit has.
    """
    is_over = threading.Event()

    def end(*_: object) -> None:
        if not is_over.is_set():
            raise Overtime

    def watch() -> None:
        if not is_over.wait(seconds):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, end)  # and stays: a signal that comes late does nothing
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def race(options: Options, what: tuple[str, str, int], names: Sequence[str], seconds: float) -> dict[str, Any]:
    """Race contenders on a network in one precision and batch; the first name is the plain network of that type."""
    end = time.monotonic() + seconds
    network, precision, batch = what
    options.work.mkdir(parents=True, exist_ok=True)
    source = checkpoint(network, options.work)
    setting = Setting(source, precision, batch, options.device, options.work, options.caches)
    with products("ieee"):
        reference = Plain(setting._replace(precision="fp32", batch=min(batch, COMPARED))).draw()
    try:
        loaders = {name: partial(CONTENDERS[name], setting) for name in names}
        with products("tf32" if precision == "tf32" else "ieee"):
            return compare(loaders, reference, lambda: end - time.monotonic())
    finally:
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()


def compare(
    loaders: Mapping[str, Callable[[], Contender]], reference: np.ndarray, remaining: Callable[[], float]
) -> dict[str, Any]:
    """Milliseconds of a request, quartiles in turns, of those that load in time and agree.

    The error of images is the root mean square of their distance from ``reference``, in grey levels. The first
    contender's is the yardstick: others may err twice as much. Raises RuntimeError where it has none.
    """
    contenders: dict[str, Contender] = {}
    errors: dict[str, float] = {}
    late: list[str] = []
    absent: dict[str, str] = {}
    for name, load in loaders.items():
        try:
            with within(min(PREPARATION, remaining() - LONGEST)):
                contenders[name] = load()
                try:
                    images = [contenders[name].draw() for _ in range(3)][-1]
                finally:
                    contenders[name].keep()
            errors[name] = distance(images, reference)
        except Overtime:
            late.append(name)
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    yardstick = next(iter(loaders))
    if yardstick not in errors:
        raise RuntimeError(f"{yardstick}, which others are held to, drew none: {absent.get(yardstick, 'not in time')}")
    for name, grey in errors.items():
        if not grey <= 2 * errors[yardstick] + GREY:
            absent[name] = f"{grey:.3f} grey levels from float32, where {yardstick} is {errors[yardstick]:.3f}"
    timers = {name: timer(contenders[name].draw) for name in errors if name not in absent}
    seconds = take_turns(timers, until(max(1.0, min(LONGEST, remaining() - 5)), most=200))
    baselines = [name for name in timers if not name.startswith("cm-runtime")]
    return {
        "ms": {name: [round(1e3 * q, 3) for q in quartiles(each)] for name, each in seconds.items()},
        "speedup": {
            name: {base: [round(q, 3) for q in ratio(seconds[base], seconds[name])] for base in baselines}
            for name in timers
            if name not in baselines
        },
        "outside": {name: share for name in timers if (share := _outside(contenders[name])) is not None},
        "grey": {name: round(each, 4) for name, each in errors.items()},
        "absent": absent,
        "late": late,
        "rounds": len(next(iter(seconds.values()))),
    }


def _outside(contender: Contender) -> float | str | None:
    """The share, or why there is none: times that were taken are not lost to it."""
    try:
        return contender.outside()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def distance(images: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square in grey levels of the images that the reference has too."""
    difference = images[: len(reference)].astype(np.float64) - reference
    return float(np.sqrt(np.mean(difference**2)))
