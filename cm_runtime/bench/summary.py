"""What a result tells of a contender, from its samples."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from cm_runtime.bench import stats
from cm_runtime.bench.contenders import Side
from cm_runtime.bench.results import Contender, Estimate, Peaks, Served
from cm_runtime.bench.scenario import Scenario


def contender(side: Side, subject: Side, scenario: Scenario, gflop: float | None, peak: Peaks) -> Contender:
    """What is told of a side. gflop: of one evaluation of one image; peak: of its device and threads."""
    common: dict[str, Any] = {
        "name": side.name,
        "role": side.role,
        "version": side.facts.get("engine", "") if side.role == "peer" else side.facts.get("version", ""),
        "commit": side.commit,
        "model_sha256": side.model_sha256,
        "agreement": side.found.get("agreement"),
        "cold_start_s": () if side.role == "peer" else side.found.get("cold_start_s", ()),
        "load_s": None if side.role == "peer" else side.facts.get("load_s"),
        "micro_batch": side.facts.get("micro_batch"),
        "first_s": side.found.get("first_s"),
    }
    if side.out:
        return Contender(**common, status="absent" if side.out.is_absence else "failed", reason=str(side.out))
    latency = stats.latency(side.blocks)
    total = sum(float(block.sum()) for block in side.blocks)
    is_server = scenario.kind == "server"
    served = None
    if is_server:
        assert scenario.rate is not None and scenario.bound_ms is not None
        p99 = latency.p99
        served = Served(
            rate=scenario.rate,
            bound_ms=scenario.bound_ms,
            met=p99 is not None and p99.high is not None and p99.high <= scenario.bound_ms,
            mean_batch=float(np.mean(side.batches)),
        )
    inside = None if is_server or side.network_ns is None else side.network_ns / 1e6
    return Contender(
        **common,
        status="measured",
        reason=side.found.get("reason", ""),
        latency=latency,
        device_latency=stats.latency(side.device_blocks) if side.device_blocks else None,
        images_per_s=None if is_server else _rate(side, scenario, latency.p50),
        time_ratio=None if side is subject else stats.ratio(side.medians, subject.medians),
        peak_host_bytes=None if side.role == "peer" else side.found.get("peak_host_bytes"),
        peak_device_bytes=side.found.get("peak_device_bytes"),
        outside_network=None if inside is None else max(0.0, 1 - inside / total),
        warmup=side.found.get("warmup", 0),
        stable=side.found.get("stable", True),
        block_ms=side.medians,
        served=served,
        **({} if is_server or gflop is None else _arithmetic(gflop, scenario, latency.p50, peak)),
    )


def _arithmetic(gflop: float, scenario: Scenario, p50: Estimate, peak: Peaks) -> dict[str, float]:
    speed = gflop * scenario.steps * scenario.batch / (p50.value / 1e3)
    return {"gflop_per_s": speed, "peak_fraction": speed / peak.matrix_gflop_per_s.value}


def _rate(side: Side, scenario: Scenario, p50: Estimate) -> Estimate:
    """Images a second: by the median request; offline, by the mean of a block's."""
    if scenario.kind == "offline":
        return _inverse(stats.typical([float(block.mean()) for block in side.blocks]), scenario.batch * 1e3)
    return _inverse(p50, scenario.batch * 1e3)


def _inverse(time_ms: Estimate, images: float) -> Estimate:
    return Estimate(
        value=images / time_ms.value,
        low=None if time_ms.high is None else images / time_ms.high,
        high=None if time_ms.low is None else images / time_ms.low,
    )


def line(scenario: str, side: str, number: int, answer: dict[str, Any]) -> str:
    """A block's samples as the samples' file keeps them."""
    kept = {name: answer[name] for name in ("ns", "network_ns", "device_ms", "batches") if answer.get(name) is not None}
    return json.dumps({"scenario": scenario, "contender": side, "block": number, **kept}) + "\n"
