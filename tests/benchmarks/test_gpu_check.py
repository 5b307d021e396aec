"""The parts of `make gpu-check` on a CPU: both sides compute the same in one type, and what is missing is told."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import stand_in_gpu
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_check
from gpu import contenders, plan, race, suites, survey
from gpu.findings import Findings

from cm_runtime import backends, export
from cm_runtime.backends.ort import OrtBackend
from cm_runtime.bench.networks import random_checkpoint
from cm_runtime.checkpoints.native import save_checkpoint
from cm_runtime.cuda.device import Device
from cm_runtime.cuda.sampler import OnDevice
from cm_runtime.errors import EngineError

ROOT = Path(__file__).parents[2]

# Races


class Drawer(contenders.Contender):
    """Images of one grey level with noise of ``error`` around it, after a while."""

    def __init__(self, error: float, seconds: float = 0.001, fails: str = "") -> None:
        self.error, self.seconds, self.fails, self.kept = error, seconds, fails, 0

    def draw(self) -> np.ndarray:
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            with suppress(Exception):  # as a compiler may
                time.sleep(0.001)
        if self.fails == "draw":
            raise RuntimeError("no kernel image\nis available")
        image = np.full((4, 2, 2, 3), 100.0)
        image[:, 0] += self.error * 2**0.5
        return image.round().astype(np.uint8)

    def keep(self) -> None:
        self.kept += 1

    def outside(self) -> float | None:
        if self.fails == "outside":
            raise ValueError("no graph")
        return 0.015


REFERENCE = np.full((3, 2, 2, 3), 100, np.uint8)


def compare(seconds: float = 60.0, **drawers: Drawer) -> dict[str, Any]:
    end = time.monotonic() + seconds
    loaders: dict[str, Callable[[], contenders.Contender]] = {
        name.replace("_", " "): lambda each=each: each for name, each in drawers.items()
    }
    return race.compare(loaders, REFERENCE, lambda: end - time.monotonic())


def test_what_errs_more_than_twice_fails_or_is_late_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agreement comes before time, and is with float32: as far as the plain network of that type is from it."""
    monkeypatch.setattr(race, "LONGEST", 0.2)
    monkeypatch.setattr(race, "PREPARATION", 2.0)
    late = Drawer(0, seconds=60)
    result = compare(
        torch=Drawer(3),
        close=Drawer(6, 0.004),
        wrong=Drawer(8),
        broken=Drawer(0, fails="draw"),
        compiler=late,
        cm_runtime=Drawer(0, fails="outside"),
    )
    assert result["ms"].keys() == {"torch", "close", "cm runtime"}
    assert result["absent"] == {
        "wrong": "7.778 grey levels from float32, where torch is 2.828",
        "broken": "RuntimeError: no kernel image",
    }
    assert result["late"] == ["compiler"]
    assert late.kept == 1, "what a compiler has until then is saved"
    assert result["outside"]["torch"] == 0.015
    assert result["outside"]["cm runtime"] == "ValueError: no graph", "and no time is lost to it"
    middle, low, high = result["ms"]["close"]
    assert 4 <= low <= middle <= high
    assert result["rounds"] >= 5


def test_not_a_number_agrees_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "LONGEST", 0.05)
    monkeypatch.setattr(race, "distance", lambda images, _: float("nan") if images.max() > 101 else 0.0)
    assert compare(torch=Drawer(0), wrong=Drawer(6))["absent"].keys() == {"wrong"}


def test_without_the_plain_network_nothing_can_be_compared() -> None:
    with pytest.raises(RuntimeError, match="torch, which others are held to, drew none: RuntimeError: no kernel image"):
        compare(torch=Drawer(0, fails="draw"), other=Drawer(0))


def test_outside_compares_a_graph_of_the_evaluations_with_a_graph_of_the_request() -> None:
    """3 of a request's 4 ms in evaluations are a quarter outside, whatever eager evaluations take."""
    log: list[Any] = []

    def capture(device: Any, body: Callable[[], None]) -> Any:
        body()
        evaluations = [entry for entry in log if entry[0] == "evaluate"]
        return SimpleNamespace(launch=lambda: log.append(("graph", evaluations)))

    engine = SimpleNamespace(graph="network", capture=capture)
    batch = SimpleNamespace(evaluate=lambda k: log.append(("evaluate", k)), put=lambda *_: log.append(("put",)))

    def milliseconds(body: Callable[[], None]) -> float:
        body()
        return {"graph": 3.0, "put": 4.0, "evaluate": 9.0}[log[-1][0]]

    device = SimpleNamespace(use=lambda action: nullcontext())
    assert contenders.share_outside(engine, device, batch, milliseconds) == 0.25
    evaluations = [("evaluate", k) for k in range(contenders.STEPS)]
    assert [entry for entry in log if entry[0] == "evaluate"] == evaluations, "captured once, in their order"
    assert log[-2:] == [("graph", evaluations), ("put",)]
    engine.capture = lambda device, body: None  # ONNX Runtime's way
    assert contenders.share_outside(engine, device, batch, milliseconds) == 1 - 9 / 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, make_config: Any) -> Path:
    path = tmp_path_factory.mktemp("networks") / "tiny.pt"
    save_checkpoint(random_checkpoint(make_config(num_classes=5, attention=(4,))), path)
    return path


@pytest.fixture
def host_engines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What only a GPU's machine has is made by what is here: torch without its compiler, TensorRT by ONNX Runtime."""
    log: list[str] = []
    load = backends.load

    def build(onnx: Path, path: Path, *, package: str, batches: list[int]) -> None:
        log.append(f"{package} {batches}")
        shutil.copy(onnx, path.with_suffix(".onnx"))
        path.touch()

    def load_on_host(path: Path, *arguments: Any, **options: Any) -> Any:
        return (
            load(path.with_suffix(".onnx"), "ort", "cpu")
            if path.suffix == ".engine"
            else load(path, *arguments, **options)
        )

    def compile(f: Any, **options: Any) -> Any:
        log.append(f"compile {options['fullgraph']} {options['dynamic']}")
        return f

    monkeypatch.setattr(export, "tensorrt", build)
    monkeypatch.setattr(backends, "load", load_on_host)
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(race, "LONGEST", 0.05)
    return log


@pytest.mark.quick("torch", "tensorrt", "compiled")  # torch's own exporter, onnxruntime's peer, takes long
@pytest.mark.parametrize("part", plan.RACES)
def test_every_contender_of_every_race_draws_the_same(
    part: str, tiny: Path, tmp_path: Path, host_engines: list[str]
) -> None:
    """With host engines in the GPU's place: each is constructed, agrees and is timed."""
    options = plan.Options("cpu", (str(tiny),), (3,), ("fp32",), tmp_path / "work", tmp_path / "caches")
    result = race.race(options, (str(tiny), "fp32", 3), plan.RACES[part], 600)
    assert (result["absent"], result["late"]) == ({}, [])
    assert tuple(result["ms"]) == plan.RACES[part]
    assert all(grey <= race.GREY for grey in result["grey"].values())
    wanted = {"torch": ["compile True False"], "compiled": ["compile True False"] * 2}
    assert [line for line in host_engines if "compile" in line] == wanted.get(part, [])
    if part == "tensorrt":
        assert host_engines == ["tensorrt [3]", "tensorrt_rtx [3]"], "an engine for this batch alone"


class InStream:
    """ONNX Runtime's CPU as an engine whose evaluations wait in the stand-in's stream, and are captured in a graph."""

    def __init__(self, engine: OrtBackend, gpu: stand_in_gpu.Gpu) -> None:
        self._engine, self._gpu = engine, gpu
        self.manifest, self.graph, self.outputs, self.images = (
            engine.manifest,
            engine.graph,
            engine.outputs,
            engine.images,
        )
        self.on_device = OnDevice(Device())

    def bind(self, device: Device, count: int) -> Any:
        evaluate, stream = self._engine.bind(device, count), self._gpu.streams[device.stream]
        return lambda addresses: stream.add(lambda: evaluate(addresses))

    def capture(self, device: Device, body: Callable[[], Any]) -> Any:
        return device.capture(body)


@pytest.mark.process
def test_outside_is_asked_of_the_sampler_that_draws(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the stand-in, where a graph takes a millisecond for each of its nodes: 2 evaluations among a request's."""
    setting = contenders.Setting(tiny, "fp32", 3, "cuda:0", tmp_path, tmp_path)
    path = contenders.graph(setting, "cpu")
    with stand_in_gpu.installed(stand_in_gpu.Gpu()) as gpu:

        class Timer:
            def __init__(self, device: Device) -> None:
                self.device = device

            def milliseconds(self, body: Callable[[], None]) -> float:
                self.device.finish()
                body()
                count = len(gpu.streams[self.device.stream].queue)
                self.device.finish()
                return count

        monkeypatch.setattr("gpu.bandwidth.Timer", Timer)
        own = contenders.Own(setting, lambda _: InStream(OrtBackend(path), gpu))
        share = own.outside()
        captures = [int(line.split()[1]) for line in gpu.log if line.startswith("capture")]
    request, evaluations = captures
    assert evaluations == contenders.STEPS
    assert share == pytest.approx(1 - evaluations / request, abs=1e-4)


def test_a_sampler_that_goes_through_the_host_is_not_raced(tiny: Path, tmp_path: Path) -> None:
    """On a GPU it would be timed in the name of one that stays there."""
    setting = contenders.Setting(tiny, "fp32", 3, "cuda:0", tmp_path, tmp_path)
    with pytest.raises(EngineError, match="goes through the host"):
        contenders.Own(setting, lambda _: SimpleNamespace(on_device=None))


def test_races_have_every_contender() -> None:
    assert {name for names in plan.RACES.values() for name in names} == set(contenders.CONTENDERS)
    assert all(names[0] == "torch" for names in plan.RACES.values()), "the yardstick"


@pytest.mark.parametrize("precision", plan.PRECISIONS)
def test_both_sides_of_a_race_compute_in_one_type(precision: str, tiny: Path, tmp_path: Path) -> None:
    """Convolutions of the plain network in the race's type and channels_last; norms in float32."""
    setting = contenders.Setting(tiny, precision, 3, "cpu", tmp_path, tmp_path)
    plain = contenders.Plain(setting)
    seen: list[tuple[torch.dtype, bool]] = []
    for module in plain._model.F.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(
                lambda m, x: seen.append((x[0].dtype, x[0].is_contiguous(memory_format=torch.channels_last)))
            )
        elif isinstance(module, torch.nn.GroupNorm):
            assert module.weight.dtype == torch.float32
    plain.draw()
    assert {dtype for dtype, _ in seen} == {contenders.DTYPES[precision]}
    assert all(is_last for _, is_last in seen)
    images = plain.draw()
    assert images.shape == (3, 8, 8, 3) and images.std() > 10


# What is there, and what is told


def test_what_is_missing_is_told_in_one_table_and_skipped_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = dict.fromkeys((*survey.BASE, "torch", "cuda-bindings", "pytest", "triton"), "1.0")
    facts = {"gpu": {"name": "H", "capability": "9.0"}, "no_gpu": "", "there": there}
    monkeypatch.setattr(gpu_check, "facts", lambda: facts)
    started: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(gpu_check, "start_child", lambda part, seconds, words: started.append((part.name, words)))
    path = tmp_path / "gpu.json"
    assert gpu_check.main(["-o", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "pydantic           1.0" in err and "onnxruntime-gpu    missing" in err and "ONNX Runtime on the GPU" in err
    assert list(dict.fromkeys(name for name, _ in started)) == ["bandwidth", "kernels", "ops", "torch", "compiled"]
    assert "- skipped: tensorrt: missing: onnx, onnxscript, tensorrt|tensorrt-rtx" in out
    assert "- skipped: onnxruntime: missing: onnx, onnxscript, onnxruntime-gpu" in out
    assert "- skipped: sanitizer: missing: compute-sanitizer" in out
    assert gpu_check.main(["--show", str(path)]) == 0
    (_, words), *_ = started
    child = gpu_check.parse([*words[1:], "--child", "torch", "60"])
    assert (child.device, child.output, child.child) == ("cuda:0", path, ["torch", "60"])
    assert [part.name for part in gpu_check.select(child)] == list(gpu_check.PARTS)


@pytest.mark.process
def test_without_a_gpu_the_kernels_alone_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = survey.facts() | {"gpu": None, "no_gpu": "there is none"}
    monkeypatch.setattr(gpu_check, "facts", lambda: facts)
    started: list[str] = []
    monkeypatch.setattr(gpu_check, "start_child", lambda part, seconds, words: started.append(part.name))
    assert gpu_check.main(["-o", str(tmp_path / "gpu.json")]) == 0
    assert set(started) == {"kernels"}
    assert Findings(tmp_path / "gpu.json").content["skipped"]["torch"] == "missing: GPU"


@pytest.mark.process
def test_a_machine_without_packages_is_told_so(tmp_path: Path) -> None:
    """The command itself needs the standard library alone."""
    words = [sys.executable, "-S", str(ROOT / "benchmarks" / "gpu_check.py"), "-o", str(tmp_path / "gpu.json")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "pydantic           missing" in done.stderr
    assert "- skipped: kernels: missing: numpy, pillow, pydantic, rich, typer, pytest" in done.stdout


class Code(int):
    name = property(lambda self: "CUDA_ERROR_NO_DEVICE")


@pytest.mark.parametrize(
    ("version", "failing", "wanted"),
    [
        (13000, "", {"name": "H", "capability": "9.0", "cuda": "13.0", "GB": 151}),
        (12080, "", "RuntimeError: the driver is of CUDA 12, the kernels need 13"),
        (13000, "cuInit", "RuntimeError: CUDA failed in cuInit: CUDA_ERROR_NO_DEVICE"),
    ],
)
def test_the_gpu_is_asked_for_by_cuda_bindings(
    monkeypatch: pytest.MonkeyPatch, version: int, failing: str, wanted: Any
) -> None:
    """No pycuda is needed, and no context is made."""
    answers = {
        "cuInit": lambda flags: (),
        "cuDriverGetVersion": lambda: (version,),
        "cuDeviceGet": lambda number: (number,),
        "cuDeviceGetAttribute": lambda kind, device: ({"MAJOR": 9, "MINOR": 0}[kind],),
        "cuDeviceGetName": lambda size, device: (b"H".ljust(size, b"\0"),),
        "cuDeviceTotalMem": lambda device: (150754820096,),
    }
    functions = {
        name: lambda *a, name=name, f=f: (Code(100 if name == failing else 0), *f(*a)) for name, f in answers.items()
    }
    kinds = {f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{side}": side for side in ("MAJOR", "MINOR")}
    driver = SimpleNamespace(CUdevice_attribute=SimpleNamespace(**kinds), **functions)
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    assert survey.find_gpu() == wanted


def test_without_cuda_bindings_torch_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    each = SimpleNamespace(name="H", major=9, minor=0, total_memory=150754820096)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: each)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert survey.find_gpu() == {"name": "H", "capability": "9.0", "cuda": "13.0", "GB": 151}


# Files of tests


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the project's, with two files of tests."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "conftest.py").write_text("import shared\n")
    (tests / "shared.py").write_text("")
    (tests / "test_bad.py").write_text(
        "import os, carried\ndef test_a(): assert carried and False\n"
        "def test_b(): assert os.environ['CM_RUNTIME_KERNELS'] == 'gpu'\ndef test_c(): assert 0\n"
    )
    (tests / "test_good.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): assert 0\n")
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "carried.py").write_text("")
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    monkeypatch.setattr(suites, "PYTEST", tuple(word.replace(str(ROOT), str(tmp_path)) for word in suites.PYTEST))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:timeout")  # as where pytest-timeout is not installed
    return tmp_path


@pytest.mark.process
def test_a_file_of_tests_runs_to_its_end_without_the_projects_settings(suite: Path) -> None:
    """What fails stops no other test; what PYTHONPATH has is still found; pytest-timeout need not be there."""
    with pytest.raises(
        RuntimeError, match=r"^2 failed, 1 passed in .* \| FAILED .*test_a.* \| FAILED .*test_c"
    ) as caught:
        suites.run("test_bad.py", "", "gpu", 60)
    assert "\n" not in str(caught.value)
    summary = suites.run("test_good.py", "gpu", "gpu", 60)
    assert summary["where"] == "gpu" and summary["summary"].startswith("1 passed, 1 deselected")
    with pytest.raises(RuntimeError, match="1 skipped"):
        suites._read([sys.executable, "-c", "print('1 skipped in 0.1s')"], "gpu", 60)


# The tables


def test_the_table_has_what_is_known() -> None:
    race_result = {
        "ms": {"torch": [3.0, 2.9, 3.1], "cm-runtime torch": [2.0, 1.9, 2.1]},
        "speedup": {"cm-runtime torch": {"torch": [1.5, 1.4, 1.6]}},
        "outside": {"cm-runtime torch": 0.015},
        "grey": {"torch": 0.5, "cm-runtime torch": 0.25},
        "absent": {"onnxruntime": "no CUDA provider"},
        "late": ["torch.compile"],
        "rounds": 5,
    }
    rows = {"copy": {"MB": 64, "ms": 0.1, "GB/s": 3000, "of copy": [1, 1, 1]}, "all": {"times": 95, "ms": 1.25}}
    content = {
        "runs": [{"gpu": {"name": "H", "capability": "9.0"}}],
        "findings": {
            "kernels test_noise.py": {"result": {"where": "gpu", "summary": "9 passed"}},
            "bandwidth fp32": {"result": rows},
            "torch cifar32, fp16, batch 1": {"result": race_result},
            "ops a": {"failed": "RuntimeError: 1 failed"},
        },
        "skipped": {"sanitizer": "missing: compute-sanitizer"},
    }
    text = gpu_check.table(json.loads(json.dumps(content)))
    for line in (
        "H, compute capability 9.0",
        "- kernels test_noise.py: 9 passed (gpu)",
        "| copy | 64 | 0.1 | 3000 | 1 [1, 1] |",
        "| 95 x all |  | 1.25 |  |  |",
        "| torch cifar32, fp16, batch 1 | ms | grey levels off | outside | over torch |",
        "| cm-runtime torch | 2 [1.9, 2.1] | 0.250 | 1.5% | 1.5 [1.4, 1.6] |",
        "- no onnxruntime: no CUDA provider",
        "- no torch.compile: not ready in time",
        "- not done: ops a: RuntimeError: 1 failed",
        "- skipped: sanitizer: missing: compute-sanitizer",
    ):
        assert line in text.splitlines()


def test_the_readme_has_the_parts_and_commands_that_there_are() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", text, re.MULTILINE)
    parts = plan.parts(plan.Options("cuda:0", ("cifar32",), (1,), ("fp16",)))
    assert [(part.name, str(int(part.limit))) for part in parts] == rows
    calls = re.findall(r"^ +python benchmarks/gpu_check.py (.*?)(?: +#.*)?$", text, re.MULTILINE)
    calls += re.findall(r"GPU_ARGS='(.*)'", text)
    assert len(calls) >= 4 and all(gpu_check.parse(shlex.split(call)) for call in calls)
