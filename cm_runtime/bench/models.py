"""The models of a run, made ready once each: exported where they are checkpoints, and drawn by eager torch to compare.

What takes torch happens in workers; the process that conducts a run imports none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cm_runtime import backends
from cm_runtime.bench.builds import Build
from cm_runtime.bench.networks import STANDING
from cm_runtime.bench.results import ModelFacts
from cm_runtime.bench.scenario import Scenario
from cm_runtime.bench.worker import Spec
from cm_runtime.bench.worker_process import Process, WorkerError
from cm_runtime.errors import ArtifactError
from cm_runtime.files import atomic, streams
from cm_runtime.manifest import Manifest, data_path, parse_manifest, read_manifest

REFERENCE_IMAGES = 2


@dataclass(frozen=True)
class Model:
    """A scenario's model as a build runs it. name: as the user gave it; source: that file, a checkpoint or ``path``."""

    name: str
    path: Path
    source: Path
    sha256: str
    manifest: Manifest
    export_s: float | None = None
    gflop: float | None = None

    @property
    def is_exported(self) -> bool:
        """True where ``path`` is an exported file, and no checkpoint for torch to run."""
        return not backends.is_checkpoint(self.path)

    def facts(self) -> ModelFacts:
        """The model in a result."""
        data = data_path(self.path, self.manifest) if self.is_exported else None
        parity = self.manifest.parity
        return ModelFacts(
            path=self.name,
            sha256=self.sha256,
            source_sha256=self.manifest.source_sha256,
            image_shape=self.manifest.image_shape,
            num_classes=self.manifest.num_classes,
            precision=self.manifest.precision,
            export_parity=parity.max_abs if parity else None,
            export_s=self.export_s,
            bytes=sum(each.stat().st_size for each in (*_files(self.path), *([data] if data else []))),
            gflop=self.gflop,
        )


@dataclass
class Models:
    """The models of a run, made ready in the folder ``work``, and their reference images."""

    work: Path
    _models: dict[tuple[str, bool, str, bool], Model] = field(default_factory=dict)
    _references: dict[tuple[Path, tuple[float, ...]], Any] = field(default_factory=dict)

    def model(self, scenario: Scenario, threads: int, build: Build, is_base: bool = False) -> Model:
        """The scenario's model, exported by ``build`` where it is a checkpoint that ONNX Runtime is to run."""
        key = scenario.model, scenario.is_for_torch, scenario.file_precision, is_base
        if key not in self._models:
            source = build.model if is_base and build.model else _source(scenario.model, threads)
            if not streams.exists(source):
                raise ArtifactError(f"{source}: no such model")
            name = str(source) if is_base and build.model else scenario.model
            self._models[key] = self._ready(name, source, scenario, threads, build)
        return self._models[key]

    def _ready(self, name: str, source: Path, scenario: Scenario, threads: int, build: Build) -> Model:
        if backends.is_checkpoint(source) and scenario.is_for_torch:
            with Process(threads) as worker:
                manifest = worker.ask("manifest", checkpoint=str(source.absolute()))["manifest"]
            return Model(name, source, source, _sha256(source), parse_manifest(manifest, source))
        path, export_s = source, None
        if backends.is_checkpoint(source):
            path = self.work / f"model-{len(self._models)}.onnx"
            how = {"precision": scenario.file_precision} if scenario.file_precision != "fp32" else {}
            with Process(threads, build.root) as worker:
                answer = worker.ask("export", checkpoint=str(source.absolute()), target=str(path), **how)
            export_s = answer["export_s"]
        manifest = read_manifest(path)
        return Model(name, path, source, atomic.sha256(path), manifest, export_s, _gflop(path, threads))

    def reference(self, model: Model, spec: Spec) -> Any | str:
        """The first images as eager torch draws them on the CPU in float32, or why there is no such reference."""
        key = model.source, spec.sigmas
        if key not in self._references:
            images = self.work / "reference.npy"
            torch: dict[str, Any] = {"peer": "torch", "path": str(model.source.absolute()), "batch": REFERENCE_IMAGES}
            torch |= {"device": "cpu", "precision": "fp32"}
            try:
                with Process(spec.threads) as worker:
                    worker.ask("load", spec=vars(spec) | torch)
                    worker.ask("first", path=str(images))
                self._references[key] = np.load(images)
            except WorkerError as error:
                if not error.is_absence:  # torch is there and fails: nothing is proved by going on
                    raise
                self._references[key] = str(error)
        return self._references[key]


def _source(model: str, threads: int) -> Path:
    """The file or folder that a scenario's ``model`` names."""
    if model == "default":
        return backends.DEFAULT_MODEL
    if model not in STANDING:
        return Path(model)
    cache = atomic.cache_folder() / "bench"
    with Process(threads) as worker:
        return Path(worker.ask("standing", name=model, folder=str(cache))["path"])


def _gflop(path: Path, threads: int) -> float | None:
    """GFLOP of one evaluation of one image; None without the onnx package."""
    try:
        with Process(threads) as worker:
            return float(worker.ask("gflop", path=str(path.absolute()))["gflop"])
    except WorkerError as error:
        if error.is_absence:
            return None
        raise


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())


def _sha256(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files."""
    if path.is_file():
        return atomic.sha256(path)
    return atomic.sha256_of_files({each.relative_to(path).as_posix(): each for each in _files(path)})
