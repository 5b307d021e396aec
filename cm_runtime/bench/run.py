"""A whole run: peaks, one scenario after another, each on the disk as soon as it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cm_runtime import __version__
from cm_runtime.backends.ort import has_cuda
from cm_runtime.bench import machine, peaks, summary
from cm_runtime.bench.builds import Build, base_build, this_build
from cm_runtime.bench.conditions import Watch
from cm_runtime.bench.contenders import Side
from cm_runtime.bench.models import Model, Models
from cm_runtime.bench.results import BASE, SUBJECT, Peaks, Result, ScenarioResult, Settings
from cm_runtime.bench.rounds import Limits, Observer, contest
from cm_runtime.bench.samples import Samples
from cm_runtime.bench.scenario import Scenario, title
from cm_runtime.errors import CmRuntimeError, OutputError, RequestError
from cm_runtime.extras import NVIDIA_DRIVER
from cm_runtime.files import atomic
from cm_runtime.files.workspaces import scratch
from cm_runtime.manifest import Manifest
from cm_runtime.subprocesses import cores

Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class Shared:
    """What the scenarios of a run share. tell: (scenarios done, what is being done)."""

    settings: Settings
    work: Path
    models: Models
    samples: Samples
    watch: Watch
    build: Build
    base: Build | None
    tell: Tell


def run(
    scenarios: Sequence[Scenario],
    output: Path,
    settings: Settings,
    *,
    against: str | None = None,
    command: str = "",
    left_out: Sequence[str] = (),
    force: bool = False,
    tell: Tell = lambda done, doing: None,
) -> Result:
    """Measures ``scenarios`` into ``output``, which is replaced after each of them, and returns the whole.

    A finished result that is there stays until this one is finished. The samples go to a file beside it. A scenario
    that fails is reported as failed, and the others are measured. Raises RequestError, OutputError.
    """
    atomic.check_writable(output)
    with scratch("cm-bench") as work, Samples(output, force) as kept:
        base = None if against is None else base_build(against, work)
        shared = Shared(settings, work, Models(work), kept, Watch(), this_build(), base, tell)
        result = Result(
            tool=f"cm-runtime {__version__}",
            commit=shared.build.commit,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            command=command,
            complete=False,
            settings=settings,
            machine=machine.machine(),
            planned=len(scenarios),
            left_out=tuple(left_out),
        )
        for place in dict.fromkeys(map(_where, scenarios)):
            tell(0, "measuring what the machine can do")
            result = _with(result, peaks=(*result.peaks, peaks.measure_peaks(*place)))
        for number, scenario in enumerate(scenarios):
            found = _measured(scenario, shared, result.peaks, number)
            result = _with(result, scenarios=(*result.scenarios, found), samples=kept.so_far())
            kept.keep(result)
        tell(len(scenarios), "measuring again what the machine can do")
        result = _with(
            result,
            peaks=tuple(
                each.model_copy(update={"drift": peaks.drift(each, peaks.measure_peaks(each.threads, each.device))})
                for each in result.peaks
            ),
            conditions=shared.watch.stop(),
            complete=True,
        )
        kept.keep(result)
    return result


def _with(result: Result, **update: Any) -> Result:
    return result.model_copy(update=update)


def _where(scenario: Scenario) -> tuple[int, str]:
    """(threads, device) of a scenario."""
    threads = scenario.threads or cores()
    if scenario.device != "auto":
        return threads, scenario.device
    is_gpu = NVIDIA_DRIVER.exists() if scenario.backend == "torch" else has_cuda()
    return threads, "cuda:0" if is_gpu else "cpu"


def _measured(scenario: Scenario, shared: Shared, measured: Sequence[Peaks], number: int) -> ScenarioResult:
    """What was found, or why it could not be."""
    threads, device = _where(scenario)
    asked = scenario.model_dump(include={"model", "kind", "steps", "batch", "rate", "bound_ms", "backend"})
    common: dict[str, Any] = {"name": scenario.name, **asked, "device": device, "threads": threads, "sigmas": ()}

    def tell(share: float, doing: str) -> None:
        shared.tell(number + share, f"{title(scenario.name)}: {doing}")

    def keep(side: str, block: int, answer: dict[str, Any]) -> None:
        shared.samples.write(summary.line(scenario.name, side, block, answer))

    try:
        tell(0, "preparing the model")
        model = shared.models.model(scenario, threads, shared.build)
        manifest = model.manifest
        if manifest.is_teacher:
            raise RequestError("an EDM teacher is no consistency model, and few steps cannot sample it")
        common["sigmas"] = sigmas = _levels(manifest, scenario.steps)
        common["facts"] = model.facts()
        sides = _sides(scenario, shared, model, sigmas)
        reference = shared.models.reference(model, sides[0].spec, sigmas, threads)
        how = shared.settings
        limits = Limits(how.budget_s, how.interval, how.seed, how.allow_different_images)
        contest(scenario, sides, threads, reference, limits, shared.work, Observer(shared.watch.look, tell, keep))
    except OutputError:
        raise
    except CmRuntimeError as error:
        return ScenarioResult(**common, status="failed", reason=str(error))
    peak = next(each for each in measured if (each.threads, each.device) == (threads, device))
    found = tuple(summary.contender(side, sides[0], scenario, model.gflop, peak) for side in sides)
    return ScenarioResult(**common, engine=sides[0].facts["engine"], status="measured", contenders=found)


def _levels(manifest: Manifest, steps: int) -> tuple[float, ...]:
    """A model's own noise levels for that many steps."""
    return manifest.noise_range.levels(steps, manifest.sigmas)


def _sides(scenario: Scenario, shared: Shared, model: Model, sigmas: Sequence[float]) -> list[Side]:
    threads, device = _where(scenario)
    spec: dict[str, Any] = {
        "path": str(model.path.absolute()),
        "backend": "ort" if model.is_exported else "torch",
        "device": device,
        "threads": threads,
        "batch": scenario.batch,
        "sigmas": list(sigmas),
        "seed": shared.settings.seed,
        "image_shape": model.manifest.image_shape,
        "num_classes": model.manifest.num_classes,
        "work": str(shared.work),
    }
    build, base = shared.build, shared.base
    sides = [Side(SUBJECT, "subject", {**spec, "root": str(build.root)}, build.root, build.commit, model.sha256)]
    if base:
        is_own = base.model or model.source != model.path  # its model, or its export
        other = shared.models.model(scenario, threads, base, is_base=True) if is_own else model
        spec_of_base = {**spec, "root": str(base.root), "path": str(other.path.absolute())}
        if shared.settings.allow_different_images:
            spec_of_base["sigmas"] = list(_levels(other.manifest, scenario.steps))
        sides.append(Side(BASE, "base", spec_of_base, base.root, base.commit, other.sha256))
    source = {"path": str(model.source.absolute())}
    return sides + [Side(peer, "peer", {**spec, **source, "peer": peer}) for peer in scenario.peers]
