"""``cm-runtime doctor``."""

import json
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exports
import pytest

from cm_runtime.backends import ort
from cm_runtime.cuda import sampler
from cm_runtime.extras import EXTRAS
from cm_runtime.subprocesses import cores

Cli = Callable[..., Any]


def lines(text: str) -> dict[str, str]:
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines()}


@pytest.mark.process
def test_it_names_versions_cores_engine_and_model(cli: Cli) -> None:
    outcome = cli("doctor")
    assert (outcome.code, outcome.err) == (0, "")
    said = lines(outcome.out)
    assert platform.python_version() in said["cm-runtime"]
    assert said["cores"] == str(cores())
    for package in ("numpy", "torch", "onnx", "onnxscript", "pooch"):
        assert said[package] == metadata.version(package)
    import onnxruntime

    assert said["onnxruntime"].startswith(f"{onnxruntime.__version__} (") and "CPU)" in said["onnxruntime"]
    assert said["gpu"]  # a driver, or that there is none
    columns = {len(line) - len(line.split(maxsplit=1)[1]) for line in outcome.out.splitlines()[1:] if line[-1] != ":"}
    assert columns == {17}
    assert "ort" in said["auto"] and "openvino" in said["auto"] and "device cpu" in said["auto"]
    assert said["precision"].startswith("ort: the file's")
    assert said["model"] == "the bundled model draws 1x28x28 images"


@pytest.mark.slow
def test_what_auto_measured_is_said(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "whichever is faster; measured on first use" in lines(cli("doctor").out)["auto"]
    assert cli("sample", "--count", 1, "--steps", 1, "--batch", 8, "-o", "x.npz").code == 0
    said = lines(cli("doctor").out)["auto"]
    assert "measured at batch 8: " in said and "ort" in said and "openvino" in said and " ms" in said
    assert cli("doctor", "--forget").out == "auto             forgot 1 remembered choice\n"
    assert cli("doctor", "--forget").out == "auto             forgot 0 remembered choices\n"
    assert "measured on first use" in lines(cli("doctor").out)["auto"]


def test_a_missing_package_is_named_with_the_command_that_brings_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.packages_distributions()
    kept = {package: names for package, names in real.items() if package not in ("torch", "onnxruntime")}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: kept)
    said = lines(cli("doctor").out)
    assert said["torch"] == said["onnxruntime"] == "missing"
    for extra in ("train", "cpu"):  # one line for each purpose
        assert cli("doctor").out.count(f"install        pip install 'cm-runtime[{extra}]'") == 1
    assert said["onnx"] == metadata.version("onnx")


@pytest.mark.process
def test_it_works_where_nothing_optional_is_installed(tmp_path: Path) -> None:
    start = exports.hiding("torch", "onnx", "onnxruntime", "onnxscript", "openvino", "pooch", "tomli_w", "scipy")
    done = exports.command("doctor", cwd=tmp_path, start=start)
    assert (done.returncode, done.stderr) == (0, "")
    assert "pip install 'cm-runtime[cpu]'" in lines(done.stdout)["auto"]


def test_every_optional_package_has_a_purpose() -> None:
    named = [name for names in sys.modules["cm_runtime.cli.doctor"].PURPOSES.values() for name in names]
    assert sorted(named) == sorted(["numpy", *EXTRAS])


@pytest.mark.process
def test_as_json(cli: Cli) -> None:
    content = json.loads(cli("doctor", "--json").out)
    assert content["packages"]["to train and export"]["onnx"] == metadata.version("onnx")
    assert content["cores"] == cores() and content["warning"] == ""


@pytest.mark.process
def test_two_onnx_runtimes_are_told_with_the_cure(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the error of a GPU that is asked for, where the module that is left has no CUDA."""
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.31.1" if name == "onnxruntime-gpu" else real(name))
    cure = "pip uninstall -y onnxruntime && pip install --force-reinstall onnxruntime-gpu"
    assert f"warning          two ONNX Runtimes: {cure}\n" in cli("doctor").out
    monkeypatch.setattr(ort, "has_driver", lambda: True)
    outcome = cli("sample", "--backend", "ort", "--device", "cuda:0", "--count", 1)
    assert outcome.code == 1 and outcome.err.splitlines()[-1].endswith(cure)


@pytest.mark.parametrize("words", [("--device", "cuda:0"), ("--device", "cuda:1", "--backend", "ort")])
def test_without_a_driver_that_is_what_is_missing(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    for module in (ort, sampler):
        monkeypatch.setattr(module, "has_driver", lambda: False)
    outcome = cli("sample", *words, "--count", 1)
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert "there is no NVIDIA driver here" in outcome.err and "pycuda" not in outcome.err


@pytest.mark.process
def test_an_engine_that_cannot_start_is_a_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no thread can be started."""
    from cm_runtime.backends import openvino

    def fail() -> None:
        raise RuntimeError("Resource temporarily unavailable")

    monkeypatch.setattr(openvino, "package", lambda: SimpleNamespace(Core=fail))
    monkeypatch.setattr(openvino, "_start_core", openvino._start_core.__wrapped__)  # whose cache is not to be touched
    outcome = cli("doctor")
    assert (outcome.code, outcome.err) == (0, "")
    assert "OpenVINO cannot start: Resource temporarily unavailable" in lines(outcome.out)["auto"]
