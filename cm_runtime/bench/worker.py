"""One contender in a process of its own: what it loads, draws and times, as it is told line by line.

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
from pathlib import Path
from typing import Any

import numpy as np


class Model:
    """cm-runtime: the build that is on the path, drawing by seed and index."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import cm_runtime as cm

        self._cm, self._spec = cm, spec
        known = inspect.signature(cm.load).parameters
        hint = {"batch": spec["batch"]} if "batch" in known else {}
        self._model = cm.load(
            spec["path"], backend=spec["backend"], device=spec["device"], threads=spec["threads"], **hint
        )
        self._inside: int | None = None
        if hasattr(self._model, "evaluate") and self._model.device == "cpu":  # a GPU's evaluations are not waited for
            self._inside, evaluate = 0, self._model.evaluate

            def timed(*arguments: Any) -> Any:
                began = time.perf_counter_ns()
                try:
                    return evaluate(*arguments)
                finally:
                    assert self._inside is not None
                    self._inside += time.perf_counter_ns() - began

            setattr(self._model, "evaluate", timed)  # noqa: B010 - of this one object
        self.facts = {
            "device": self._model.device,
            "engine": getattr(self._model, "version", self._model.name),
            "micro_batch": -(-spec["batch"] // -(-spec["batch"] // self._model.micro_batch)),
            "on_torch_stream": self._model.name.startswith("torch"),
            "is_quantised": self._model.manifest.graph == "sampler",
        }

    def prepare(self, first: int, count: int | None = None) -> Callable[[], Any]:
        """What is timed for the request whose images begin at index ``first``; ``count``: a batch, unless told."""
        spec = self._spec
        return lambda: self._cm.sample(
            self._model,
            count=spec["batch"] if count is None else count,
            sigmas=spec["sigmas"],
            seed=spec["seed"],
            start=first,
        )

    def images(self) -> Any:
        """The first request's images, (N,H,W,C) float32 in [-1, 1]."""
        spec = self._spec
        how = {"count": spec["batch"], "sigmas": spec["sigmas"], "seed": spec["seed"]}
        if self.facts["is_quantised"]:  # a sampler file has no others
            return self._cm.sample(self._model, **how).astype(np.float32) / 127.5 - 1
        return self._cm.sample(self._model, **how, output="float32")

    def network_ns(self) -> int | None:
        """Nanoseconds in network evaluations since last asked; None where that cannot be told."""
        found = self._inside
        if found is not None:
            self._inside = 0
        return found


class Peer:
    """Another tool with the same weights. The images that are compared come from the noise that cm-runtime draws for
    itself; what is timed draws its own, by NumPy's generator.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        from cm_runtime.bench import peers

        self._spec = spec
        self._rng = np.random.default_rng(spec["seed"])
        self._draw = peers.peer(
            spec["peer"], Path(spec["path"]), Path(spec["work"]), threads=spec["threads"], device=spec["device"]
        )
        self.facts = {
            "device": spec["device"],
            "engine": self._draw.version,
            "micro_batch": spec["batch"],
            "on_torch_stream": spec["peer"] not in ("onnx", "openvino"),
        }

    def prepare(self, first: int) -> Callable[[], Any]:
        shape = len(self._spec["sigmas"]), self._spec["batch"], *self._spec["image_shape"]
        labels = self._labels(first)
        return lambda: self._draw(self._rng.standard_normal(shape, np.float32), tuple(self._spec["sigmas"]), labels)

    def images(self) -> Any:
        from cm_runtime import noise

        index = np.arange(self._spec["batch"], dtype=np.uint64)
        seed, shape = self._spec["seed"], tuple(self._spec["image_shape"])
        z = np.stack([noise.normal(seed, index, k, shape) for k in range(len(self._spec["sigmas"]))])
        return self._draw(z, tuple(self._spec["sigmas"]), self._labels(0))

    def network_ns(self) -> int | None:
        return None

    def _labels(self, first: int) -> Any:
        classes = self._spec["num_classes"]
        return np.arange(first, first + self._spec["batch"], dtype=np.int64) % classes if classes else None


class Worker:
    """The answers to what is asked."""

    def __init__(self) -> None:
        self._drawer: Any = None
        self._batch = 1
        self._requests = 1  # the first one is drawn by `first`

    def load(self, spec: dict[str, Any]) -> dict[str, Any]:
        import cm_runtime

        if spec.get("root") and not Path(cm_runtime.__file__).resolve().is_relative_to(Path(spec["root"]).resolve()):
            raise RuntimeError(f"{cm_runtime.__file__} was imported, not the cm_runtime of {spec['root']}")
        self._batch = spec["batch"]
        began = time.perf_counter()
        self._drawer = Peer(spec) if "peer" in spec else Model(spec)
        taken = time.perf_counter() - began
        return {**self._drawer.facts, "version": cm_runtime.__version__, "load_s": taken}

    def first(self, path: str) -> dict[str, Any]:
        """Draws the first request into a .npy file; engines that compile late do so here."""
        began = time.perf_counter()
        images = np.asarray(self._drawer.images(), np.float32)
        taken = time.perf_counter() - began
        if not np.isfinite(images).all():
            raise RuntimeError("its images are not finite")
        np.save(path, images)
        return {"first_s": taken}

    def block(self, requests: int, lead: int) -> dict[str, Any]:
        """Times of ``requests`` after ``lead`` untimed ones, and of all their network evaluations."""
        work = [self._drawer.prepare((self._requests + i) * self._batch) for i in range(lead + requests)]
        self._requests += len(work)
        for draw in work[:lead]:
            draw()
        self._drawer.network_ns()
        events = self._events()
        taken, device = [], []
        for draw in work[lead:]:
            if events:
                events[0].record()
            began = time.perf_counter_ns()
            draw()
            if events:
                events[1].record()
                events[1].synchronize()
                device.append(events[0].elapsed_time(events[1]))
            taken.append(time.perf_counter_ns() - began)
        return {"ns": taken, "network_ns": self._drawer.network_ns(), "device_ms": device or None}

    def serve(self, arrivals: list[float], most: int) -> dict[str, Any]:
        """Latencies of requests of one image each that arrive at these seconds, drawn together as they wait."""
        latencies: list[int] = []
        batches: list[int] = []
        due = [round(arrival * 1e9) for arrival in arrivals]
        began = time.perf_counter_ns()
        while len(latencies) < len(due):
            now = time.perf_counter_ns() - began
            waiting = next((i for i in range(len(latencies), len(due)) if due[i] > now), len(due)) - len(latencies)
            if not waiting:
                time.sleep((due[len(latencies)] - now) / 1e9)
                continue
            count = min(waiting, most)
            self._drawer.prepare(self._requests, count)()
            self._requests += count
            done = time.perf_counter_ns() - began
            latencies += [done - arrived for arrived in due[len(latencies) : len(latencies) + count]]
            batches.append(count)
        return {"ns": latencies, "batches": batches}

    def usage(self) -> dict[str, Any]:
        """Peak memory of this process since its exec, mapped files included."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), None)
        return {"peak_host_bytes": int(peak) * 1024 if peak else None}

    def export(self, checkpoint: str, target: str) -> dict[str, Any]:
        """The build's own export of a checkpoint."""
        began = time.perf_counter()
        import cm_runtime as cm

        cm.export.onnx(cm.load_checkpoint(checkpoint), target)
        return {"export_s": time.perf_counter() - began}

    def manifest(self, checkpoint: str) -> dict[str, Any]:
        """What an export of a checkpoint would say of itself."""
        import cm_runtime as cm

        return {"manifest": cm.load_checkpoint(checkpoint).manifest().model_dump_json()}

    def standing(self, name: str, folder: str) -> dict[str, Any]:
        """The checkpoint of a standing network."""
        from cm_runtime.bench import networks

        return {"path": str(networks.standing(name, Path(folder)))}

    def gflop(self, path: str) -> dict[str, Any]:
        """What one evaluation of one image takes."""
        from cm_runtime.bench import flops

        return {"gflop": flops.gflop(path)}

    def _events(self) -> Any:
        if not (self._drawer.facts["on_torch_stream"] and self._drawer.facts["device"].startswith("cuda")):
            return None
        import torch

        made: Any = torch.cuda.Event
        return made(enable_timing=True), made(enable_timing=True)


def main() -> None:
    """Answers until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            known = any(each.__name__ == "CmRuntimeError" for each in type(error).__mro__)
            text = " ".join(str(error).split()) or type(error).__name__
            answer = {
                "error": text if known else f"{type(error).__name__}: {text}",
                "missing": type(error).__name__ == "MissingExtraError",
                "refused": type(error).__name__ in ("RequestError", "ArtifactError"),
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
