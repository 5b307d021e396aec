"""One contender in a process of its own, which loads, draws and times by requests on standard input.

Run by path, with the build to be measured first on PYTHONPATH. That build may be an older cm-runtime, so what runs a
model here takes public names only. Requests and answers are JSON, one line each, on standard input and output; whatever
libraries print goes to standard error.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Spec:
    """A contender's model, engine and requests. root: the folder of its build; peer: the tool, or "" for cm-runtime."""

    path: str
    backend: str
    device: str
    threads: int
    batch: int
    sigmas: tuple[float, ...]
    seed: int
    image_shape: tuple[int, int, int]
    num_classes: int
    work: str = ""
    root: str = ""
    peer: str = ""
    precision: str = "auto"


@dataclass(frozen=True)
class Facts:
    """A contender that is loaded. is_quantised: it draws bytes, as a sampler file does."""

    device: str
    engine: str
    micro_batch: int
    on_torch_stream: bool
    is_quantised: bool = False
    version: str = ""
    load_s: float = 0.0


@dataclass(frozen=True)
class Block:
    """Samples of one turn: nanoseconds a request, those in the network, milliseconds on the device, images a draw."""

    ns: list[int]
    network_ns: int | None = None
    device_ms: list[float] | None = None
    batches: list[int] | None = None


class Model:
    """cm-runtime: the build that is on the path, drawing by seed and index."""

    def __init__(self, spec: Spec) -> None:
        import cm_runtime as cm

        self._cm, self._spec = cm, spec
        options = {"backend": spec.backend, "device": spec.device, "threads": spec.threads}
        options |= {"precision": spec.precision} if spec.precision != "auto" else {}
        model = cm.load(spec.path, **options, **_micro_batch(cm.load, spec.batch))  # type: ignore[arg-type]
        self._model: Any = model
        self._inside: int | None = None
        if hasattr(model, "evaluate") and model.device == "cpu":  # a GPU's evaluations are not waited for
            self._inside, self._evaluate = 0, model.evaluate
            setattr(model, "evaluate", self._time_evaluation)  # noqa: B010 - of this one object
        self.facts = Facts(
            device=model.device,
            engine=getattr(model, "version", model.name),
            micro_batch=-(-spec.batch // -(-spec.batch // model.micro_batch)),
            on_torch_stream=model.name.startswith("torch"),
            is_quantised=model.manifest.graph == "sampler",
        )

    def prepare(self, first: int, count: int = 0) -> Callable[[], Any]:
        """The request whose images begin at index ``first``, ready to be timed; ``count``: 0 is a batch."""
        return lambda: self._sample(count or self._spec.batch, start=first)

    def images(self) -> Any:
        """The first request's images, (N,H,W,C) float32 in [-1, 1]."""
        if self.facts.is_quantised:  # a sampler file has no others
            return self._sample(self._spec.batch).astype(np.float32) / 127.5 - 1
        return self._sample(self._spec.batch, output="float32")

    def network_ns(self) -> int | None:
        """Nanoseconds in network evaluations since the last call; None where they are not timed."""
        total = self._inside
        self._inside = None if total is None else 0
        return total

    def _sample(self, count: int, **options: Any) -> Any:
        return self._cm.sample(self._model, count=count, sigmas=self._spec.sigmas, seed=self._spec.seed, **options)

    def _time_evaluation(self, *arguments: Any) -> Any:
        began = time.perf_counter_ns()
        try:
            return self._evaluate(*arguments)
        finally:
            assert self._inside is not None
            self._inside += time.perf_counter_ns() - began


def _micro_batch(load: Callable[..., Any], count: int) -> dict[str, int]:
    """The option of ``load`` that prepares an engine for ``count`` images at a time, under the build's name for it."""
    parameters = inspect.signature(load).parameters
    return next(({name: count} for name in ("micro_batch", "batch") if name in parameters), {})


class Peer:
    """Another tool with the same weights.

    The images that are compared come from the noise that cm-runtime draws for itself; what is timed draws its own, by
    NumPy's generator.
    """

    def __init__(self, spec: Spec) -> None:
        from cm_runtime.bench import peers

        self._spec = spec
        self._rng = np.random.default_rng(spec.seed)
        name: Any = spec.peer
        place: Any = {"threads": spec.threads, "device": spec.device, "precision": spec.precision}
        self._draw = peers.peer(name, Path(spec.path), Path(spec.work), **place)
        on_torch_stream = spec.peer not in ("onnx", "openvino")
        self.facts = Facts(spec.device, self._draw.version, spec.batch, on_torch_stream)

    def prepare(self, first: int, count: int = 0) -> Callable[[], Any]:
        """The request whose images begin at index ``first``; always a batch."""
        spec, labels = self._spec, self._labels(first)
        shape = len(spec.sigmas), spec.batch, *spec.image_shape
        return lambda: self._draw(self._rng.standard_normal(shape, np.float32), spec.sigmas, labels)

    def images(self) -> Any:
        """The first request's images, (N,H,W,C) float32 in [-1, 1]."""
        from cm_runtime import noise

        spec, index = self._spec, np.arange(self._spec.batch, dtype=np.uint64)
        z = np.stack([noise.normal(spec.seed, index, k, spec.image_shape) for k in range(len(spec.sigmas))])
        return self._draw(z, spec.sigmas, self._labels(0))

    def network_ns(self) -> int | None:
        """None: another tool's evaluations are not timed."""
        return None

    def _labels(self, first: int) -> Any:
        classes = self._spec.num_classes
        return np.arange(first, first + self._spec.batch, dtype=np.int64) % classes if classes else None


class Worker:
    """Requests by name: each method takes the JSON of a request and returns that of its answer."""

    def __init__(self) -> None:
        self._drawer: Any = None
        self._batch = 1
        self._requests = 1  # the first one is drawn by `first`

    def load(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Load the contender of a `Spec`; returns `Facts`."""
        import cm_runtime

        contender = Spec(**spec | {name: tuple(spec[name]) for name in ("sigmas", "image_shape")})
        root = contender.root
        if root and not Path(cm_runtime.__file__).resolve().is_relative_to(Path(root).resolve()):
            raise RuntimeError(f"{cm_runtime.__file__} was imported, not the cm_runtime of {root}")
        self._batch = contender.batch
        began = time.perf_counter()
        self._drawer = Peer(contender) if contender.peer else Model(contender)
        seconds = time.perf_counter() - began
        return {**vars(self._drawer.facts), "version": cm_runtime.__version__, "load_s": seconds}

    def first(self, path: str) -> dict[str, Any]:
        """Draw the first request into a .npy file; engines that compile late do so here."""
        began = time.perf_counter()
        images = np.asarray(self._drawer.images(), np.float32)
        seconds = time.perf_counter() - began
        if not np.isfinite(images).all():
            raise RuntimeError("its images are not finite")
        np.save(path, images)
        return {"first_s": seconds}

    def block(self, requests: int, lead: int) -> dict[str, Any]:
        """Time ``requests`` after ``lead`` untimed ones, and all their network evaluations; returns a `Block`."""
        draws = [self._drawer.prepare((self._requests + i) * self._batch) for i in range(lead + requests)]
        self._requests += len(draws)
        for draw in draws[:lead]:
            draw()
        self._drawer.network_ns()
        events = self._events()
        ns, device_ms = [], []
        for draw in draws[lead:]:
            if events:
                events[0].record()
            began = time.perf_counter_ns()
            draw()
            if events:
                events[1].record()
                events[1].synchronize()
                device_ms.append(events[0].elapsed_time(events[1]))
            ns.append(time.perf_counter_ns() - began)
        return vars(Block(ns, self._drawer.network_ns(), device_ms or None))

    def serve(self, arrivals: list[float], most: int) -> dict[str, Any]:
        """Draw requests of one image each that arrive at these seconds, together as they wait; returns a `Block`."""
        latencies: list[int] = []
        batches: list[int] = []
        times = [round(arrival * 1e9) for arrival in arrivals]
        began = time.perf_counter_ns()
        while len(latencies) < len(times):
            now = time.perf_counter_ns() - began
            queue = next((i for i in range(len(latencies), len(times)) if times[i] > now), len(times)) - len(latencies)
            if not queue:
                time.sleep((times[len(latencies)] - now) / 1e9)
                continue
            count = min(queue, most)
            self._drawer.prepare(self._requests, count)()
            self._requests += count
            end = time.perf_counter_ns() - began
            latencies += [end - arrival for arrival in times[len(latencies) : len(latencies) + count]]
            batches.append(count)
        return vars(Block(latencies, batches=batches))

    def usage(self) -> dict[str, Any]:
        """Peak memory of this process since its exec, mapped files included."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), None)
        return {"peak_host_bytes": int(peak) * 1024 if peak else None}

    def export(self, checkpoint: str, target: str, **how: Any) -> dict[str, Any]:
        """Export a checkpoint as the build does."""
        began = time.perf_counter()
        import cm_runtime as cm

        cm.export.onnx(cm.load_checkpoint(checkpoint), target, **how)
        return {"export_s": time.perf_counter() - began}

    def manifest(self, checkpoint: str) -> dict[str, Any]:
        """The manifest that an export of a checkpoint would hold."""
        import cm_runtime as cm

        return {"manifest": cm.load_checkpoint(checkpoint).manifest().model_dump_json()}

    def standing(self, name: str, folder: str) -> dict[str, Any]:
        """The checkpoint of a standing network."""
        from cm_runtime.bench import networks

        return {"path": str(networks.standing_checkpoint(name, Path(folder)))}

    def gflop(self, path: str) -> dict[str, Any]:
        """GFLOP of one evaluation of one image."""
        from cm_runtime.bench import flops

        return {"gflop": flops.gflop(path)}

    def _events(self) -> Any:
        if not (self._drawer.facts.on_torch_stream and self._drawer.facts.device.startswith("cuda")):
            return None
        import torch

        event: Any = torch.cuda.Event
        return event(enable_timing=True), event(enable_timing=True)


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            is_known = any(each.__name__ == "CmRuntimeError" for each in type(error).__mro__)
            text = " ".join(str(error).split()) or type(error).__name__
            answer = {
                "error": text if is_known else f"{type(error).__name__}: {text}",
                "is_absence": type(error).__name__ in ("MissingExtraError", "RequestError", "ArtifactError"),
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
