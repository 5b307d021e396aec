"""Every training method on Gaussian data, whose answers have a closed form.

    python benchmarks/gaussian.py
    python benchmarks/gaussian.py --only ict --s 0.3 --json gaussian.json

On 8x8 images of N(0, s^2 I), s = 0.3 and 0.5, the presets ``gaussian-*`` train tiny networks. With eps = 0.002,

    D(x, t) = s^2 / (s^2 + t^2) x,    f(x, t) = x sqrt((s^2 + eps^2) / (s^2 + t^2)).

A denoiser must come within 0.05 s (RMS) of D at sigma 0.5, 2 and 10, a consistency function within 5% of f at 0.5, 2,
10 and 80. Discrete training has a bias, which falls as its levels lie closer: the minimiser multiplies x by the product
over the levels t > r of (s^2 + t r) / (s^2 + t^2) for CT, ECT and CD with Euler's method, and of Heun's factor for
CD with Heun's. On coarse levels the gain, <f^, x> / <x, x>, must be within 3% of that product; where the product is
farther than that from f, so must the gain be nearer to the product. There it is measured at the grid's points nearest
to those sigmas, since the product says nothing between them; everything else is measured at the sigmas themselves.

Every case runs on one thread, ``--jobs`` of them at once: such networks are too small for more threads.

Exit status: 0 done and every requirement met; 1 a requirement missed, or a one-line error; 2 usage.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from cm_runtime.checkpoints.native import read_checkpoint
from cm_runtime.errors import CmRuntimeError
from cm_runtime.files.atomic import check_writable, write
from cm_runtime.schedule import NoiseRange
from cm_runtime.training.config import CdPhase, CtPhase, EctPhase, EdmPhase, IctPhase, Phase, load_config
from cm_runtime.training.data.image_set import ImageSet
from cm_runtime.training.loop import train

EPS = NoiseRange.sigma_min
SIGMAS = (0.5, 2.0, 10.0, 80.0)
EDM_SIGMAS = (0.5, 2.0, 10.0)
DEVIATIONS = (0.3, 0.5)
TOLERANCE = 0.05
PRODUCT_TOLERANCE = 0.03
DATA_IMAGES, TEST_IMAGES = 131072, 1024


@dataclass(frozen=True)
class Case:
    """A preset with settings; coarse: its levels lie so far apart that the product is asked for, not f."""

    name: str
    preset: str
    settings: tuple[str, ...] = ()
    coarse: bool = False


CASES = (
    Case("edm", "gaussian-edm"),
    Case("cd", "gaussian-cd"),
    Case("cd-euler", "gaussian-cd", ("phase.0.solver=euler", "phase.0.N=151")),
    Case("ct", "gaussian-ct"),
    Case("ict", "gaussian-ict"),
    Case("ect", "gaussian-ect"),
    Case("cd-18", "gaussian-cd", ("phase.0.N=18", "phase.0.steps=2400"), coarse=True),
    Case("cd-euler-18", "gaussian-cd", ("phase.0.solver=euler", "phase.0.N=18", "phase.0.steps=2400"), coarse=True),
    Case("ct-18", "gaussian-ct", ("phase.0.s1=17", "phase.0.steps=2400"), coarse=True),
    Case("ect-stage-3", "gaussian-ect", ("phase.1.stages=2", "phase.1.steps=4000"), coarse=True),
)


@dataclass(frozen=True)
class Figure:
    """A trained network at one noise level. Gains are relative to that of f, or of D; ``error`` to RMS(f), or to s.

    ``product`` is the minimiser's gain: on a grid, at its nearest point.
    """

    sigma: float
    error: float
    gain: float
    product: float


@dataclass(frozen=True)
class Result:
    """A case on data N(0, s^2 I), and what of its requirement it misses, a line each."""

    name: str
    s: float
    seconds: float
    figures: tuple[Figure, ...]
    missed: tuple[str, ...]


def D_gain(t: float, s: float) -> float:
    """D(x, t) / x of data N(0, s^2 I)."""
    return s**2 / (s**2 + t**2)


def f_gain(t: float, s: float) -> float:
    """f(x, t) / x of data N(0, s^2 I): the solution of dx/dt = (x - D(x, t)) / t from t down to eps."""
    return math.sqrt((s**2 + EPS**2) / (s**2 + t**2))


def euler_factor(t: float, r: float, s: float) -> float:
    """x_r / x_t of one Euler step from t to r; the mean of x + r z given x + t z = x_t is the same multiple of it."""
    return (s**2 + t * r) / (s**2 + t**2)


def heun_factor(t: float, r: float, s: float) -> float:
    """x_r / x_t of one Heun step from t to r."""
    slope_t, slope_r = t / (s**2 + t**2), r / (s**2 + r**2)  # dx/dt / x
    return 1 + (r - t) / 2 * (slope_t + euler_factor(t, r, s) * slope_r)


def grid_of(phase: Phase) -> list[float] | None:
    """The noise levels, ascending, that a phase ends on; None where it draws them from all."""
    match phase:
        case CdPhase(N=N):
            return list(NoiseRange().karras(N)[::-1])
        case CtPhase(s1=s1) | IctPhase(s1=s1):
            return list(NoiseRange().karras(s1 + 1)[::-1])
    return None


def levels_below(t: float, phase: Phase) -> Iterator[float]:
    """The levels down which a consistency phase, as it ends, leads from t to where f is x: t first, descending."""
    grid = grid_of(phase)
    if grid is not None:
        yield from reversed([level for level in grid if level <= t])
        return
    assert isinstance(phase, EctPhase)
    fraction = phase.q ** (phase.first_stage + phase.stages)  # of the last stage: q^(stage + 1)
    while t > 1e-5:  # below, a factor is 1 to 1e-9
        yield t
        t = max(0.0, t * (1 - (1 + phase.k / (1 + math.exp(phase.b * t))) / fraction))
    yield t


def minimiser_gain(t: float, s: float, phase: Phase) -> float:
    """f^(x, t) / x where a phase's loss is least: (arXiv 2303.01469, algorithms 2 and 3; 2406.14548, algorithm 1)."""
    if isinstance(phase, EdmPhase):
        return D_gain(t, s)
    factor = heun_factor if isinstance(phase, CdPhase) and phase.solver == "heun" else euler_factor
    return math.prod(factor(t, r, s) for t, r in pairwise(levels_below(t, phase)))


def gaussian_images(s: float, count: int = DATA_IMAGES, seed: int = 0) -> ImageSet:
    """``count`` images (count, 1, 8, 8) float32 of N(0, s^2 I), unclipped.

    Their own covariance is what a network learns, and its eigenvalues lie sqrt(64 / count) about s^2: 2% by default.
    """
    z = np.random.default_rng(seed).standard_normal((count, 1, 8, 8))
    return ImageSet((s * z).astype(np.float32), None, 0, f"gaussian-{s:g}")


def nearest_level(sigma: float, phase: Phase) -> float:
    """The point of the phase's grid nearest to ``sigma``; itself where there is no grid."""
    return min(grid_of(phase) or [sigma], key=lambda level: abs(math.log(level / sigma)))


def measure(
    f: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], phase: Phase, s: float, coarse: bool, seed: int = 1
) -> tuple[Figure, ...]:
    """``f``(x, sigma) on fresh x ~ N(0, (s^2 + sigma^2) I) against the answer that ``phase`` is trained for.

    coarse: at the nearest levels that it was trained at, not at the sigmas themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    exact_gain, unit = (D_gain, s) if isinstance(phase, EdmPhase) else (f_gain, None)
    figures = []
    for target in EDM_SIGMAS if isinstance(phase, EdmPhase) else SIGMAS:
        level = nearest_level(target, phase)
        sigma = level if coarse else target
        x = math.sqrt(s**2 + sigma**2) * torch.randn(TEST_IMAGES, 1, 8, 8, generator=generator)
        with torch.no_grad():
            x0 = f(x, torch.full((TEST_IMAGES,), sigma)).double()
        x = x.double()
        exact = exact_gain(sigma, s) * x
        error = (x0 - exact).square().mean().sqrt().item() / (unit or exact.square().mean().sqrt().item())
        gain = ((x0 * x).sum() / (exact * x).sum()).item()
        figures.append(Figure(float(sigma), error, gain, minimiser_gain(level, s, phase) / exact_gain(level, s)))
    return tuple(figures)


def misses(figures: Sequence[Figure], coarse: bool) -> tuple[str, ...]:
    """The failures of ``figures`` to meet the requirement, a line each."""
    lines = []
    for at in figures:
        if not coarse:
            if not at.error <= TOLERANCE:
                lines.append(f"error {at.error:.2%} at sigma {at.sigma:.3g} is above {TOLERANCE:.0%}")
            continue
        off = abs(at.gain / at.product - 1)
        if not off <= PRODUCT_TOLERANCE:
            lines.append(f"gain {at.gain:.4f} at sigma {at.sigma:.3g} is {off:.2%} from the product {at.product:.4f}")
        elif abs(at.product - 1) > PRODUCT_TOLERANCE and not abs(at.gain - at.product) < abs(at.gain - 1):
            lines.append(f"gain {at.gain:.4f} at sigma {at.sigma:.3g} is nearer to f than the product {at.product:.4f}")
    return tuple(lines)


def run(case: Case, s: float, settings: Sequence[str] = ()) -> Result:
    """Train ``case`` on N(0, s^2 I), with further settings laid over its own, and measure it. Raises CmRuntimeError."""
    config = load_config(case.preset, [*case.settings, *settings])
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = read_checkpoint(train(config, gaussian_images(s), Path(folder) / "run")).model()
    seconds = time.perf_counter() - began
    figures = measure(model, config.phase[-1], s, case.coarse)
    return Result(case.name, s, round(seconds, 1), figures, misses(figures, case.coarse))


def table(results: Sequence[Result]) -> str:
    """Four lines or fewer for each of ``results``, one a noise level."""
    width = max(len(result.name) for result in results)
    lines = [f"{'case':<{width}}    s  seconds   sigma    error    gain  product"]
    for result in results:
        for i, at in enumerate(result.figures):
            name, seconds = (result.name, f"{result.seconds:.0f}") if i == 0 else ("", "")
            figures = f"{at.sigma:>6.3g}  {at.error:>6.2%}  {at.gain:.4f}   {at.product:.4f}"
            lines.append(f"{name:<{width}}  {result.s:g}  {seconds:>7}  {figures}")
    return "\n".join(lines)


def _alone(case: Case, s: float, settings: Sequence[str]) -> Result:
    torch.set_num_threads(1)
    return run(case, s, settings)


@contextmanager
def _results(jobs: Sequence[tuple[Case, float]], settings: Sequence[str], workers: int) -> Iterator[Iterable[Result]]:
    """The results of ``jobs`` in turn, as they come; one worker needs no other process."""
    if workers == 1:
        yield (_alone(case, s, settings) for case, s in jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield (future.result() for future in [pool.submit(_alone, case, s, settings) for case, s in jobs])


def _measure_all(options: argparse.Namespace, report: Callable[[str], None]) -> int:
    """Train all, measure, print, write; returns the exit status."""
    if options.json is not None:
        check_writable(options.json)
    jobs = [(case, s) for case in CASES if case.name in options.only for s in options.s]
    began, results = time.perf_counter(), []
    with _results(jobs, options.settings, options.jobs) as stream:
        for result in stream:
            results.append(result)
            report(f"{result.name}, s = {result.s:g}: {result.seconds:.0f} s")
    print(table(results))
    failures = [f"{result.name}, s = {result.s:g}: {line}" for result in results for line in result.missed]
    for line in failures:
        print(f"missed: {line}")
    print(f"{len(results) - sum(bool(r.missed) for r in results)} of {len(results)} cases meet their requirement")
    if options.json is not None:
        content = {
            "torch": str(torch.__version__),
            "cores": os.cpu_count(),
            "jobs": options.jobs,
            "settings": options.settings,
            "seconds": round(time.perf_counter() - began, 1),
            "results": [asdict(result) for result in results],
            "missed": failures,
        }
        with write(options.json) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(
        description="Train every method on Gaussian data and compare with the closed forms.",
        epilog="Exit status: 0 done, 1 a requirement missed or an error, 2 usage.",
    )
    add = parser.add_argument
    add("--only", choices=names, action="append", metavar="CASE", help=f"may be repeated: {', '.join(names)}")
    add("--s", type=float, action="append", help="standard deviation of the data, may be repeated (0.3 and 0.5)")
    add("--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="J", help="cases at once (%(default)s)")
    add("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="change a key of every case")
    add("--json", type=Path, metavar="PATH", help="write all figures here")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments``, by default the process's own, and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    options.only = options.only or [case.name for case in CASES]
    options.s = options.s or list(DEVIATIONS)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    if not all(0 < s < math.inf for s in options.s):
        parser.error("--s must be above 0")
    try:
        return _measure_all(options, lambda line: print(line, file=sys.stderr))
    except CmRuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
