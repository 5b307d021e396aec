"""Everything that only a GPU can prove, in one run of at most eight minutes: `make gpu-check`.

    python benchmarks/gpu_check.py -o benchmarks/results/MACHINE/gpu.json
    python benchmarks/gpu_check.py --parts sampling --networks imagenet64 --batches 1      # what there was no time for
    python benchmarks/gpu_check.py --show benchmarks/results/MACHINE/gpu.json

1. The kernels against their formulas: tests/kernels on the GPU itself, over types, shapes and launches, and under
   compute-sanitizer where it is installed.
2. The kernels' speed at 64 MB and more, as a share of what a copy on the same card reaches, in turns with it.
3. Engines: samples of the bundled model on each that is installed, against ONNX Runtime's CPU.
4. k-step sampling of the standing networks: torch eager, torch.compile (max-autotune), a plain export with a NumPy loop
   on ONNX Runtime's CUDA provider, and cm-runtime on each engine, in turns; and the share of a request of cm-runtime's
   that is no evaluation of the network.

Without a GPU the kernels run in their host build and engines on the CPU; what cannot be measured is named. So is what
lacks a package, or time: compilers get what is left, and what is found is written as soon as it is there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # a checkout that is not installed

import cm_runtime as cm  # noqa: E402
from cm_runtime import backends, export, noise, sampling  # noqa: E402
from cm_runtime.bench import peers  # noqa: E402
from cm_runtime.bench.networks import standing_checkpoint  # noqa: E402
from cm_runtime.bench.turns import quartiles, ratio, take_turns, timer, until  # noqa: E402
from cm_runtime.checkpoints.load import load_checkpoint  # noqa: E402
from cm_runtime.cuda import context  # noqa: E402
from cm_runtime.cuda.context import Owned  # noqa: E402
from cm_runtime.cuda.device import Device  # noqa: E402
from cm_runtime.errors import CmRuntimeError  # noqa: E402
from cm_runtime.files import atomic  # noqa: E402
from cm_runtime.kernels import launches  # noqa: E402
from cm_runtime.kernels.launches import LEVEL, REQUEST, SIZES, Arrays, Images  # noqa: E402
from cm_runtime.request import Draw, sampling_request  # noqa: E402

BUDGET = 470.0  # seconds
PACKAGES = ("torch", "pycuda", "cuda-bindings", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx", "triton")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=short")
PARTS = ("kernels", "engines", "bandwidth", "ops", "sampling", "sanitizer")
BATCHES = (1, 64, 256)
ROUNDS = 20
STEPS = 2
LONGEST = 15.0  # seconds of timed rounds


class Report:
    """Results so far, the parts that were skipped and why, and the time that remains."""

    def __init__(self, budget: float, output: Path | None = None) -> None:
        self.end = time.monotonic() + budget
        self.output = output
        self.result: dict[str, Any] = {"skipped": {}, "failed": {}}

    @property
    def remaining(self) -> float:
        return self.end - time.monotonic()

    def part(self, name: str, seconds: float, body: Callable[[], Any]) -> None:
        """Run a part if there is time for it; an exception becomes a line, and the others go on."""
        if self.remaining < seconds:
            self.skip(name, f"{self.remaining:.0f} s are left and it takes {seconds:.0f}")
            return
        began = time.monotonic()
        try:
            self.result[name] = body()
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        except Exception as error:
            self.result["failed"][name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            print(f"{name} FAILED: {self.result['failed'][name]}", file=sys.stderr)
        self.keep()

    def skip(self, name: str, why: str) -> None:
        self.result["skipped"][name] = why
        print(f"{name} skipped: {why}", file=sys.stderr)

    def keep(self) -> None:
        """Write the results so far: a run that is cut short has not been for nothing."""
        if self.output:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with atomic.write(self.output) as temporary:
                temporary.write_text(json.dumps(self.result, indent=1) + "\n")


class Overtime(BaseException):
    """A contender took longer than there was time for; no `except Exception` of a compiler's may swallow it."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise Overtime after ``seconds``, in the main thread.

    A thread sends the signal, not the system's alarm clock, of which there is one, and which pytest's time limit has.
    """
    is_over = threading.Event()

    def end(*_: object) -> None:
        if not is_over.is_set():
            raise Overtime

    def watch() -> None:
        if not is_over.wait(seconds):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, end)  # and stays: a signal that comes late does nothing
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


# 1. Right


def kernels_are_right(on_gpu: bool, sanitizer: str | None = None, seconds: float = 200) -> dict[str, Any]:
    """The kernels' tests, on the GPU or in the host build; some of them under compute-sanitizer."""
    where = "gpu" if on_gpu else "host"
    tests = ["test_noise.py", "test_steps.py", "test_skip_scale.py", "test_group_norm.py"]
    words = [sys.executable, *PYTEST, "-x", *(str(ROOT / "tests" / "kernels" / test) for test in tests)]
    if sanitizer:
        words = [sanitizer, "--error-exitcode", "9", *words, "-k", "every_launch or in_place or beside"]
    return {"where": where, "summary": _pytest(words, seconds, CM_RUNTIME_KERNELS=where)}


def ops_are_right(seconds: float) -> dict[str, Any]:
    """torch's custom ops on the GPU."""
    test = ROOT / "tests" / "kernels" / "test_torch_ops.py"
    return {"where": "gpu", "summary": _pytest([sys.executable, *PYTEST, "-m", "gpu", str(test)], seconds)}


def _pytest(words: Sequence[str], seconds: float, **environment: str) -> str:
    """The last line of a run of pytest. Raises RuntimeError where a test failed."""
    every = os.environ | {"PYTHONPATH": str(ROOT), **environment}
    child = subprocess.run(words, capture_output=True, text=True, env=every, cwd=ROOT, timeout=seconds)
    last = (child.stdout.strip().splitlines() or ["pytest said nothing"])[-1]
    if child.returncode:
        failures = [line for line in child.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
        raise RuntimeError(" ".join([last, *failures[:5], child.stderr[-300:]]))
    return last


# 2. Fast


def bandwidth() -> dict[str, Any]:
    """GB/s of each kernel and of a copy, medians over rounds in which all take turns."""
    device = Device()
    clock = Clock(device)
    return {
        f"{type}, {count} images of 3x64x64": clock.turns(kernel_work(device, count, type))
        for type in ("fp32", "fp16")
        for count in (1024, 4096)
    }


def kernel_work(device: Device, count: int, type: Any) -> dict[str, tuple[int, Callable[[], None]]]:
    """Name -> bytes of traffic, and the launch."""
    images, norm = Images(count, 3, 64, 64, type), Images(count, 128, 16, 16, type, "nhwc")
    n, size = images.elements, SIZES[images.type]
    m = norm.elements
    at = {name: device.address(name, n * 4) for name in ("x", "y", "F", "x_in")}
    at |= {name: device.address(name, m * size) for name in ("norm", "normed")}
    at |= {"bytes": device.address("bytes", n), "flag": device.address("flag", 16)}
    weights = np.ones(256, np.float32)
    gamma = device.send("gamma", weights)
    request = device.send("request", np.array([(0, 0)], REQUEST))
    level = device.send("level", np.array([(0.1, 0.5, 1.5, 0.6)], LEVEL))
    sigma = device.send("sigma", np.full(count, 1.5, np.float32))
    for name in ("x", "F", "norm"):
        device.clear(at[name], n * size if name == "F" else 4)
    from cm_runtime.precond import precond

    work = {
        "cm_first_noise": (
            n * (4 + size),
            launches.first_noise(images, Arrays(request, level, x=at["x"], x_in=at["x_in"])),
        ),
        "cm_step": (
            n * (8 + 2 * size),
            launches.step(
                images, Arrays(request, level, 0, at["x"], at["F"], at["x"], at["x_in"], not_finite=at["flag"]), 1
            ),
        ),
        "cm_finish": (
            n * (4 + size + 1),
            launches.finish(images, Arrays(0, level, 0, at["x"], at["F"], bytes=at["bytes"], not_finite=at["flag"])),
        ),
        "cm_skip_scale": (
            n * (8 + size),
            launches.skip_scale(images, Arrays(x=at["x"], F=at["F"], sigma=sigma, y=at["y"]), precond("boundary")),
        ),
        "cm_group_norm_silu": (
            2 * m * size,
            launches.group_norm_silu(
                norm,
                Arrays(x=at["norm"], gamma=gamma, beta=gamma, y=at["normed"]),
                block=launches.NormBlock(shared=64 << 10),
            ),
        ),
    }
    copy: tuple[int, Callable[[], None]] = 8 * n, partial(device.move, at["y"], at["x"], 4 * n)
    kernels = {name: (traffic, partial(device.launch, each)) for name, (traffic, each) in work.items()}
    return {"copy": copy, **kernels}


class Clock:
    """Times of what is put in a device's stream, by events of the GPU."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._driver = device.context.driver

    def milliseconds(self, body: Callable[[], None], repeats: int = 10) -> float:
        """Milliseconds of one of ``repeats`` in a row."""
        driver, stream = self._driver, self._device.stream
        with self._device.use("measuring"):
            begin, end = (Owned(self._device.context, driver.create_event(), driver.destroy_event) for _ in range(2))
            driver.record(begin.handle, stream)
            for _ in range(repeats):
                body()
            driver.record(end.handle, stream)
            driver.synchronize_event(end.handle)
            return driver.milliseconds(begin.handle, end.handle) / repeats

    def turns(self, work: dict[str, tuple[int, Callable[[], None]]]) -> dict[str, Any]:
        """Medians over rounds; shares are of the copy in the same round."""
        timers = {name: partial(self.milliseconds, body) for name, (_, body) in work.items()}
        ms = take_turns(timers, range(1 + ROUNDS))
        speeds = {name: [traffic / each / 1e6 for each in ms[name][1:]] for name, (traffic, _) in work.items()}
        return {
            name: {
                "megabytes": round(work[name][0] / 1e6, 1),
                "ms": round(statistics.median(ms[name][1:]), 4),
                "GB/s": round(statistics.median(speeds[name]), 1),
                "of copy": [round(q, 3) for q in ratio(speeds[name], speeds["copy"])],
            }
            for name in work
        }


# 3. The same


def engines_agree(on_gpu: bool, folder: Path) -> dict[str, Any]:
    """Samples of the bundled model on each engine: the largest difference in grey levels, and how many differ."""
    from cm_runtime.checkpoints.native import save_checkpoint
    from cm_runtime.export.from_onnx import recover

    source = folder / "default.pt"
    save_checkpoint(recover(backends.DEFAULT_MODEL), source)
    reference = cm.sample(backends.load(backends.DEFAULT_MODEL, "ort", "cpu"), 64)
    agreement: dict[str, Any] = {}
    for name, load_engine in contenders(source, folder, on_gpu).items():
        try:
            images = cm.sample(load_engine(), 64)
        except CmRuntimeError as error:
            agreement[name] = {"skipped": str(error)}
            continue
        difference = np.abs(images.astype(int) - reference)
        agreement[name] = {"grey": int(difference.max()), "differ": float((difference > 0).mean())}
        if difference.max() > 8:
            raise RuntimeError(f"{name} is {difference.max()} grey levels from ONNX Runtime's CPU")
    return agreement


def contenders(source: Path, folder: Path, on_gpu: bool) -> dict[str, Callable[[], Any]]:
    """cm-runtime on every engine, as functions that load it."""
    device = "cuda:0" if on_gpu else "cpu"
    checkpoint = load_checkpoint(source)
    stem = folder / source.stem

    def graph(kind: Any) -> Path:
        path = stem.with_name(f"{stem.name}-{kind}.onnx")
        if not path.exists():
            export.onnx(checkpoint, path, graph=kind, steps=2 if kind == "sampler" else None)
        return path

    def on_ort(kind: str) -> Any:
        return backends.load(graph(kind), "ort", device)

    def on_tensorrt(package: Any) -> Any:
        from cm_runtime.backends.batch_profiles import parse_profiles
        from cm_runtime.export import to_tensorrt

        path = stem.with_name(f"{stem.name}-{package}.engine")
        if not path.exists():
            to_tensorrt.build(graph("network"), path, package, to_tensorrt.BuildOptions(parse_profiles("1:64:256")))
        return backends.load(path)

    engines: dict[str, Callable[[], Any]] = {
        f"onnxruntime {kind}": partial(on_ort, kind) for kind in ("network", "denoiser", "sampler")
    }
    engines["torch"] = partial(backends.load, source, "torch", device)
    if on_gpu:
        engines["torch fp16"] = partial(backends.load, source, "torch", device, precision="fp16")
        engines["torch.compile"] = partial(backends.load, source, "torch.compile", device)
        engines |= {package: partial(on_tensorrt, package) for package in ("tensorrt", "tensorrt_rtx")}
    return engines


# 4. Faster


def load_drawers(network: str, folder: Path, drawers: dict[str, Any]) -> dict[str, Any]:
    """Put contenders into ``drawers``; returns their names, and why others are absent.

    Compilers come last, for they take all time there is.
    """
    source = standing_checkpoint(network, folder)
    ours = contenders(source, folder, True)
    loaders: dict[str, Callable[[], Any]] = {
        f"cm-runtime, {name}": partial(OwnDrawer, ours[name])
        for name in ("torch", "torch fp16", "onnxruntime network", "tensorrt", "tensorrt_rtx")
    }
    for name in ("torch", "onnx", "torch.compile"):
        loaders[name] = partial(PeerDrawer, name, source, folder)
    absences: dict[str, str] = {}
    for name, make in loaders.items():
        try:
            drawers[name] = make()
        except CmRuntimeError as error:
            absences[name] = str(error)
    return {"contenders": list(drawers), "missing": absences}


def race(drawers: dict[str, Any], batch: int, steps: int, remaining: Callable[[], float]) -> dict[str, Any]:
    """Medians and quartiles in ms, in turns, of those that agree with ``torch`` and were ready in time.

    remaining: the seconds that there are, of which the last 15 are for the rounds.
    """
    images: dict[str, Any] = {}
    why_not: dict[str, str] = {}
    for name, each in drawers.items():
        began = time.monotonic()
        try:
            with within(remaining() - LONGEST - 5):
                for _ in range(3):
                    images[name] = each.draw(batch, steps)
        except Overtime:
            images.pop(name, None)
            why_not[name] = f"not ready after {time.monotonic() - began:.0f} s"
        except Exception as error:
            images.pop(name, None)
            why_not[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if "torch" not in images:
        raise RuntimeError(f"eager torch, which images are held to, drew none: {why_not['torch']}")
    reference = images["torch"].astype(int)
    greys = {name: int(np.abs(each - reference).max()) for name, each in images.items()}
    for name, grey in greys.items():
        if grey > (40 if "fp16" in name else 4):
            why_not[name] = f"{grey} grey levels from eager torch"
    timers = {name: timer(partial(drawers[name].draw, batch, steps)) for name in images if name not in why_not}
    seconds = take_turns(timers, until(min(LONGEST, remaining()), most=200))
    samplers = {name: drawers[name] for name in timers if isinstance(drawers[name], OwnDrawer)}
    return {
        "ms": {name: [round(1e3 * q, 3) for q in quartiles(each)] for name, each in seconds.items()},
        "outside": {name: each.outside(batch, steps) for name, each in samplers.items()},
        "grey": greys,
        "not timed": why_not,
        "rounds": len(seconds["torch"]),
    }


class OwnDrawer:
    """cm.sample: noise drawn on the device, images in the host's memory."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._model = load()

    def draw(self, batch: int, steps: int) -> Any:
        """(N,H,W,C) uint8."""
        return cm.sample(self._model, batch, steps, micro_batch=batch)

    def outside(self, batch: int, steps: int) -> float:
        """The share of a batch's GPU time outside the network's evaluations, by the GPU's events."""
        sampler = self._model.on_device
        request = sampling_request(self._model.manifest, Draw(count=batch, steps=steps, micro_batch=batch))
        capture = sampler.prepare(self._model, request, batch).batch
        clock = Clock(sampler.device)
        shares = []
        for _ in range(ROUNDS):
            network = clock.milliseconds(capture.evaluate, steps) * steps
            shares.append(1 - network / clock.milliseconds(partial(capture.put, self._model), 1))
        return round(statistics.median(shares), 4)


class PeerDrawer:
    """Another tool's loop (see cm_runtime/bench/peers.py), its noise made beforehand, which is to its favour."""

    def __init__(self, name: Any, source: Path, folder: Path) -> None:
        self._manifest = load_checkpoint(source).manifest()
        self._peer = peers.peer(name, source, folder, device="cuda:0")
        self._inputs: dict[tuple[int, int], tuple[Any, ...]] = {}

    def draw(self, batch: int, steps: int) -> Any:
        """(N,H,W,C) uint8."""
        if (batch, steps) not in self._inputs:
            m, index = self._manifest, np.arange(batch, dtype=np.uint64)
            request = sampling_request(m, Draw(count=batch, steps=steps, micro_batch=batch))
            label = sampling.labels_of(request, index, m.num_classes)
            self._inputs[batch, steps] = noise.normals(0, index, steps, m.image_shape), request.sigmas, label
        return np.rint((self._peer(*self._inputs[batch, steps]) + 1) * 127.5).astype(np.uint8)


def main(arguments: Sequence[str] | None = None) -> int:
    """The checks; 1 where one failed, whatever was skipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="where the result goes")
    parser.add_argument("--show", type=Path, metavar="FILE.json", help="print the table of a result instead")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the checks")
    parser.add_argument("--networks", nargs="+", default=("cifar32", "imagenet64"), help="of which sampling is timed")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="that are drawn")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="in all (%(default)s)")
    options = parser.parse_args(arguments)
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return 0
    report = Report(options.budget, options.output)
    result = report.result
    result["packages"] = {name: _version(name) for name in PACKAGES}
    result["gpu"] = gpu = _gpu(report)
    with tempfile.TemporaryDirectory() as temporary:
        for part in options.parts:
            run(part, report, Path(temporary), gpu is not None, options.networks, options.batches)
    report.keep()
    print(table(result))
    return 1 if result["failed"] else 0


def run(part: str, report: Report, folder: Path, on_gpu: bool, networks: Sequence[str], batches: Sequence[int]) -> None:
    """One of PARTS."""
    if part == "kernels":
        report.part("kernels", 60, lambda: kernels_are_right(on_gpu, seconds=report.remaining))
    elif part == "engines":
        report.part("engines", 30, lambda: engines_agree(on_gpu, folder))
    elif not on_gpu:
        report.skip(part, "there is no GPU")
    elif part == "bandwidth":
        report.part("bandwidth", 20, bandwidth)
    elif part == "ops":
        report.part("torch ops", 30, lambda: ops_are_right(report.remaining))
    elif part == "sampling":
        for network in networks:
            drawers: dict[str, Any] = {}
            report.part(f"{network} contenders", 60, partial(load_drawers, network, folder, drawers))
            for batch in batches if drawers else ():
                name = f"sampling {network}, batch {batch}"
                report.part(name, 40, partial(race, drawers, batch, STEPS, lambda: report.remaining))
    elif sanitizer := shutil.which("compute-sanitizer"):
        report.part("sanitizer", 60, lambda: kernels_are_right(True, sanitizer, report.remaining))
    else:
        report.skip("sanitizer", "compute-sanitizer is not installed")


def _gpu(report: Report) -> dict[str, Any] | None:
    try:
        gpu, driver = context.gpu(), context.driver().version()
        return {"name": gpu.name, "capability": gpu.capability, "driver": driver}
    except CmRuntimeError as error:
        report.skip("gpu", f"{error}; kernels run in their host build, engines on the CPU")
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    gpu = result["gpu"]
    lines = [f"{gpu['name']}, compute capability {gpu['capability']}" if gpu else "no GPU: host mode", ""]
    for part in ("kernels", "torch ops", "sanitizer"):
        if part in result:
            lines.append(f"{part} ({result[part]['where']}): {result[part]['summary']}")
    for name, each in result.get("engines", {}).items():
        text = each.get("skipped") or f"{each['grey']} grey levels at most, {each['differ']:.2e} of pixels differ"
        lines.append(f"{name}: {text}")
    for setup, each in result.get("bandwidth", {}).items():
        lines += ["", f"| {setup} | MB | ms | GB/s | of copy |", "| --- | ---: | ---: | ---: | ---: |"]
        for name, row in each.items():
            middle, low, high = row["of copy"]
            share = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
            lines.append(f"| {name} | {row['megabytes']} | {row['ms']} | {row['GB/s']} | {share} |")
    for name, each in result.items():
        if name.startswith("sampling "):
            lines += ["", f"| {name}, two steps | ms | outside evaluations |", "| --- | ---: | ---: |"]
            for contender, (middle, low, high) in each["ms"].items():
                outside = each["outside"].get(contender)
                share = "" if outside is None else f"{outside:.1%}"
                lines.append(f"| {contender} | {middle} [{low}, {high}] | {share} |")
            lines += [f"{contender}: {why}" for contender, why in each["not timed"].items()]
        for contender, why in each.get("missing", {}).items() if isinstance(each, dict) else ():
            lines.append(f"{name}: no {contender}: {why}")
    lines += ["", *(f"skipped: {name}: {why}" for name, why in result["skipped"].items())]
    lines += [f"FAILED: {name}: {why}" for name, why in result["failed"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
