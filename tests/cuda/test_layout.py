"""The arrays of a batch in a GPU's memory: their alignment, and that none lies in another."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest

from cm_runtime.choices import GraphKind
from cm_runtime.cuda.captured_batch import CapturedBatch
from cm_runtime.cuda.layout import Layout
from cm_runtime.cuda.request_writer import RequestWriter
from cm_runtime.kernels.launches import Images
from cm_runtime.manifest import OUTPUTS, Manifest
from cm_runtime.request import Request

BASE = 1 << 20
SIGMAS = (80.0, 24.4, 5.84, 0.9, 0.661)
BATCHES = [1, 3, 7, 32, 255]


class Engine(SimpleNamespace):
    """An engine that writes down the addresses of its evaluations."""

    def __init__(self, graph: GraphKind) -> None:
        manifest = Manifest(
            graph=graph,
            image_shape=(3, 5, 7),
            num_classes=10,
            precond="edm",
            sigma_boundary=0,
            sigmas={len(SIGMAS): SIGMAS} if graph == "sampler" else {},
        )
        super().__init__(graph=graph, manifest=manifest, outputs=OUTPUTS[graph], seen=[])

    def images(self, count: int) -> Images:
        return Images(count, 3, 5, 7, type="fp32", output="fp32")

    def bind(self, device: Any, count: int) -> Any:
        def evaluate(addresses: Mapping[str, int]) -> None:
            self.seen.append(dict(addresses))

        return evaluate


def planned(graph: GraphKind, n: int) -> tuple[Engine, Layout, Request]:
    request = Request(count=n, micro_batch=n, sigmas=SIGMAS, seed=3, labels=1)
    engine = Engine(graph)
    return engine, Layout.plan(engine, request, n, has_noise=False), request


@pytest.mark.parametrize("n", BATCHES)
@pytest.mark.parametrize("graph", get_args(GraphKind))
def test_all_that_an_engine_reads_or_writes_is_aligned(graph: GraphKind, n: int) -> None:
    """At every step. NvInferRuntime.h, setTensorAddress: "The pointer must have at least 256-byte alignment"."""
    engine, layout, request = planned(graph, n)
    batch = CapturedBatch(engine, SimpleNamespace(take=lambda size: BASE), layout, request)  # type: ignore[arg-type]
    for k in range(len(SIGMAS)):
        batch.evaluate(k)
    assert len(engine.seen) == len(SIGMAS)
    assert {name: at % 256 for seen in engine.seen for name, at in seen.items() if at % 256} == {}


@pytest.mark.parametrize("n", BATCHES)
@pytest.mark.parametrize("graph", ["denoiser", "network"])
def test_each_step_finds_its_own_noise_levels(graph: GraphKind, n: int) -> None:
    """Where step k reads, there is its level, once an image, and no step reads another's."""
    engine, layout, request = planned(graph, n)
    memory = np.full(layout.block.size, 0xFF, np.uint8)

    def put(address: int, array: np.ndarray) -> None:
        memory[address : address + array.nbytes] = array.reshape(-1).view(np.uint8)

    device = SimpleNamespace(take=lambda size: 0, put=put, pin=lambda size: np.zeros(size, np.uint8))
    batch = CapturedBatch(engine, device, layout, request)  # type: ignore[arg-type]
    writer = RequestWriter(engine.manifest, engine.graph, device, layout, batch.addresses)  # type: ignore[arg-type]
    writer.write(request, 0, np.ones(n, np.int64), None)
    name = "sigma" if graph == "denoiser" else "c_noise"
    for k, sigma in enumerate(SIGMAS):
        batch.evaluate(k)
        start = engine.seen[k][name]
        levels = memory[start : start + 4 * n].view(np.float32)
        expected = sigma if graph == "denoiser" else 250 * np.log(sigma)  # OpenAI's: 1000 ln(sigma) / 4
        assert np.allclose(levels, expected, rtol=1e-6)
    starts = [seen[name] for seen in engine.seen]
    assert min(np.diff(starts)) >= 4 * n
