"""What pip makes of the tree: one top-level package that holds every module and data file, wherever it stands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from setuptools import find_packages

import cm_runtime as cm
from cm_runtime.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[2:]:
    file = importlib.import_module(name).__file__
    assert file.startswith(sys.argv[1]), f"{name} came from {file}"
"""


def package_files() -> set[str]:
    """Every file of the package in this tree, through the links, named as in a wheel: modules, presets, models.

    Not caches, not hidden files, and not what only a reader of the tree needs: a folder's README.md, the ladder.
    """
    found = set()
    for folder, _, names in os.walk(ROOT / "cm_runtime", followlinks=True):
        where = Path(folder).relative_to(ROOT)
        if "__pycache__" not in where.parts and where.name != "ladder":
            found |= {(where / name).as_posix() for name in names if name[0] != "."}
    return {name for name in found if not name.endswith("/README.md") or name.startswith("cm_runtime/models/")}


def packages_of(files: set[str]) -> list[str]:
    """The dotted names of the folders that hold Python files."""
    return sorted({name.rpartition("/")[0].replace("/", ".") for name in files if name.endswith(".py")})


def modules_of(files: set[str]) -> list[str]:
    """The dotted names of the Python files."""
    return sorted(name[:-3].replace("/", ".").removesuffix(".__init__") for name in files if name.endswith(".py"))


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str | Path, cwd: Path) -> None:
    """Runs pip without dependencies, so without the network."""
    run(sys.executable, "-m", "pip", *arguments, "--no-deps", "--quiet", "--disable-pip-version-check", cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a clean copy of this tree: what git tracks, or would if it were added."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0"):
        if name and os.path.lexists(ROOT / name):
            copy = folder / "tree" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy, follow_symlinks=False)
    pip("wheel", ".", "--no-build-isolation", "--wheel-dir", folder, cwd=folder / "tree")
    (built,) = folder.glob("*.whl")
    return built


def test_setuptools_finds_every_folder_with_python_files() -> None:
    """The two that stand elsewhere in the tree among them, through the links."""
    find = PROJECT["tool"]["setuptools"]["packages"]["find"]
    assert sorted(find_packages(str(ROOT), **find)) == packages_of(package_files())
    linked = {path.name: os.readlink(path) for path in ROOT.glob("cm_runtime/*") if path.is_symlink()}
    assert linked == {"export": "../export", "kernels": "../kernels"}


@pytest.mark.process
def test_a_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    """One top-level package with all files of the tree in their places, the licence and nothing more."""
    names = set(zipfile.ZipFile(wheel).namelist())
    information = f"cm_runtime-{cm.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"cm_runtime", information}
    assert {name for name in names if name.startswith("cm_runtime/")} == package_files()
    assert {"cm_runtime/py.typed", "cm_runtime/export/__init__.py", f"{information}/licenses/LICENSE"} <= names
    assert any(name.startswith("cm_runtime/training/presets/") for name in names)


@pytest.mark.slow
@pytest.mark.process
def test_every_module_of_an_installed_wheel_loads(wheel: Path, tmp_path: Path) -> None:
    """From where it was installed, away from the tree; and the command starts."""
    home = tmp_path / "site"
    pip("install", "--no-compile", "--target", home, wheel, cwd=tmp_path)
    modules = modules_of(package_files())
    assert {"cm_runtime", "cm_runtime.cli.sample", "cm_runtime.export.to_onnx"} < set(modules)
    modules.remove("cm_runtime.__main__")  # runs the command line
    run(sys.executable, "-c", IMPORT_ALL, f"{home}/", *modules, cwd=tmp_path, PYTHONPATH=str(home))
    for command in ([home / "bin" / "cm-runtime"], [sys.executable, "-m", "cm_runtime"]):
        assert run(*command, "--version", cwd=tmp_path, PYTHONPATH=str(home)) == f"cm-runtime {cm.__version__}\n"


def test_constraints_pin_what_the_environments_need() -> None:
    """Each requirement of the project and of the extras that make installs is pinned, and pins name no index."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9.]*", line)] == []
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    needed += [requirement for extra in ("cpu", "train", "dev") for requirement in extras[extra]]
    names = {re.split(r"[^a-z0-9-]", requirement)[0] for requirement in needed} - {"cm-runtime"}
    assert names <= {line.partition("==")[0] for line in lines}


def names_of(extra: str) -> set[str]:
    """The distributions that an extra asks for, those of the extras that it names included."""
    names = set()
    for requirement in PROJECT["project"]["optional-dependencies"][extra]:
        name, *extras = re.split(r"[\[,\]]", re.split(r"[<>=~!; ]", requirement)[0])
        if name == "cm-runtime":
            names |= {each for inner in filter(None, extras) for each in names_of(inner)}
        else:
            names.add(name)
    return names


def test_one_build_of_onnxruntime_comes_with_an_extra() -> None:
    """onnxruntime and onnxruntime-gpu are one module, so that whoever asks for both gets whichever comes last."""
    extras = PROJECT["project"]["optional-dependencies"]
    assert {extra for extra in extras if "onnxruntime" in names_of(extra)} == {"cpu", "dev"}
    assert {extra for extra in extras if "onnxruntime-gpu" in names_of(extra)} == {"gpu"}


def test_pycuda_which_is_built_on_installing_comes_by_itself() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert {extra for extra in extras if "pycuda" in names_of(extra)} == {"pycuda"}


def test_an_extra_for_a_gpu_brings_all_that_it_needs() -> None:
    """The driver's binding with each, and the libraries that ONNX Runtime's CUDA provider is linked with."""
    assert all("cuda-bindings" in names_of(extra) for extra in ("gpu", "pycuda", "tensorrt", "tensorrt-rtx"))
    (runtime,) = (each for each in PROJECT["project"]["optional-dependencies"]["gpu"] if "onnxruntime" in each)
    assert runtime.startswith("onnxruntime-gpu[cuda,cudnn]>=1.31")  # before that, libraries of CUDA 12


@pytest.mark.parametrize("package", EXTRAS)
def test_extra_that_an_error_names_brings_the_package(package: str) -> None:
    distribution = {"cuda.bindings": "cuda-bindings"}.get(package, package.replace("_", "-"))
    assert distribution in names_of(EXTRAS[package])
