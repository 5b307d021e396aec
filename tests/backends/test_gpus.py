"""What doctor says of GPUs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in_gpu

from cm_runtime import extras
from cm_runtime.backends import gpus, ort
from cm_runtime.extras import TWO_RUNTIMES


@pytest.mark.parametrize("sign", range(3))
def test_any_sign_of_a_driver_is_one(sign: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sandboxes show the devices, and no /proc of the driver's; Windows shows a device of its own."""
    assert [path.name for path in extras.DRIVER_SIGNS] == ["version", "nvidiactl", "dxg"]
    signs = tuple(tmp_path / str(number) for number in range(3))
    monkeypatch.setattr(extras, "DRIVER_SIGNS", signs)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with_cuda = SimpleNamespace(get_available_providers=lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "require", lambda *_: with_cuda)
    assert not extras.has_driver() and not ort.has_cuda()
    signs[sign].touch()
    assert extras.has_driver() and ort.has_cuda()


def test_why_no_gpu_can_be_used_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver, none that loads, one that is too old, and one that serves."""
    monkeypatch.setattr(gpus, "has_driver", lambda: False)
    assert gpus.describe() == gpus.warn() == ""
    monkeypatch.setattr(gpus, "has_driver", lambda: True)
    with stand_in_gpu.absent():
        assert gpus.describe() == "there is no NVIDIA GPU that CUDA can use: none is here"
    with stand_in_gpu.installed(stand_in_gpu.Gpu()) as gpu:
        assert gpus.describe() == "by stand-in: cuda:0 Stand-in 4090"
        gpu.driver_version = 12040
        assert gpus.describe().startswith("this NVIDIA driver is of CUDA 12.4; the kernels need one of CUDA 13 (580")


def test_conflicts_and_missing_libraries_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "Failed to load libcublas.so.13: pip install 'cm-runtime[gpu]'"
    monkeypatch.setattr(ort, "missing_library", lambda: line)
    monkeypatch.setattr(gpus, "has_driver", lambda: True)
    monkeypatch.setattr(gpus, "has_two_runtimes", lambda: False)
    assert gpus.warn() == ""  # a build for the CPU needs none
    monkeypatch.setattr(gpus, "distribution_version", lambda name: "1.31.1" if name == "onnxruntime-gpu" else "")
    assert gpus.warn() == line
    monkeypatch.setattr(gpus, "has_two_runtimes", lambda: True)
    assert gpus.warn() == TWO_RUNTIMES
