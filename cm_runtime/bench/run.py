"""A whole run: peaks, one scenario after another, each on the disk as soon as it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from cm_runtime.bench.rounds import Observer, contest
from cm_runtime.bench.samples import Samples
from cm_runtime.bench.scenario import Scenario, title
from cm_runtime.bench.worker import Block, Spec
from cm_runtime.errors import CmRuntimeError, OutputError, RequestError
from cm_runtime.extras import has_driver
from cm_runtime.files import atomic
from cm_runtime.files.workspaces import scratch
from cm_runtime.manifest import Manifest
from cm_runtime.subprocesses import cores

Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class Session:
    """Parts of a run that its scenarios share. tell: (scenarios finished, activity)."""

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
    tell: Tell = lambda count, activity: None,
) -> Result:
    """Measure ``scenarios`` into ``output``, which is replaced after each of them; returns the whole.

    A finished result that is there stays until this one is finished. The samples go to a file beside it. A scenario
    that fails is reported as failed, and the others are measured. Raises RequestError, OutputError.
    """
    atomic.check_writable(output)
    with scratch("cm-bench") as work, Samples(output, force) as samples:
        base = None if against is None else base_build(against, work)
        session = Session(settings, work, Models(work), samples, Watch(), this_build(), base, tell)
        result = Result(
            tool=f"cm-runtime {__version__}",
            commit=session.build.commit,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            command=command,
            complete=False,
            settings=settings,
            machine=machine.machine(),
            planned=len(scenarios),
            left_out=tuple(left_out),
        )
        for place in dict.fromkeys(map(_place, scenarios)):
            tell(0, "measuring what the machine can do")
            result = result.model_copy(update={"peaks": (*result.peaks, peaks.measure_peaks(*place))})
        for number, scenario in enumerate(scenarios):
            rates = next(each for each in result.peaks if (each.threads, each.device) == _place(scenario))
            scenarios_so_far = (*result.scenarios, _measure_scenario(scenario, session, rates, number))
            result = result.model_copy(update={"scenarios": scenarios_so_far, "samples": samples.sync()})
            samples.keep(result)
        tell(len(scenarios), "measuring again what the machine can do")
        drifts = [peaks.drift(each, peaks.measure_peaks(each.threads, each.device)) for each in result.peaks]
        update = {
            "peaks": tuple(p.model_copy(update={"drift": d}) for p, d in zip(result.peaks, drifts, strict=True)),
            "conditions": session.watch.stop(),
            "complete": True,
        }
        result = result.model_copy(update=update)
        samples.keep(result)
    return result


def _place(scenario: Scenario) -> tuple[int, str]:
    """(threads, device) of a scenario."""
    threads = scenario.threads or cores()
    if scenario.device != "auto":
        return threads, scenario.device
    is_gpu = has_driver() if scenario.is_for_torch else has_cuda()
    return threads, "cuda:0" if is_gpu else "cpu"


def _measure_scenario(scenario: Scenario, session: Session, rates: Peaks, number: int) -> ScenarioResult:
    """The scenario's contenders, or why there are none. rates: the peaks of its threads and device."""
    threads, device = _place(scenario)
    settings = scenario.model_dump(
        include={"model", "kind", "steps", "batch", "rate", "bound_ms", "backend", "precision"}
    )
    common: dict[str, Any] = {"name": scenario.name, **settings, "device": device, "threads": threads, "sigmas": ()}

    def tell(share: float, activity: str) -> None:
        session.tell(number + share, f"{title(scenario.name)}: {activity}")

    def keep(side: str, index: int, block: Block) -> None:
        session.samples.write(summary.line(scenario.name, side, index, block))

    try:
        tell(0, "preparing the model")
        model = session.models.model(scenario, threads, session.build)
        manifest = model.manifest
        if manifest.is_teacher:
            raise RequestError("an EDM teacher is no consistency model, and few steps cannot sample it")
        common["sigmas"] = sigmas = _levels(manifest, scenario.steps)
        common["facts"] = model.facts()
        sides = _sides(scenario, session, model, sigmas)
        reference = session.models.reference(model, sides[0].spec)
        observer = Observer(session.watch.look, tell, keep)
        contest(scenario, sides, reference, session.settings, session.work, observer)
    except OutputError:
        raise
    except CmRuntimeError as error:
        return ScenarioResult(**common, status="failed", reason=str(error))
    assert sides[0].facts is not None  # it was measured
    contenders = tuple(summary.contender(side, sides[0], scenario, model.gflop, rates) for side in sides)
    return ScenarioResult(**common, engine=sides[0].facts.engine, status="measured", contenders=contenders)


def _levels(manifest: Manifest, steps: int) -> tuple[float, ...]:
    """The model's noise levels for ``steps``."""
    return manifest.noise_range.levels(steps, manifest.sigmas)


def _sides(scenario: Scenario, session: Session, model: Model, sigmas: Sequence[float]) -> list[Side]:
    threads, device = _place(scenario)
    build, base = session.build, session.base
    spec = Spec(
        path=str(model.path.absolute()),
        backend="ort" if scenario.backend == "auto" else scenario.backend,
        device=device,
        threads=threads,
        batch=scenario.batch,
        sigmas=tuple(sigmas),
        seed=session.settings.seed,
        image_shape=model.manifest.image_shape,
        num_classes=model.manifest.num_classes,
        work=str(session.work),
        root=str(build.root),
        precision=scenario.precision,
    )
    sides = [Side(SUBJECT, "subject", spec, build.root, build.commit, model.sha256)]
    if base:
        is_own = base.model or model.source != model.path  # its model, or its export
        other = session.models.model(scenario, threads, base, is_base=True) if is_own else model
        sigmas = _levels(other.manifest, scenario.steps) if session.settings.allow_different_images else spec.sigmas
        base_spec = replace(spec, root=str(base.root), path=str(other.path.absolute()), sigmas=sigmas)
        sides.append(Side(BASE, "base", base_spec, base.root, base.commit, other.sha256))
    source = str(model.source.absolute())
    return sides + [Side(peer, "peer", replace(spec, path=source, root="", peer=peer)) for peer in scenario.peers]
