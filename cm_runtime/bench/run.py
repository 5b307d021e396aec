"""A whole run: models made ready, peaks, one scenario after another, each on the disk as soon as it is done."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cm_runtime import __version__, backends, files, schedule
from cm_runtime.artifact import Manifest, data_path, read_manifest
from cm_runtime.backends.ort import NVIDIA_DRIVER, has_cuda
from cm_runtime.bench import contest, machine, peaks, results
from cm_runtime.bench.builds import Build, base_build, this_build
from cm_runtime.bench.contest import Limits, Side
from cm_runtime.bench.networks import STANDING
from cm_runtime.bench.process import Process, WorkerError
from cm_runtime.bench.results import BASE, SUBJECT, Contender, ModelFacts, Peaks, Result, ScenarioResult, Settings
from cm_runtime.bench.scenario import Scenario
from cm_runtime.errors import ArtifactError, CmRuntimeError, OutputError, RequestError

Tell = Callable[[float, str], None]
REFERENCE_IMAGES = 2


@dataclass(frozen=True)
class Model:
    """A scenario's model as a build runs it. checkpoint: of its weights, where there is one."""

    path: Path
    checkpoint: Path | None
    sha256: str
    export_s: float | None = None


@dataclass
class Run:
    """What the scenarios of a run share. against: as `builds.base_build` takes it; tell: (scenarios done, doing)."""

    settings: Settings
    against: str | None
    tell: Tell
    work: Path
    build: Build = field(default_factory=this_build)
    base: Build | None = None
    models: dict[tuple[str, str, bool], Model] = field(default_factory=dict)
    references: dict[tuple[Path, tuple[float, ...]], Any] = field(default_factory=dict)
    gflops: dict[Path, float | None] = field(default_factory=dict)

    def model(self, scenario: Scenario, threads: int, build: Build, is_base: bool = False) -> Model:
        """The scenario's model, exported by ``build`` where it is a checkpoint that ONNX Runtime is to run."""
        key = scenario.model, "torch" if scenario.backend == "torch" else "onnx", is_base
        if key not in self.models:
            self.models[key] = self._made(scenario, threads, build, is_base)
        return self.models[key]

    def _made(self, scenario: Scenario, threads: int, build: Build, is_base: bool) -> Model:
        source = _source(scenario.model, threads, self.work)
        if is_base and build.model:
            source = build.model
        if not source.exists():
            raise ArtifactError(f"{source}: no such model")
        if not backends.is_checkpoint(source):
            return Model(source, None, files.sha256(source))
        if scenario.backend == "torch":
            return Model(source, source, _sha256(source))
        target = self.work / f"{'base' if is_base else 'model'}-{len(self.models)}.onnx"
        with Process(threads, build.root) as worker:
            made = worker.ask("export", checkpoint=str(source.absolute()), target=str(target))
        return Model(target, source, files.sha256(target), made["export_s"])

    def reference(self, model: Model, spec: dict[str, Any], threads: int) -> Any | str:
        """The first images as eager torch draws them on the CPU in float32, or why it cannot."""
        source = model.checkpoint or model.path
        key = source, tuple(spec["sigmas"])
        if key not in self.references:
            asked = {
                **spec,
                "peer": "torch",
                "path": str(source.absolute()),
                "batch": REFERENCE_IMAGES,
                "device": "cpu",
            }
            images = self.work / "reference.npy"
            try:
                with Process(threads) as worker:
                    worker.ask("load", spec=asked)
                    worker.ask("first", path=str(images))
                self.references[key] = np.load(images)
            except WorkerError as error:
                self.references[key] = str(error)
        return self.references[key]

    def gflop(self, model: Model, threads: int) -> float | None:
        """Of one evaluation of one image; None without the onnx package, or for a checkpoint."""
        if backends.is_checkpoint(model.path):
            return None
        if model.path not in self.gflops:
            try:
                with Process(threads) as worker:
                    self.gflops[model.path] = worker.ask("gflop", path=str(model.path))["gflop"]
            except WorkerError as error:
                if not error.is_absence:
                    raise
                self.gflops[model.path] = None
        return self.gflops[model.path]


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

    The samples go to a file beside it. A scenario that fails is reported as failed, and the others are measured.
    Raises RequestError, OutputError.
    """
    samples = output.with_suffix(".samples.jsonl")
    for path in (output, samples):
        files.check_writable(path)
    with tempfile.TemporaryDirectory(prefix="cm-bench-") as folder, Samples(samples, output, force) as kept:
        work = Path(folder)
        shared = Run(settings, against, tell, work)
        if against is not None:
            shared.base = base_build(against, work)
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
        watch = machine.Watch()
        for place in dict.fromkeys(map(_where, scenarios)):
            tell(0, "measuring what the machine can do")
            result = _with(result, peaks=(*result.peaks, peaks.measure_peaks(*place)))
        for number, scenario in enumerate(scenarios):
            found = _scenario(scenario, shared, result.peaks, number, watch.look, kept)
            result = _with(result, scenarios=(*result.scenarios, found), samples=kept.so_far())
            results.write(result, output)
        tell(len(scenarios), "measuring again what the machine can do")
        result = _with(
            result,
            peaks=tuple(
                each.model_copy(update={"drift": peaks.drift(each, peaks.measure_peaks(each.threads, each.device))})
                for each in result.peaks
            ),
            conditions=watch.stop(),
            complete=True,
        )
        results.write(result, output)
    return result


def _with(result: Result, **update: Any) -> Result:
    return result.model_copy(update=update)


def _where(scenario: Scenario) -> tuple[int, str]:
    """(threads, device) of a scenario."""
    threads = scenario.threads or len(os.sched_getaffinity(0))
    if scenario.device != "auto":
        return threads, scenario.device
    is_gpu = NVIDIA_DRIVER.exists() if scenario.backend == "torch" else has_cuda()
    return threads, "cuda:0" if is_gpu else "cpu"


def _scenario(
    scenario: Scenario,
    shared: Run,
    measured: Sequence[Peaks],
    number: int,
    look: Callable[[], None],
    kept: Samples,
) -> ScenarioResult:
    """What was found, or why it could not be."""
    threads, device = _where(scenario)

    def tell(share: float, doing: str) -> None:
        shared.tell(number + share, f"{scenario.name}: {doing}")

    common: dict[str, Any] = {
        "name": scenario.name,
        "model": scenario.model,
        "kind": scenario.kind,
        "steps": scenario.steps,
        "batch": scenario.batch,
        "rate": scenario.rate,
        "bound_ms": scenario.bound_ms,
        "backend": scenario.backend,
        "device": device,
        "threads": threads,
    }
    try:
        tell(0, "preparing the model")
        model = shared.model(scenario, threads, shared.build)
        manifest = _manifest(model)
        sigmas = schedule.sampler_sigmas(
            scenario.steps, manifest.sigmas, manifest.sigma_min, manifest.sigma_max, manifest.rho
        )
        if manifest.is_teacher:
            raise RequestError("an EDM teacher is no consistency model, and few steps cannot sample it")
        common |= {"sigmas": sigmas, "facts": _facts(model, manifest, shared.gflop(model, threads))}
        sides = _sides(scenario, shared, model, manifest, sigmas)
        spec = sides[0].spec
        reference = shared.reference(model, spec, threads)
        limits = Limits(shared.settings.budget_s, shared.settings.interval, shared.settings.seed)

        def keep(side: str, block: int, answer: dict[str, Any]) -> None:
            kept.write(contest.line(scenario.name, side, block, answer))

        found = contest.contest(scenario, sides, threads, reference, limits, shared.work, look, tell, keep)
    except OutputError:
        raise
    except CmRuntimeError as error:
        common.setdefault("sigmas", ())
        return ScenarioResult(**common, status="failed", reason=str(error))
    peak = next(each for each in measured if (each.threads, each.device) == (threads, device))
    gflop = common["facts"].gflop
    contenders = tuple(_reckoned(each, gflop, scenario, peak) for each in found)
    return ScenarioResult(**common, engine=sides[0].facts["engine"], status="measured", contenders=contenders)


def _sides(scenario: Scenario, shared: Run, model: Model, manifest: Manifest, sigmas: Sequence[float]) -> list[Side]:
    threads, device = _where(scenario)
    backend = "torch" if backends.is_checkpoint(model.path) else "ort"
    spec: dict[str, Any] = {
        "path": str(model.path.absolute()),
        "backend": backend,
        "device": device,
        "threads": threads,
        "batch": scenario.batch,
        "sigmas": list(sigmas),
        "seed": shared.settings.seed,
        "work": str(shared.work),
        "image_shape": manifest.image_shape,
        "num_classes": manifest.num_classes,
    }
    root = str(shared.build.root)
    sides = [Side(SUBJECT, "subject", {**spec, "root": root}, shared.build.root, shared.build.commit, model.sha256)]
    if shared.base:
        other = model
        if shared.base.model or model.checkpoint:
            other = shared.model(scenario, threads, shared.base, is_base=True)
        base = {**spec, "root": str(shared.base.root), "path": str(other.path.absolute())}
        sides.append(Side(BASE, "base", base, shared.base.root, shared.base.commit, other.sha256))
    source = str((model.checkpoint or model.path).absolute())
    for peer in scenario.peers:
        folder = shared.work / f"peer-{len(shared.models)}-{peer}"
        folder.mkdir(exist_ok=True)
        sides.append(Side(peer, "peer", {**spec, "peer": peer, "path": source, "work": str(folder)}))
    return sides


def _reckoned(contender: Contender, gflop: float | None, scenario: Scenario, peak: Peaks) -> Contender:
    """With its arithmetic a second, where it is known what the network takes."""
    if gflop is None or contender.latency is None or scenario.kind == "server":
        return contender
    speed = gflop * scenario.steps * scenario.batch / (contender.latency.p50.value / 1e3)
    share = speed / peak.matrix_gflop_per_s.value
    return contender.model_copy(update={"gflop_per_s": speed, "peak_fraction": share})


def _source(model: str, threads: int, work: Path) -> Path:
    """The file or folder that a scenario's ``model`` names."""
    if model == "default":
        return backends.DEFAULT_MODEL
    if model not in STANDING:
        return Path(model)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cm-runtime" / "bench"
    cache.mkdir(parents=True, exist_ok=True)
    with Process(threads) as worker:
        return Path(worker.ask("standing", name=model, folder=str(cache))["path"])


def _manifest(model: Model) -> Manifest:
    if not backends.is_checkpoint(model.path):
        return read_manifest(model.path)
    from cm_runtime.importers import load_checkpoint

    return load_checkpoint(model.path).manifest()


def _facts(model: Model, manifest: Manifest, gflop: float | None) -> ModelFacts:
    size = _size(model.path)
    if not backends.is_checkpoint(model.path) and (data := data_path(model.path, manifest)):
        size += data.stat().st_size
    return ModelFacts(
        path=str(model.checkpoint or model.path),
        sha256=model.sha256,
        source_sha256=manifest.source_sha256,
        image_shape=manifest.image_shape,
        num_classes=manifest.num_classes,
        precision=manifest.precision,
        export_parity=manifest.parity.max_abs if manifest.parity else None,
        export_s=model.export_s,
        bytes=size,
        gflop=gflop,
    )


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in ([path] if path.is_file() else path.rglob("*")) if each.is_file())


def _sha256(path: Path) -> str:
    """Of a file, or of the names and contents of a folder's files."""
    if path.is_file():
        return files.sha256(path)
    digest = hashlib.sha256()
    for each in sorted(path.rglob("*")):
        if each.is_file():
            digest.update(json.dumps([each.relative_to(path).as_posix(), files.sha256(each)]).encode())
    return digest.hexdigest()


class Samples:
    """The file of all samples, which only grows. One run at a time has it.

    Raises OutputError where another run is writing it, and where ``result``, the file beside it, exists without force.
    """

    def __init__(self, path: Path, result: Path, force: bool) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._bytes = 0
        with _named(path):
            self._file = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if result.exists() and not force:
                raise OutputError(f"{result} exists; replace it with --force")
            self._file.truncate(0)
        except BlockingIOError as error:
            self._file.close()
            raise OutputError(f"{path} is being written by another run; give another output with -o") from error
        except OutputError:
            self._file.close()
            raise

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, line: str) -> None:
        """Appends a line."""
        data = line.encode()
        with _named(self._path):
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._digest.update(data)
        self._bytes += len(data)

    def so_far(self) -> results.Samples:
        """What of the file is on the disk and belongs to the run."""
        with _named(self._path):
            os.fsync(self._file.fileno())
        return results.Samples(file=self._path.name, bytes=self._bytes, sha256=self._digest.hexdigest())


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
