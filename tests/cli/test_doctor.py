"""``cm-runtime doctor``."""

import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import exported
import pytest

Cli = Callable[..., Any]


def lines(text: str) -> dict[str, str]:
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines()}


def test_it_names_versions_cores_engine_and_model(cli: Cli) -> None:
    outcome = cli("doctor")
    assert (outcome.code, outcome.err) == (0, "")
    said = lines(outcome.out)
    assert platform.python_version() in said["cm-runtime"]
    assert said["cores"] == str(len(os.sched_getaffinity(0)))
    for package in ("numpy", "torch", "onnx", "onnxruntime", "onnxscript", "pooch"):
        assert said[package] == metadata.version(package)
    assert "ort" in said["auto"] and "openvino" in said["auto"] and "device cpu" in said["auto"]
    assert said["precision"].startswith("ort: the file's")
    assert said["model"] == "the bundled model draws 1x28x28 images"


def test_what_auto_measured_is_said(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "whichever is faster; measured on first use" in lines(cli("doctor").out)["auto"]
    assert cli("sample", "--count", 1, "--steps", 1, "--batch", 8, "-o", "x.npz").code == 0
    said = lines(cli("doctor").out)["auto"]
    assert "measured at batch 8: " in said and "ort" in said and "openvino" in said and " ms" in said


def test_a_missing_package_is_named_with_the_command_that_brings_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.packages_distributions()
    kept = {package: names for package, names in real.items() if package not in ("torch", "onnxruntime")}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: kept)
    said = lines(cli("doctor").out)
    assert said["torch"] == "missing: pip install 'cm-runtime[train]'"
    assert said["onnxruntime"] == "missing: pip install 'cm-runtime[cpu]'"
    assert said["onnx"] == metadata.version("onnx")


def test_it_works_where_nothing_optional_is_installed(tmp_path: Path) -> None:
    start = exported.hiding("torch", "onnx", "onnxruntime", "onnxscript", "openvino", "pooch", "tomli_w", "scipy")
    done = exported.command("doctor", cwd=tmp_path, start=start)
    assert (done.returncode, done.stderr) == (0, "")
    assert "pip install 'cm-runtime[cpu]'" in lines(done.stdout)["auto"]
