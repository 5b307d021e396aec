"""What ships of the kernels: the fatbin, the PTX, what the compiler said of them, and their names."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import host_gpu
import pytest

from cm_runtime import kernels
from cm_runtime.errors import EngineError
from cm_runtime.export import tensorrt_plugin

FOLDER = Path(kernels.__file__).parent
NVCC = shutil.which("nvcc")
# All that CUDA 13 compiles for, and so all that its TensorRT runs on
GPUS = ("75", "80", "86", "89", "90", "100", "120")
BUILDS = {"sm_80", "sm_90", "sm_120"}
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def test_the_binary_is_the_one_that_is_described() -> None:
    described = kernels.build_report()
    assert hashlib.sha256(kernels.fatbin()).hexdigest() == described["fatbin_sha256"]
    for name, each in described["sources_sha256"].items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == each, f"{name}: run make -C kernels"
    on_disk = {path.name for pattern in ("*.cu", "*.h", "Makefile") for path in FOLDER.glob(pattern)}
    assert described["sources_sha256"].keys() == on_disk


@pytest.mark.process
def test_every_kernel_is_there_for_every_gpu_and_spills_nothing() -> None:
    described = kernels.build_report()["kernels"]
    assert described.keys() == host_gpu.names()
    for name, each in described.items():
        assert each.keys() == BUILDS, name
        for gpu, has in each.items():
            assert has["spills"] == has["stack"] == 0, f"{name} on {gpu}"
            assert 0 < has["registers"] <= 128, f"{name} on {gpu}"
    content = kernels.fatbin()
    assert content[:4] == bytes.fromhex("50ed55ba")  # the magic number of a fatbin, little-endian
    assert len(content) < 2 << 20


def test_a_damaged_binary_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("kernels.fatbin", "kernels.json"):
        shutil.copy(FOLDER / name, tmp_path)
    content = bytearray((tmp_path / "kernels.fatbin").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "kernels.fatbin").write_bytes(content)
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    with pytest.raises(EngineError, match=r"kernels\.fatbin is damaged"):
        kernels.fatbin()
    (tmp_path / "kernels.fatbin").unlink()
    with pytest.raises(EngineError, match=r"kernels\.fatbin cannot be read"):
        kernels.fatbin()


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'cm_step_x' for 'sm_90'
ptxas info    : Function properties for cm_step_x
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 8 bytes cumulative stack size, 96 bytes smem, 400 bytes cmem[0]
"""
PTX = """\
.visible .entry cm_step_x(
	.param .u64 cm_step_x_param_0,
	.param .f32 cm_step_x_param_1,
	.param .align 8 .b8 cm_step_x_param_2[48],
	.param .u16 cm_step_x_param_3
)
"""


@pytest.mark.process
def test_a_spill_is_an_error(tmp_path: Path) -> None:
    """The log is one that ptxas could have written."""
    (tmp_path / "build.log").write_text(LOG)
    (tmp_path / "kernels.fatbin").write_bytes(b"")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.48\n")
    nvcc.chmod(0o755)
    (tmp_path / "k.ptx").write_text(PTX)
    files = [nvcc, tmp_path / "build.log", tmp_path / "k.ptx", tmp_path]
    words = [sys.executable, str(FOLDER / "resources.py"), *map(str, files)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "registers are spilled in cm_step_x on sm_90\n")
    (tmp_path / "build.log").write_text(LOG.replace("4 bytes spill", "0 bytes spill"))
    assert subprocess.run(words, capture_output=True, text=True).returncode == 0
    report = (tmp_path / "kernels.json").read_text()
    assert '"sm_90": {"registers": 255, "shared": 96, "stack": 8, "spills": 0}' in report
    assert '"cm_step_x": [8, 4, 48, 2]' in report


# The PTX for TensorRT


@pytest.mark.process
@needs_nvcc
def test_the_committed_ptx_is_what_the_source_compiles_to(tmp_path: Path) -> None:
    for name in ("skip_scale.cu", "portable.h", "Makefile"):
        shutil.copy(FOLDER / name, tmp_path)
    subprocess.run(["make", "--silent", "skip_scale.ptx"], cwd=tmp_path, check=True)
    assert (tmp_path / "skip_scale.ptx").read_text() == kernels.ptx("skip_scale")


@pytest.mark.process
@needs_nvcc
@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_has_code_for_the_ptx(gpu: str, tmp_path: Path) -> None:
    """Its version is old enough for any driver that runs CUDA 11, and the assembler takes it at its word."""
    (tmp_path / "k.ptx").write_text(kernels.ptx("skip_scale"))
    subprocess.run([str(NVCC), "-cubin", f"-arch=sm_{gpu}", "k.ptx", "-o", "k.cubin"], cwd=tmp_path, check=True)


def test_the_ptx_says_what_it_needs() -> None:
    ptx = kernels.ptx("skip_scale")
    assert ptx.startswith(".version 7.0\n.target sm_75\n")
    entries = dict(re.findall(r"\.visible \.entry (\w+)\((.*?)\)", ptx, re.DOTALL))
    assert entries.keys() == set(tensorrt_plugin.KERNELS.values())
    for parameters in entries.values():  # three inputs, four integers, one output
        assert re.findall(r"\.param \.(u\d+)", parameters) == ["u64"] * 3 + ["u32"] * 4 + ["u64"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_nvcc
def test_the_ladders_compile_and_without_a_gpu_say_so(tmp_path: Path) -> None:
    subprocess.run(["make", "--silent", "-C", str(FOLDER / "ladder"), f"BUILD={tmp_path}"], check=True)
    built = sorted(tmp_path.iterdir())
    assert [path.name for path in built] == ["finish", "first_noise", "group_norm", "skip_scale", "step"]
    for path in built:
        done = subprocess.run([str(path), "1"], capture_output=True, text=True)
        assert done.returncode in (0, 1)
        assert done.returncode == 0 or len((done.stdout + done.stderr).splitlines()) == 1
