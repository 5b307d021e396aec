"""The reference that images are held to: an absent one is told of, a failing one ends the scenario."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cm_runtime import backends
from cm_runtime.bench import models
from cm_runtime.bench.worker import Spec
from cm_runtime.bench.worker_process import WorkerError
from cm_runtime.manifest import read_manifest

SPEC = Spec("m.onnx", "ort", "cpu", 1, 4, (80.0,), 0, (1, 28, 28), 10, "work")


@pytest.mark.parametrize("is_absence", [True, False])
def test_a_reference_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_absence: bool) -> None:
    asked = []

    class Failing:
        def __init__(self, threads: int) -> None: ...
        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *_: object) -> None: ...
        def ask(self, do: str, **what: Any) -> dict[str, Any]:
            asked.append(do)
            raise WorkerError("no torch", is_absence)

    monkeypatch.setattr(models, "Process", Failing)
    path = backends.DEFAULT_MODEL
    model = models.Model("default", path, path, "", read_manifest(path))
    made = models.Models(tmp_path)
    if is_absence:
        for _ in range(2):
            assert made.reference(model, SPEC) == "no torch"
        assert asked == ["load"]  # once for all scenarios
    else:
        with pytest.raises(WorkerError, match="no torch"):
            made.reference(model, SPEC)
